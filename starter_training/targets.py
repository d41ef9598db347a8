"""What a scene has, as class labels: for the judge, and for guiding what a drawing is told."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import world

ABSENT = "none"
IGNORE_INDEX = -100  # the label of what cannot be known
APPEARANCE = {
    "species": (ABSENT, *world.SPECIES),
    "colour": (ABSENT, *world.COLOURS),
    "accessory": (ABSENT, *world.ACCESSORIES),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "action": tuple(world.ACTIONS),
    "place": tuple(world.PLACES),
    "prop": tuple(world.PROPS),
    "sky": tuple(world.SKIES),
    "far": ("near", "far"),
    **{f"{part}{slot}": values for slot in (0, 1) for part, values in APPEARANCE.items()},
}


def attribute_labels(scene: world.Scene) -> dict[str, int]:
    """The right answer of every head."""
    said = {"action": scene.action, "place": scene.place, "prop": scene.prop, "sky": scene.sky}
    said["far"] = "far" if scene.far else "near"
    for slot in (0, 1):
        look = scene.heroes[slot].look if slot < len(scene.heroes) else (ABSENT,) * 3
        said |= {f"{part}{slot}": value for part, value in zip(APPEARANCE, look)}
    return {head: ATTRIBUTES[head].index(value) for head, value in said.items()}


REFERENTS = "both", "the first", "the second"  # whom of a story's two heroes a text can name
SIZES = [len(values) for values in ATTRIBUTES.values()]
APPEARANCE_HEADS = [k for k, head in enumerate(ATTRIBUTES) if head[:-1] in APPEARANCE]  # the heads of how heroes look
SECOND_CHARACTER = list(ATTRIBUTES).index("species1")  # whether there is a second hero, and of which species
COAT_HEADS = [k for k in APPEARANCE_HEADS if list(ATTRIBUTES)[k].startswith("colour")]  # of these, the colours of coats


def guide(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of all heads (N, their classes), over the labels (N, heads) that can be known."""
    total = logits.new_zeros(())
    for found, wanted in zip(logits.float().split(SIZES, dim=-1), labels.T):
        error = F.cross_entropy(found, wanted, ignore_index=IGNORE_INDEX, reduction="sum")
        total = total + error / (wanted != IGNORE_INDEX).sum().clamp(1)
    return total


class ConditioningTargets:
    """Fixed vectors for labels: what the states that condition a drawing are to be, one head a state.

    They are drawn once from a seed, each of mean 0 and variance 1 like a Perceiver's output. So a U-Net can learn to
    draw what states say before there are any, and an LLM and its Perceiver to say it before anything draws.

    Args:
        slots, width: of the states; slots beyond the heads always hold the same.
    """

    def __init__(self, num_img_token: int, width: int):
        rng = torch.Generator().manual_seed(0)
        self.tables = [F.layer_norm(torch.randn(size + 1, width, generator=rng), (width,)) for size in SIZES]
        self.rest = F.layer_norm(torch.randn(num_img_token - len(SIZES), width, generator=rng), (width,))

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """labels (N, heads) -> (N, slots, width); the last code of a head's table says that it is not known."""
        said = [
            table.to(labels.device)[wanted.where(wanted != IGNORE_INDEX, torch.full_like(wanted, -1))]
            for table, wanted in zip(self.tables, labels.T)
        ]
        rest = self.rest.to(labels.device).expand(len(labels), -1, -1)
        return torch.cat([torch.stack(said, 1), rest], 1)

    def error(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of states (N, slots, width): the mean square against the codes, and the cross-entropy of reading them."""
        states = states.float()
        logits = [state @ table[:-1].to(state).T for state, table in zip(states.unbind(1), self.tables)]
        read = guide(torch.cat(logits, -1) / states.shape[-1] ** 0.5, labels)
        return F.mse_loss(states, self(labels)), read


class MMFSTargets:
    """Fixed vectors for how heroes look: what each site is to find in the pictures before, at every place alike.

    As with `ConditioningTargets`, a U-Net can learn to draw what its sites will find before they find anything. Skips
    have standard deviations of 1 to 4; the sum of all that is known has SIZE.

    Args:
        widths: of the sites.
    """

    SIZE = 2.0

    def __init__(self, widths):
        rng = torch.Generator().manual_seed(1)
        size = self.SIZE * len(APPEARANCE_HEADS) ** -0.5
        self.tables = [
            [torch.randn(SIZES[k], width, generator=rng) * size for k in APPEARANCE_HEADS] for width in widths
        ]

    def __call__(self, labels: torch.Tensor) -> list[torch.Tensor]:
        """labels (N, heads) -> for each site (N, width); what is not known adds nothing."""
        known = labels[:, APPEARANCE_HEADS] != IGNORE_INDEX
        wanted = labels[:, APPEARANCE_HEADS].where(known, torch.zeros_like(labels[:, APPEARANCE_HEADS]))
        return [
            sum(table.to(labels.device)[wanted[:, i]] * known[:, i : i + 1] for i, table in enumerate(tables))
            for tables in self.tables
        ]

    def coats(self) -> list[torch.Tensor]:
        """For each site an orthonormal basis (width, dimensions) of what coats of all colours can add."""
        chosen = [APPEARANCE_HEADS.index(k) for k in COAT_HEADS]
        return [torch.linalg.qr(torch.cat([tables[i] for i in chosen]).T).Q for tables in self.tables]
