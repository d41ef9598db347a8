"""Training objectives on single images: modules whose forward takes a batch and returns losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.finetune.objective import diffusion_target
from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs

from .targets import (
    APPEARANCE_HEADS,
    COAT_HEADS,
    IGNORE_INDEX,
    NUM_CLASSES,
    SECOND_CHARACTER,
    ConditioningTargets,
    MMFSTargets,
    attribute_loss,
)

COND_DROPOUT = 0.1
ATTRIBUTE_DROPOUT = 0.1  # of the attributes in the prompt embeddings, in `UNetObjective`
FOREGROUND_WEIGHT = 4.0  # loss weight of heroes and prop relative to the background, below the next timestep
FOREGROUND_MAX_TIMESTEP = 0.6  # as a share of the schedule
# The part of the schedule that decides coats, then faces and props; half of the timesteps are drawn from it.
TIMESTEP_FOCUS = 0.15, 0.85


class VAEObjective(nn.Module):
    """Reconstruction of images by an AutoencoderTiny.

    The latents get noise, so that similar latents decode to similar images; a penalty keeps each latent channel at unit
    variance, as the diffusion model expects.
    """

    NOISE = 0.1

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (N, 3, side, side) in [0, 1]."""
        target = images * 2 - 1
        latents = self.vae.encode(target).latents
        noise = torch.randn_like(latents) * self.NOISE if self.training else 0
        pred = self.vae.decode(latents + noise).sample
        losses = reconstruction_losses(pred, target)
        power = latents.float().pow(2).mean(dim=(0, 2, 3))
        return {"loss": sum(losses.values()) + 0.01 * (power - 1).pow(2).mean(), **losses, "latent_power": power.mean()}


class EncoderObjective(nn.Module):
    """Classification of the image's attributes from the visual tokens and from the feature maps, by probes.

    The ViT receives the adapter's convolutions through gates that start at zero, so these learn far sooner with probes
    of their own. A linear probe of the mean of the maps is there for MMFS, which is linear in the features it samples.
    """

    NUM_MAPS = 3  # of the four; each is pooled to at most this grid
    GRID = 8

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.token_probe = token_probe(encoder)
        self.pooled_map_probe = nn.Linear(encoder.config.hidden_size, sum(NUM_CLASSES))
        self.map_probes = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveMaxPool2d(self.GRID),
                nn.Conv2d(encoder.config.hidden_size, 32, 1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * self.GRID**2, 256),
                nn.ReLU(),
                nn.Linear(256, sum(NUM_CLASSES)),
            )
            for _ in range(self.NUM_MAPS)
        )

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (N, 3, side, side) in [0, 1], labels (N, attributes)."""
        features = self.encoder(images)
        per_map = [attribute_loss(probe(m), labels) for probe, m in zip(self.map_probes, features.feature_maps)]
        pooled = self.pooled_map_probe(pooled_map_features(features.feature_maps))
        losses = {
            "token_attr": attribute_loss(self.token_probe(features.visual_tokens.flatten(1)), labels),
            "map_attr": sum(per_map) / len(per_map),
            "pooled_map_attr": attribute_loss(pooled, appearance_labels(labels)),
        }
        return {"loss": sum(losses.values()), **losses}


class VAEDecoderObjective(nn.Module):
    """Reconstruction by the VAE's decoder half, with a perceptual loss on the encoder's features (Johnson et al. 2016).

    A distant face is a few pixels, which a pixel loss hardly notices; features trained to tell faces and props apart
    do. Latents do not change, so neither does the U-Net's task, and this stage can run at any time. They get noise,
    because the latents that a U-Net generates are never quite clean.
    """

    MAX_NOISE = 0.15  # in units of the latents' standard deviation
    PERCEPTUAL_WEIGHT = 3.0

    def __init__(self, vae, encoder):
        super().__init__()
        self.vae, self.encoder = vae, encoder

    def forward(self, latents: torch.Tensor, images: torch.Tensor, foreground_mask=None) -> dict[str, torch.Tensor]:
        """latents (N, C, h, w), scaled, of images (N, 3, side, side) in [0, 1].

        foreground_mask: (N, 1, side, side), `StoryDataset.foreground_mask`, used in training: pixels where it is 1
            weigh FOREGROUND_WEIGHT times as much.
        """
        weight = None
        if self.training:
            weight = None if foreground_mask is None else 1 + (FOREGROUND_WEIGHT - 1) * foreground_mask
            std = torch.rand(len(latents), 1, 1, 1, device=latents.device) * self.MAX_NOISE
            latents = latents + torch.randn_like(latents) * std
        pred = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        losses = reconstruction_losses(pred, images * 2 - 1, weight)
        with torch.no_grad():
            target = self.encoder(images)
        features = self.encoder((pred / 2 + 0.5).contiguous(memory_format=torch.channels_last))
        pairs = zip((features.visual_tokens, *features.feature_maps), (target.visual_tokens, *target.feature_maps))
        errors = [relative_mse(a, b) for a, b in pairs]
        losses["perceptual"] = sum(errors) / len(errors)
        return {"loss": sum(losses.values()) + (self.PERCEPTUAL_WEIGHT - 1) * losses["perceptual"], **losses}


def reconstruction_losses(pred: torch.Tensor, target: torch.Tensor, weight=None) -> dict[str, torch.Tensor]:
    """Returns L1 and L2 of the pixels, and L1 of the image gradients; `weight` is (N, 1, side, side)."""
    weight = torch.ones_like(pred[:, :1]) if weight is None else weight / weight.mean()
    error = pred - target
    gradients = ((error.diff(dim=dim), weight.narrow(dim, 1, weight.shape[dim] - 1)) for dim in (-1, -2))
    return {
        "l1": (error.abs() * weight).mean(),
        "l2": (error.pow(2) * weight).mean(),
        "gradient_l1": sum((gradient.abs() * w).mean() for gradient, w in gradients),
    }


def relative_mse(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in units of the target's variance."""
    return (pred - target).pow(2).mean() / target.var().clamp(min=1e-6)


class UNetObjective(nn.Module):
    """Diffusion loss of the U-Net alone, conditioned on `ConditioningTargets` and `MMFSTargets`.

    The looks of the heroes are in the prompt embeddings, in the MMFS residuals, or in both. Where the two differ the
    prompt embeddings are right, because MMFS cannot know which of two heroes the text names. With two heroes in an
    image the prompt embeddings always contain the looks.
    """

    COND_NOISE = 0.35  # largest noise on the prompt embeddings, in units of the targets' standard deviation
    MMFS_SCALE_RANGE = 3.0, 6.5  # of the residuals, in units of the targets; below 2 the U-Net hardly uses them
    MMFS_NOISE = 0.4  # noise on the residuals, in units of their standard deviation
    MMFS_LABEL_NOISE = 0.3  # share of the MMFS labels taken from another row, where the prompt embeddings are right

    def __init__(self, unet, synchronizer, scheduler: dict):
        super().__init__()
        self.unet, self.noise_scheduler = unet, make_scheduler("ddpm", scheduler)
        self.neg_prompt_embeds = synchronizer.conditioner.neg_prompt_embeds
        perceiver = synchronizer.config.perceiver
        self.cond_targets = ConditioningTargets(perceiver.num_queries, perceiver.hidden_size)
        self.mmfs = OracleMMFS(synchronizer.config.block_channels)

    def forward(self, latents, labels, foreground_mask=None) -> dict[str, torch.Tensor]:
        """latents (N, C, h, w), scaled; labels (N, attributes) of their images; mask as in `diffusion_loss`."""
        if self.training:
            # Where a lone hero's looks are, by `draw`: to .12 in the prompt embeddings; to .18 in the residuals; to .75
            # in both, but the coat in the residuals only; to .83 in both; to .95 in the prompt embeddings, while the
            # residuals are another image's; above, nowhere. With two heroes, from .12 to .83 in both.
            draw = torch.rand(len(labels), 1, device=labels.device)
            single = labels[:, SECOND_CHARACTER : SECOND_CHARACTER + 1] == 0
            unconditional = (single & (draw > 0.12) & (draw < 0.18)) | (draw > 0.95)
            mmfs_labels = torch.where((draw > 0.83) & (draw < 0.95), labels.roll(1, 0), labels)
            mmfs_labels = torch.where(unconditional, labels, self.corrupt_labels(mmfs_labels, single))
            mmfs_labels = mask_labels(mmfs_labels, APPEARANCE_HEADS, (draw < 0.12) | (draw > 0.95))
            cond_labels = mask_labels(labels, COAT_HEADS, single & (draw > 0.12) & (draw < 0.75))
            cond_labels = mask_labels(cond_labels, APPEARANCE_HEADS, unconditional)
            dropped = torch.rand(cond_labels.shape, device=cond_labels.device) < ATTRIBUTE_DROPOUT
            cond_labels = cond_labels.masked_fill(dropped, IGNORE_INDEX)
            return {"loss": self.loss(latents, cond_labels, mmfs_labels, foreground_mask)}
        all_rows = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        cond_only = self.loss(latents, labels, mask_labels(labels, APPEARANCE_HEADS, all_rows))
        mmfs_only = self.loss(latents, mask_labels(labels, COAT_HEADS, all_rows), labels)
        return {"loss": (cond_only + mmfs_only) / 2, "cond_only": cond_only, "mmfs_only": mmfs_only}

    def corrupt_labels(self, labels, single) -> torch.Tensor:
        """Replaces some labels (N, attributes) with another row's, but not the coats of lone heroes.

        Args:
            single: bool (N, 1), whether the image has one hero.
        """
        heads, others = torch.arange(labels.shape[1]), labels[torch.randperm(len(labels), device=labels.device)]
        protected = single & torch.isin(heads, torch.tensor(COAT_HEADS)).to(labels.device)
        corrupted = torch.rand(labels.shape, device=labels.device) < self.MMFS_LABEL_NOISE
        return torch.where(corrupted & ~protected, others, labels)

    def loss(self, latents, cond_labels, mmfs_labels, foreground_mask=None) -> torch.Tensor:
        """Diffusion loss given the labels (N, attributes) behind the prompt embeddings and the MMFS residuals."""
        noise, scale_range = (self.MMFS_NOISE, self.MMFS_SCALE_RANGE) if self.training else (0.0, (1.0, 1.0))
        with attach_mmfs(self.unet, self.mmfs, self.mmfs.residuals(mmfs_labels, noise, scale_range)):
            prompt_embeds = self.cond_targets(cond_labels)
            if self.training:
                noise = torch.randn_like(prompt_embeds) * torch.rand_like(prompt_embeds[:, :1, :1]) * self.COND_NOISE
                prompt_embeds = prompt_embeds + noise
            return diffusion_loss(
                self.unet,
                self.noise_scheduler,
                self.neg_prompt_embeds,
                prompt_embeds,
                latents,
                self.training,
                foreground_mask,
            )


class OracleMMFS:
    """Stands in for `MMFSNet` and adds the `MMFSTargets` of given labels instead of attending to images."""

    def __init__(self, block_channels):
        self.targets = MMFSTargets(block_channels)
        self.mmfs_down_blocks = range(len(block_channels) - 1)

    def residuals(self, labels: torch.Tensor, noise: float = 0.0, scale_range=(1.0, 1.0)) -> list[torch.Tensor]:
        """Returns the residual (N, C) of each block: the targets with noise, scaled at random."""
        low, high = scale_range
        scale = low + (high - low) * torch.rand(len(labels), 1, device=labels.device)
        return [(t + torch.randn_like(t) * MMFSTargets.STD * noise) * scale for t in self.targets(labels)]

    def add_residual(self, index: int, x, residuals, scale: float = 1.0):
        return x + scale * residuals[index].to(x)[:, :, None, None]


def mask_labels(labels: torch.Tensor, heads: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Sets the labels (N, attributes) of `heads` to IGNORE_INDEX in some rows, bool (N, 1)."""
    columns = torch.zeros(labels.shape[1], dtype=torch.bool, device=labels.device)
    columns[heads] = True
    return labels.masked_fill(rows & columns, IGNORE_INDEX)


def appearance_labels(labels: torch.Tensor) -> torch.Tensor:
    """Sets all labels (N, attributes) but those of the heroes' looks to IGNORE_INDEX."""
    others = [k for k in range(labels.shape[1]) if k not in APPEARANCE_HEADS]
    return mask_labels(labels, others, torch.ones_like(labels[:, :1], dtype=torch.bool))


def token_probe(encoder) -> nn.Linear:
    """Makes a linear probe from all visual tokens of an image to its attributes."""
    return nn.Linear(encoder.config.perceiver.num_queries * encoder.config.llm_hidden_size, sum(NUM_CLASSES))


def pooled_map_features(feature_maps) -> torch.Tensor:
    """Averages the normed feature maps except the finest over all positions and levels: (N, C)."""
    levels = [m.flatten(2).transpose(1, 2) for m in feature_maps[1:]]
    return torch.stack([F.layer_norm(x, x.shape[-1:]).mean(1) for x in levels]).mean(0)


def diffusion_loss(
    unet,
    noise_scheduler,
    neg_prompt_embeds,
    prompt_embeds,
    latents,
    training: bool,
    foreground_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the U-Net's prediction for noised latents (N, C, h, w), with condition dropout.

    The target depends on the scheduler's `prediction_type`. `epsilon` is the noise, as in the reference; `v_prediction`
    is the velocity (Salimans and Ho 2022, section 4), with which a U-Net trained from scratch learns its condition far
    sooner.

    `foreground_mask`, float (N, 1, h, w), is `StoryDataset.foreground_mask`. It raises the loss weight only at
    timesteps where the noise no longer hides the foreground; otherwise the U-Net would draw heroes everywhere.
    """
    if training:
        dropped = torch.rand(len(prompt_embeds), 1, 1, device=prompt_embeds.device) < COND_DROPOUT
        prompt_embeds = torch.where(dropped, neg_prompt_embeds.to(prompt_embeds), prompt_embeds)
    noise = torch.randn_like(latents)
    timesteps = torch.rand(len(latents), device=latents.device)
    if training:
        low, high = TIMESTEP_FOCUS
        timesteps = torch.where(torch.rand_like(timesteps) < 0.5, timesteps, low + (high - low) * timesteps)
    timesteps = (timesteps * noise_scheduler.config.num_train_timesteps).long()
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds).sample
    target = diffusion_target(noise_scheduler, latents, noise, timesteps)
    if foreground_mask is None:
        return F.mse_loss(model_pred.float(), target.float())
    visible = (timesteps < FOREGROUND_MAX_TIMESTEP * noise_scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    weight = 1 + (FOREGROUND_WEIGHT - 1) * foreground_mask * visible
    return ((model_pred.float() - target.float()).pow(2) * weight).mean() / weight.mean()
