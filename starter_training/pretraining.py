"""What is learned from single pictures: modules whose forward takes a batch and gives losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs

from .targets import (
    APPEARANCE_HEADS,
    COAT_HEADS,
    IGNORE_INDEX,
    SECOND_CHARACTER,
    SIZES,
    ConditioningTargets,
    MMFSTargets,
    guide,
)

COND_DROPOUT = 0.1
ATTRIBUTE_DROPOUT = 0.1  # of what a drawing could be told, in learning to draw
FOREGROUND_WEIGHT = 4.0  # the weight of heroes and props against what is behind them, at times below the next
FOREGROUND_MAX_TIMESTEP = 0.6
# Of the schedule: when coats, then faces and tools are decided; half of the times are from there.
TIMESTEP_FOCUS = 0.15, 0.85


class VAEObjective(nn.Module):
    """Reconstruction of pictures through AutoencoderTiny's latents.

    L1 and L2 on pixels, L1 on their differences, so that edges stay edges; noise on the latents, so that near latents
    mean near pictures; a pull of every channel to unit size, so that a diffusion model finds them as it expects them.
    """

    NOISE = 0.1

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """pictures (N, 3, side, side) in [0, 1]."""
        wanted = pictures * 2 - 1
        latents = self.vae.encode(wanted).latents
        noise = torch.randn_like(latents) * self.NOISE if self.training else 0
        found = self.vae.decode(latents + noise).sample
        losses = pixel_errors(found, wanted)
        sizes = latents.float().pow(2).mean(dim=(0, 2, 3))
        return {"loss": sum(losses.values()) + 0.01 * (sizes - 1).pow(2).mean(), **losses, "latent_size": sizes.mean()}


class EncoderObjective(nn.Module):
    """What a picture shows, read by guides that are left behind: from the visual tokens, and from the maps.

    The ViT hears of the adapter's convolutions through gates that begin at zero, so these learn far sooner when they
    are asked themselves. And the maps are read as the synchronizers read them: linearly, at a glance.
    """

    MAPS = 3  # of the four; each is read on a grid of at most this side
    SIDE = 8

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.tokens, self.glance = sight(encoder), nn.Linear(encoder.config.hidden_size, sum(SIZES))
        self.maps = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveMaxPool2d(self.SIDE),
                nn.Conv2d(encoder.config.hidden_size, 32, 1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * self.SIDE**2, 256),
                nn.ReLU(),
                nn.Linear(256, sum(SIZES)),
            )
            for _ in range(self.MAPS)
        )

    def forward(self, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pictures (N, 3, side, side) in [0, 1], labels (N, heads)."""
        features = self.encoder(pictures)
        read = [guide(reader(found), labels) for reader, found in zip(self.maps, features.feature_maps)]
        losses = {
            "tokens": guide(self.tokens(features.visual_tokens.flatten(1)), labels),
            "maps": sum(read) / len(read),
            "glance": guide(self.glance(glance(features.feature_maps)), appearance_labels(labels)),
        }
        return {"loss": sum(losses.values()), **losses}


class VAEDecoderObjective(nn.Module):
    """The decoder half of a VAE, so that the encoder sees in what it makes of latents what it sees in the picture.

    A face far away is a few pixels, and errors of pixels hardly miss it; features that were learned by telling faces
    and tools apart do (Johnson et al. 2016). Latents stay as they are, and with them what a U-Net knows, so this can be
    done at any time; they get noise, as what a U-Net draws is never quite clean.
    """

    NOISE = 0.15  # at most, in units of the latents' size
    PERCEPTUAL_WEIGHT = 3.0  # the weight of what the encoder sees against errors of pixels

    def __init__(self, vae, encoder):
        super().__init__()
        self.vae, self.encoder = vae, encoder

    def forward(self, latents: torch.Tensor, pictures: torch.Tensor, emphasis=None) -> dict[str, torch.Tensor]:
        """latents (N, C, h, w), scaled, of pictures (N, 3, side, side) in [0, 1].

        emphasis: (N, 1, side, side), `StoryDataset.emphasis`, in training: where it is 1, pixels weigh
            FOREGROUND_WEIGHT times as much.
        """
        weight = None
        if self.training:
            weight = None if emphasis is None else 1 + (FOREGROUND_WEIGHT - 1) * emphasis
            size = torch.rand(len(latents), 1, 1, 1, device=latents.device) * self.NOISE
            latents = latents + torch.randn_like(latents) * size
        found = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        losses = pixel_errors(found, pictures * 2 - 1, weight)
        with torch.no_grad():
            true = self.encoder(pictures)
        seen = self.encoder((found / 2 + 0.5).contiguous(memory_format=torch.channels_last))
        pairs = zip((seen.visual_tokens, *seen.feature_maps), (true.visual_tokens, *true.feature_maps))
        errors = [relative_error(a, b) for a, b in pairs]
        losses["seen"] = sum(errors) / len(errors)
        return {"loss": sum(losses.values()) + (self.PERCEPTUAL_WEIGHT - 1) * losses["seen"], **losses}


def pixel_errors(found: torch.Tensor, wanted: torch.Tensor, weight=None) -> dict[str, torch.Tensor]:
    """L1 and L2 of pixels, and L1 of their differences, so that edges stay edges; `weight` is (N, 1, side, side)."""
    weight = torch.ones_like(found[:, :1]) if weight is None else weight / weight.mean()
    error = found - wanted
    differences = ((error.diff(dim=dim), weight.narrow(dim, 1, weight.shape[dim] - 1)) for dim in (-1, -2))
    return {
        "pixels": (error.abs() * weight).mean(),
        "squares": (error.pow(2) * weight).mean(),
        "edges": sum((difference.abs() * there).mean() for difference, there in differences),
    }


def relative_error(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean square of found - true, in units of true's variance."""
    return (found - true).pow(2).mean() / true.var().clamp(min=1e-6)


class UNetObjective(nn.Module):
    """Drawing from `ConditioningTargets`, before there is an LLM to say what to draw: the U-Net alone.

    How heroes look it is told by the states, or as sites will find it in the pictures before (`MMFSTargets`), or both;
    if these differ, the states are right, for sites cannot know which of two heroes is meant. Of two heroes in a
    picture the states always tell.
    """

    COND_NOISE = 0.35  # noise on states, at most, in units of the codes' size: an LLM's are never quite the codes
    MMFS_SCALE_RANGE = 3.0, 6.5  # of the targets; below 2 the U-Net hardly draws from them
    MMFS_NOISE = 0.4  # noise on what they find, in units of its size
    MMFS_LABEL_NOISE = 0.3  # share of the labels of MMFS that are another row's, where the states tell them as well

    def __init__(self, unet, decoder, scheduler: dict):
        super().__init__()
        self.unet, self.noise = unet, make_scheduler("ddpm", scheduler)
        self.negative = decoder.conditioner.neg_prompt_embeds
        self.codes = ConditioningTargets(decoder.config.perceiver.num_queries, decoder.config.perceiver.hidden_size)
        self.sites = OracleMMFS(decoder.config.block_channels)

    def forward(self, latents, labels, emphasis=None) -> dict[str, torch.Tensor]:
        """latents (N, C, h, w), scaled; labels (N, heads) of what they show; emphasis as in `diffusion_error`."""
        if self.training:
            # Who knows of looks: the states; the sites; the sites, the states of all but the coat; both; the states,
            # while the sites have found another's; nobody.
            way = torch.rand(len(labels), 1, device=labels.device)
            alone = labels[:, SECOND_CHARACTER : SECOND_CHARACTER + 1] == 0
            untold = (alone & (way > 0.12) & (way < 0.18)) | (way > 0.95)
            found = torch.where((way > 0.83) & (way < 0.95), labels.roll(1, 0), labels)
            found = torch.where(untold, labels, self.misread(found, alone))
            found = without(found, APPEARANCE_HEADS, (way < 0.12) | (way > 0.95))
            told = without(labels, COAT_HEADS, alone & (way > 0.12) & (way < 0.75))
            told = without(told, APPEARANCE_HEADS, untold)
            told = told.masked_fill(torch.rand(told.shape, device=told.device) < ATTRIBUTE_DROPOUT, IGNORE_INDEX)
            return {"loss": self.error(latents, told, found, emphasis)}
        every = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        told = self.error(latents, labels, without(labels, APPEARANCE_HEADS, every))
        found = self.error(latents, without(labels, COAT_HEADS, every), labels)
        return {"loss": (told + found) / 2, "told": told, "found": found}

    def misread(self, labels, alone) -> torch.Tensor:
        """Labels (N, heads), some of them another row's; but never the coat of a hero who is `alone`, bool (N, 1)."""
        heads, others = torch.arange(labels.shape[1]), labels[torch.randperm(len(labels), device=labels.device)]
        kept = alone & torch.isin(heads, torch.tensor(COAT_HEADS)).to(labels.device)
        wrong = torch.rand(labels.shape, device=labels.device) < self.MMFS_LABEL_NOISE
        return torch.where(wrong & ~kept, others, labels)

    def error(self, latents, told, found, emphasis=None) -> torch.Tensor:
        """Told by the states and found by the sites: labels (N, heads)."""
        doubt, sizes = (self.MMFS_NOISE, self.MMFS_SCALE_RANGE) if self.training else (0.0, (1.0, 1.0))
        with attach_mmfs(self.unet, self.sites, self.sites.prepare(found, doubt, sizes)):
            states = self.codes(told)
            if self.training:
                states = states + torch.randn_like(states) * torch.rand_like(states[:, :1, :1]) * self.COND_NOISE
            return diffusion_error(self.unet, self.noise, self.negative, states, latents, self.training, emphasis)


class OracleMMFS:
    """In the place of a MMFSNet's blocks: they find what the pictures before would show, with no pictures."""

    def __init__(self, widths):
        self.codes = MMFSTargets(widths)
        self.mmfs_down_blocks = range(len(widths) - 1)

    def prepare(self, labels: torch.Tensor, noise: float = 0.0, sizes=(1.0, 1.0)) -> list[torch.Tensor]:
        """Of each site what it finds (N, width): codes of some size, and as no synchronizer is ever right, noise."""
        low, high = sizes
        size = low + (high - low) * torch.rand(len(labels), 1, device=labels.device)
        return [(code + torch.randn_like(code) * MMFSTargets.SIZE * noise) * size for code in self.codes(labels)]

    def add_residual(self, index: int, x, prepared, scale: float = 1.0):
        return x + scale * prepared[index].to(x)[:, :, None, None]


def without(labels: torch.Tensor, heads: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Labels (N, heads) of which some are not known in some rows: bool (N, 1)."""
    chosen = torch.zeros(labels.shape[1], dtype=torch.bool, device=labels.device)
    chosen[heads] = True
    return labels.masked_fill(rows & chosen, IGNORE_INDEX)


def appearance_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels (N, heads) of which only how heroes look is known."""
    others = [k for k in range(labels.shape[1]) if k not in APPEARANCE_HEADS]
    return without(labels, others, torch.ones_like(labels[:, :1], dtype=torch.bool))


def sight(encoder) -> nn.Linear:
    """A guide that reads from all visual tokens together what their picture shows."""
    return nn.Linear(encoder.config.perceiver.num_queries * encoder.config.llm_hidden_size, sum(SIZES))


def glance(maps) -> torch.Tensor:
    """What a synchronizer that looks everywhere alike finds in an encoder's maps but the largest: (N, C)."""
    cells = [found.flatten(2).transpose(1, 2) for found in maps[1:]]
    return torch.stack([F.layer_norm(c, c.shape[-1:]).mean(1) for c in cells]).mean(0)


def diffusion_error(
    unet, noise_schedule, negative, states, latents, training: bool, emphasis: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of what the U-Net predicts of noised latents (N, C, h, w), told `states`.

    What that is is a matter of the schedule's kind. `epsilon`: the noise, as in the reference. `v_prediction`
    (Salimans and Ho 2022, section 4): the same model, with the errors of its clean picture weighed evenly; made from
    nothing, it learns far sooner what to draw.

    `emphasis`, float (N, 1, h, w), `StoryDataset.emphasis`, is where what matters stands: the error weighs more there,
    but only at times when the noise no longer hides where that is, or the U-Net would draw heroes everywhere.
    """
    if training:
        dropped = torch.rand(len(states), 1, 1, device=states.device) < COND_DROPOUT
        states = torch.where(dropped, negative.to(states), states)
    noise = torch.randn_like(latents)
    times = torch.rand(len(latents), device=latents.device)
    if training:
        low, high = TIMESTEP_FOCUS
        times = torch.where(torch.rand_like(times) < 0.5, times, low + (high - low) * times)
    times = (times * noise_schedule.config.num_train_timesteps).long()
    found = unet(noise_schedule.add_noise(latents, noise, times), times, encoder_hidden_states=states).sample
    wanted = noise
    if noise_schedule.config.prediction_type == "v_prediction":
        wanted = noise_schedule.get_velocity(latents, noise, times)
    if emphasis is None:
        return F.mse_loss(found.float(), wanted.float())
    late = (times < FOREGROUND_MAX_TIMESTEP * noise_schedule.config.num_train_timesteps).view(-1, 1, 1, 1)
    weight = 1 + (FOREGROUND_WEIGHT - 1) * emphasis * late
    return ((found.float() - wanted.float()).pow(2) * weight).mean() / weight.mean()
