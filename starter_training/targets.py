"""Attributes of a scene as class labels, and the fixed vectors that stand for them in pretraining."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import world

ABSENT = "none"
IGNORE_INDEX = -100  # the label of an attribute that cannot be known
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
    **{f"{part}{position}": values for position in (0, 1) for part, values in APPEARANCE.items()},
}


def attribute_labels(scene: world.Scene) -> dict[str, int]:
    """Returns the class index of every attribute of a scene."""
    values = {"action": scene.action, "place": scene.place, "prop": scene.prop, "sky": scene.sky}
    values["far"] = "far" if scene.far else "near"
    for position in (0, 1):
        look = scene.heroes[position].look if position < len(scene.heroes) else (ABSENT,) * 3
        values |= {f"{part}{position}": value for part, value in zip(APPEARANCE, look)}
    return {name: ATTRIBUTES[name].index(value) for name, value in values.items()}


REFERENTS = "both", "the first", "the second"  # which of a story's two heroes a text names
NUM_CLASSES = [len(values) for values in ATTRIBUTES.values()]
APPEARANCE_HEADS = [
    k for k, name in enumerate(ATTRIBUTES) if name[:-1] in APPEARANCE
]  # attributes of the heroes' looks
SECOND_CHARACTER = list(ATTRIBUTES).index("species1")  # ABSENT (0) if there is one hero
COAT_HEADS = [k for k in APPEARANCE_HEADS if list(ATTRIBUTES)[k].startswith("colour")]  # the coat colours among them


def attribute_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums the cross-entropies of all attributes: logits (N, sum of NUM_CLASSES), labels (N, attributes)."""
    total = logits.new_zeros(())
    for pred, target in zip(logits.float().split(NUM_CLASSES, dim=-1), labels.T):
        error = F.cross_entropy(pred, target, ignore_index=IGNORE_INDEX, reduction="sum")
        total = total + error / (target != IGNORE_INDEX).sum().clamp(1)
    return total


class ConditioningTargets:
    """Fixed prompt embeddings for labels, one token per attribute: pretraining targets of the conditioner.

    They are drawn once from a seed, each with mean 0 and variance 1 like a Perceiver's output. The U-Net can learn to
    draw from them before there is an LLM, and the LLM and its Perceiver to predict them before there is a U-Net.

    Args:
        num_tokens, width: of the prompt embeddings; tokens beyond the attributes are constant.
    """

    def __init__(self, num_tokens: int, width: int):
        rng = torch.Generator().manual_seed(0)
        self.tables = [F.layer_norm(torch.randn(size + 1, width, generator=rng), (width,)) for size in NUM_CLASSES]
        self.padding = F.layer_norm(torch.randn(num_tokens - len(NUM_CLASSES), width, generator=rng), (width,))

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        """labels (N, attributes) -> (N, num_tokens, width); the last row of a table stands for IGNORE_INDEX."""
        tokens = [
            table.to(labels.device)[target.where(target != IGNORE_INDEX, torch.full_like(target, -1))]
            for table, target in zip(self.tables, labels.T)
        ]
        padding = self.padding.to(labels.device).expand(len(labels), -1, -1)
        return torch.cat([torch.stack(tokens, 1), padding], 1)

    def losses(self, prompt_embeds: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mean squared error to the targets, and the cross-entropy of classifying by their inner products.

        Args:
            prompt_embeds: (N, num_tokens, width).
        """
        prompt_embeds = prompt_embeds.float()
        attributes = attribute_loss(torch.cat(self.logits(prompt_embeds), -1) / prompt_embeds.shape[-1] ** 0.5, labels)
        return F.mse_loss(prompt_embeds, self(labels)), attributes

    def logits(self, prompt_embeds: torch.Tensor) -> list[torch.Tensor]:
        """Inner products with the classes of each attribute, `(N, classes)`."""
        return [token @ table[:-1].to(token).T for token, table in zip(prompt_embeds.unbind(1), self.tables)]

    def share_right(self, prompt_embeds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The share of the drawings of which every known attribute is the likeliest."""
        likeliest = torch.stack([each.argmax(-1) for each in self.logits(prompt_embeds.float())], dim=1)
        return ((likeliest == labels) | (labels == IGNORE_INDEX)).all(1).float().mean()


class MMFSTargets:
    """Fixed residuals for the heroes' looks: pretraining targets of the MMFS blocks, the same at every position.

    As with `ConditioningTargets`, the U-Net can learn to draw from them before the MMFS blocks have learned anything.
    Skips have standard deviations of 1 to 4; a target with all attributes known has STD.

    Args:
        block_channels: channels of each MMFS block.
    """

    STD = 2.0

    def __init__(self, block_channels):
        rng = torch.Generator().manual_seed(1)
        std = self.STD * len(APPEARANCE_HEADS) ** -0.5
        self.tables = [
            [torch.randn(NUM_CLASSES[k], channels, generator=rng) * std for k in APPEARANCE_HEADS]
            for channels in block_channels
        ]

    def __call__(self, labels: torch.Tensor) -> list[torch.Tensor]:
        """labels (N, attributes) -> (N, C) for each block; an unknown attribute adds nothing."""
        is_known = labels[:, APPEARANCE_HEADS] != IGNORE_INDEX
        rows = labels[:, APPEARANCE_HEADS].where(is_known, torch.zeros_like(labels[:, APPEARANCE_HEADS]))
        return [
            sum(table.to(labels.device)[rows[:, i]] * is_known[:, i : i + 1] for i, table in enumerate(tables))
            for tables in self.tables
        ]

    def coat_bases(self) -> list[torch.Tensor]:
        """Returns, for each block, an orthonormal basis (C, dimensions) of the span of all coat colours' targets."""
        heads = [APPEARANCE_HEADS.index(k) for k in COAT_HEADS]
        return [torch.linalg.qr(torch.cat([tables[i] for i in heads]).T).Q for tables in self.tables]
