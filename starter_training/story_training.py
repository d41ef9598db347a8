"""What is learned from whole stories: to write them, to say what is to be drawn, to look at the pictures before.

Paper 3.3; the reference's `MMInterleaved.forward`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs
from comfy_mminterleaved.models.pos_embed import interpolate_pos_embed
from comfy_mminterleaved.models.vit_adapter import get_reference_points

from .dataset import Batch, TextBatch
from .pretraining import appearance_labels, diffusion_error, glance, sight
from .targets import IGNORE_INDEX, REFERENTS, SIZES, ConditioningTargets, MMFSTargets, guide

WEIGHTS = {  # of text and image the paper's
    "text": 1.0,
    "image": 10.0,
    "sees": 0.2,
    "glance": 0.2,
    "knows": 0.2,
    "meant": 0.5,
    "says": 0.2,
    "code": 1.0,
    "sites": 1.0,
}
NOISES_PER_IMAGE = 2  # of each picture in a batch: what it is told and looks at is made once for them
MMFS_TARGET_SCALE = 5.9  # size of the MMFS residuals in units of their targets


class StoryObjective(nn.Module):
    """Next token and noise prediction on whole stories, each panel in view of all before it.

    Args:
        blocks: by name; those to be trained have parameters that require gradients.
        scheduler: settings of the noise schedule.
        draws: whether the diffusion loss is learned beside the text's.

    Beside them, probes read what a scene has (`targets.ATTRIBUTES`), as far as the text and the earlier panels tell it:
    from the visual tokens and from the LLM's state at the start-of-image token. The states that condition the U-Net are
    drawn towards the `ConditioningTargets` that it has learned to draw from, and the MMFS residuals towards the
    `MMFSTargets`. Probes and targets are left behind when training is done. Blocks that stand still have no losses.
    """

    def __init__(self, blocks: dict[str, nn.Module], scheduler: dict, draws: bool = True):
        super().__init__()
        self.encoder, self.llm = blocks["encoder"], blocks["llm"]
        self.decoder, self.unet = blocks["synchronizer"], blocks["unet"] if draws else None
        self.noise = make_scheduler("ddpm", scheduler)
        c = self.decoder.config
        self.sees = self.knows = None
        if learns(self.encoder):
            self.sees, self.glance = sight(self.encoder), nn.Linear(self.encoder.config.hidden_size, sum(SIZES))
        if learns(self.llm):
            self.knows = nn.Linear(c.llm_hidden_size, sum(SIZES))
            self.meant = nn.Linear(c.llm_hidden_size, len(REFERENTS))
        self.codes = ConditioningTargets(c.perceiver.num_queries, c.perceiver.hidden_size)
        self.site_codes = MMFSTargets(c.block_channels)

    def forward(self, batch: Batch | TextBatch, latents=None, emphasis=None) -> dict[str, torch.Tensor]:
        """Needed to draw, of the batch's pictures: `latents` (N, P, C, h, w), scaled, `emphasis` (N, P, 1, h, w)."""
        if isinstance(batch, TextBatch):
            return self.learn_names(batch)
        losses = {}
        with torch.set_grad_enabled(self.sees is not None and torch.is_grad_enabled()):
            features = self.encoder(batch.pixels.flatten(0, 1))
        maps = [m.unflatten(0, batch.pixels.shape[:2]) for m in features.feature_maps]
        if self.sees is not None:
            shown = batch.shown.flatten(0, 1)
            losses["sees"] = guide(self.sees(features.visual_tokens.flatten(1)), shown)
            losses["glance"] = guide(self.glance(glance(features.feature_maps)), appearance_labels(shown))
        states, told = self.tell(batch, features, maps)
        losses |= told
        if batch.draws and self.unet is not None:
            losses |= self.draw(batch, states, maps, latents, emphasis)
        return {"loss": sum(WEIGHTS[name] * error for name, error in losses.items()), **losses}

    def tell(self, batch: Batch, features, maps) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """What conditions the drawing of every picture of every story, and the errors of text, guide and codes."""
        losses = {}
        with torch.set_grad_enabled((self.sees or self.knows) is not None and torch.is_grad_enabled()):
            x = self.llm.embed_inputs(batch.ids, features.visual_tokens.flatten(0, 1))
            hidden = self.llm(x, self.llm.project_images(maps), batch.visible)
        if self.knows is not None:
            logits = self.llm.logits(hidden).float()
            losses["text"] = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
        if not batch.draws:
            return None, losses
        n, p = batch.starts.shape
        contexts = [hidden[i, : batch.starts[i, j] + 1] for j in range(p) for i in range(n)]
        states, labels = self.decoder.conditioner.prompt_embeds(contexts), by_picture(batch.labels)
        losses["code"], losses["says"] = self.codes.error(states, labels)
        if self.knows is not None:
            last = torch.stack([context[-1] for context in contexts])
            losses["knows"] = guide(self.knows(last), labels)
            losses["meant"] = self.meant_error(last, by_picture(batch.meant))
        return states, losses

    def learn_names(self, texts: TextBatch) -> dict[str, torch.Tensor]:
        """The error of telling at every word whom its text names.

        That a name is the first or the second of two is a matter of words alone; in whole stories, with all else there
        is to learn, it is learned very late.
        """
        hidden = self.llm(self.llm.embed_inputs(texts.ids))
        error = self.meant_error(hidden.flatten(0, 1), texts.meant.flatten())
        return {"loss": WEIGHTS["meant"] * error, "named": error}

    def meant_error(self, states, meant) -> torch.Tensor:
        """The cross-entropy of reading from the LLM's states (N, width) whom of two heroes the text means."""
        error = F.cross_entropy(self.meant(states).float(), meant, ignore_index=IGNORE_INDEX, reduction="sum")
        return error / (meant != IGNORE_INDEX).sum().clamp(1)

    def draw(self, batch: Batch, states, maps, latents, emphasis) -> dict[str, torch.Tensor]:
        """The diffusion error for every picture of every story, each in view of those before it, and its sites'."""
        count = NOISES_PER_IMAGE if self.training else 1
        maps, visible = seen(maps, self.decoder.config.num_context_images, self.training)
        labels = by_picture(batch.shown).masked_fill(~visible.any(1, keepdim=True), IGNORE_INDEX)
        sites = RecordingMMFS(self.decoder.mmfs_module, len(self.decoder.mmfs_module.mmfs_down_blocks))
        states, latents, emphasis = (
            part.repeat(count, *[1] * (part.ndim - 1)) for part in (states, by_picture(latents), by_picture(emphasis))
        )
        with attach_mmfs(self.unet, sites, self.decoder.mmfs_module.project_images(maps, visible)):
            image = diffusion_error(
                self.unet,
                self.noise,
                self.decoder.conditioner.neg_prompt_embeds,
                states,
                latents,
                self.training,
                emphasis if self.training else None,
            )
        wanted = (code.repeat(count, 1)[:, :, None, None] for code in self.site_codes(labels))
        errors = [
            (sites.found[index].float() / MMFS_TARGET_SCALE - code).pow(2).mean() for index, code in enumerate(wanted)
        ]
        return {"image": image, "sites": sum(errors) / len(errors) / MMFSTargets.SIZE**2}


class MMFSObjective(nn.Module):
    """The sites alone: to find in the pictures before how the heroes of the picture to come look (`MMFSTargets`).

    They are asked by the U-Net as it is, told by `ConditioningTargets`; at some places only, as they cost as much as
    the U-Net does.
    """

    PLACES = 16  # of each site's grid
    COATS_WEIGHT = 3.0  # how much more what is found of coats counts: of a lone hero the states tell the rest

    def __init__(self, blocks: dict[str, nn.Module], scheduler: dict):
        super().__init__()
        self.encoder, self.unet, self.decoder = blocks["encoder"], blocks["unet"], blocks["synchronizer"]
        self.noise = make_scheduler("ddpm", scheduler)
        c = self.decoder.config
        self.codes = ConditioningTargets(c.perceiver.num_queries, c.perceiver.hidden_size)
        self.site_codes = MMFSTargets(c.block_channels)
        self.of_coats = self.site_codes.coats()

    def forward(self, batch: Batch, latents) -> dict[str, torch.Tensor]:
        """`latents`: (N, P, C, h, w) of the batch's pictures, scaled."""
        pairs = self.predictions_and_targets(batch, latents)
        missed = [(found - code) / MMFSTargets.SIZE for found, code in pairs]
        error = sum(m.pow(2).mean() for m in missed) / len(missed)
        sizes = [
            m.movedim(1, -1).matmul(basis.to(m)).pow(2).sum(-1).mean() / m.shape[1]
            for m, basis in zip(missed, self.of_coats)
        ]
        coats = sum(sizes) / len(sizes)
        return {"loss": error + self.COATS_WEIGHT * coats, "error": error, "coats": coats}

    def predictions_and_targets(self, batch: Batch, latents) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each site what it finds (P * N, C, places, 1), and the codes (P * N, C, 1, 1)."""
        maps = [m.unflatten(0, batch.pixels.shape[:2]) for m in self.encoder(batch.pixels.flatten(0, 1)).feature_maps]
        maps, visible = seen(maps, self.decoder.config.num_context_images, self.training)
        labels = by_picture(batch.shown).masked_fill(~visible.any(1, keepdim=True), IGNORE_INDEX)
        prepared, wanted = self.decoder.mmfs_module.project_images(maps, visible), self.site_codes(labels)
        asking = self.queries(by_picture(latents), self.codes(by_picture(batch.labels)))
        pairs = []
        for index, (site, code) in enumerate(zip(self.decoder.mmfs_module.blocks, wanted)):
            x, size = asking[index], tuple(asking[index].shape[-2:])
            some = torch.randperm(size[0] * size[1], device=x.device)[: self.PLACES]
            positions = interpolate_pos_embed(site.pos_embed, size).to(x)
            centres = get_reference_points(size).to(x.device)
            x = x.flatten(2)[..., some].unsqueeze(-1)
            found = site(x, prepared.blocks[index], visible, positions[..., some, :], centres[some])
            pairs.append((found.float(), code[:, :, None, None]))
        return pairs

    @torch.no_grad()
    def rescale_to_targets(self, batches, size: float = MMFS_TARGET_SCALE) -> list[float]:
        """Scales each site so that what it finds is, along the codes, `size` times as large; returns the factors.

        Least squares shrink what is found wherever it is in doubt, as in a model's own drawings it often is; and a
        U-Net that is told of a coat by half does not draw half of it but another one.

        Args:
            batches: arguments of `forward`.
        """
        sums = torch.zeros(len(self.decoder.mmfs_module.blocks), 2)
        for batch, latents in batches:
            for number, (found, code) in enumerate(self.predictions_and_targets(batch, latents)):
                sums[number] += torch.stack([(found * code).mean(), code.pow(2).mean()]).cpu()
        factors = (size * sums[:, 1] / sums[:, 0]).tolist()
        for site, factor in zip(self.decoder.mmfs_module.blocks, factors):
            for parameter in site.conv.parameters():
                parameter.mul_(factor)
        return factors

    @torch.no_grad()
    def queries(self, latents, states) -> list[torch.Tensor]:
        """What the U-Net asks the sites with at some time of a drawing, (N, C, h, w) each."""
        times = torch.randint(self.noise.config.num_train_timesteps, (len(latents),), device=latents.device)
        noised = self.noise.add_noise(latents, torch.randn_like(latents), times)
        sites = RecordingMMFS(None, len(self.decoder.mmfs_module.mmfs_down_blocks))
        with attach_mmfs(self.unet, sites, None):
            self.unet(noised, times, encoder_hidden_states=states)
        return [sites.asked[index] for index in range(len(self.decoder.mmfs_module.blocks))]


def seen(maps, num_context_images: int, at_random: bool = False) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The pictures that each drawing looks at: of those before it the last `num_context_images`, or at random fewer.

    Args:
        maps: the encoder's, each (N, P, C, h, w).

    Returns:
        Maps (P * N, most, C, h, w), picture by picture, and which of them count: bool (P * N, most).
    """
    n, p = maps[0].shape[:2]
    most = min(num_context_images, p - 1)
    if at_random and most > 1:
        most = int(torch.multinomial(torch.tensor([4.0, 3, 2, 1][:most]), 1)) + 1
    before = torch.arange(p).view(p, 1) - torch.arange(most, 0, -1)  # (P, most), oldest first
    shown = (before >= 0).to(maps[0].device)
    before = before.clamp(min=0).to(maps[0].device)
    taken = [m[:, before].transpose(0, 1).flatten(0, 1) for m in maps]
    return taken, shown.repeat_interleave(n, dim=0)


class RecordingMMFS:
    """Sites that keep what they are asked with and what they find, by number.

    Args:
        decoder: whose sites they are; None for sites that find nothing.
        skips: how many there are but for the mid's.
    """

    def __init__(self, decoder, skips: int):
        self.decoder, self.mmfs_down_blocks = decoder, range(skips)
        self.asked: dict[int, torch.Tensor] = {}
        self.found: dict[int, torch.Tensor] = {}

    def add_residual(self, index: int, x, prepared, scale: float = 1.0):
        self.asked[index] = x
        if self.decoder is None:
            return x
        y = self.decoder.add_residual(index, x, prepared, scale)
        self.found[index] = y - x
        return y


def learns(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def by_picture(found: torch.Tensor) -> torch.Tensor:
    """(N, P, ...) of N stories -> (P * N, ...): the first picture of every story, then the second of every one."""
    return found.transpose(0, 1).flatten(0, 1)
