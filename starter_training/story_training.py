"""Training objectives on whole stories (paper section 3.3; the reference's `MMInterleaved.forward`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.generation.schedulers import make_scheduler
from comfy_mminterleaved.generation.unet_hooks import attach_mmfs
from comfy_mminterleaved.models.pos_embed import interpolate_pos_embed
from comfy_mminterleaved.models.vit_adapter import get_reference_points

from .batches import StoryBatch, TextBatch
from .pretraining import appearance_labels, diffusion_loss, pooled_map_features, token_probe
from .targets import IGNORE_INDEX, NUM_CLASSES, REFERENTS, ConditioningTargets, MMFSTargets, attribute_loss

LOSS_WEIGHTS = {  # those of text and image are the paper's
    "text": 1.0,
    "image": 10.0,
    "token_attr": 0.2,
    "pooled_map_attr": 0.2,
    "text_attr": 0.2,
    "coref": 0.5,
    "cond_attr": 0.2,
    "cond_mse": 1.0,
    "mmfs_mse": 1.0,
}
NOISES_PER_IMAGE = 2  # noised latents for each image of a batch; they share prompt embeddings and projected images
MMFS_TARGET_SCALE = 5.9  # size of the MMFS residuals in units of their targets


class StoryObjective(nn.Module):
    """Next-token and diffusion loss on whole stories; each image is conditioned on everything before it.

    Probes, which are dropped after training, predict the scene's attributes from the visual tokens, and from the LLM's
    hidden state at the start-of-image token as far as the text and the earlier images determine them. The prompt
    embeddings are regressed to the `ConditioningTargets` with which the U-Net was pretrained, the MMFS residuals to the
    `MMFSTargets`. Frozen blocks have no losses.

    Args:
        blocks: by name; those with parameters that require gradients are trained.
        scheduler: settings of the noise schedule.
        with_image_loss: adds the diffusion loss to that of the text.
    """

    def __init__(self, blocks: dict[str, nn.Module], scheduler: dict, with_image_loss: bool = True):
        super().__init__()
        self.encoder, self.llm = blocks["encoder"], blocks["llm"]
        self.synchronizer, self.unet = blocks["synchronizer"], blocks["unet"] if with_image_loss else None
        self.noise_scheduler = make_scheduler("ddpm", scheduler)
        c = self.synchronizer.config
        self.token_probe = self.text_probe = None
        if is_trained(self.encoder):
            self.token_probe = token_probe(self.encoder)
            self.pooled_map_probe = nn.Linear(self.encoder.config.hidden_size, sum(NUM_CLASSES))
        if is_trained(self.llm):
            self.text_probe = nn.Linear(c.llm_hidden_size, sum(NUM_CLASSES))
            self.coref_probe = nn.Linear(c.llm_hidden_size, len(REFERENTS))
        self.cond_targets = ConditioningTargets(c.perceiver.num_queries, c.perceiver.hidden_size)
        self.mmfs_targets = MMFSTargets(c.block_channels)

    def forward(self, batch: StoryBatch | TextBatch, latents=None, foreground_mask=None) -> dict[str, torch.Tensor]:
        """The image loss needs `latents` (N, P, C, h, w), scaled, and `foreground_mask` (N, P, 1, h, w)."""
        if isinstance(batch, TextBatch):
            return self.text_losses(batch)
        losses = {}
        with torch.set_grad_enabled(self.token_probe is not None and torch.is_grad_enabled()):
            features = self.encoder(batch.images.flatten(0, 1))
        maps = [m.unflatten(0, batch.images.shape[:2]) for m in features.feature_maps]
        if self.token_probe is not None:
            labels = batch.image_labels.flatten(0, 1)
            losses["token_attr"] = attribute_loss(self.token_probe(features.visual_tokens.flatten(1)), labels)
            pooled = self.pooled_map_probe(pooled_map_features(features.feature_maps))
            losses["pooled_map_attr"] = attribute_loss(pooled, appearance_labels(labels))
        prompt_embeds, llm_losses = self.prompt_embeds(batch, features, maps)
        losses |= llm_losses
        if batch.has_image_loss and self.unet is not None:
            losses |= self.image_losses(batch, prompt_embeds, maps, latents, foreground_mask)
        return {"loss": sum(LOSS_WEIGHTS[name] * error for name, error in losses.items()), **losses}

    def prompt_embeds(self, batch: StoryBatch, features, maps) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Returns the prompt embeddings (P * N, tokens, width) of all images, and the losses of LLM and conditioner."""
        losses = {}
        has_probes = (self.token_probe or self.text_probe) is not None
        with torch.set_grad_enabled(has_probes and torch.is_grad_enabled()):
            inputs_embeds = self.llm.embed_inputs(batch.input_ids, features.visual_tokens.flatten(0, 1))
            hidden_states = self.llm(inputs_embeds, self.llm.project_images(maps), batch.image_mask)
        if self.text_probe is not None:
            logits = self.llm.logits(hidden_states).float()
            losses["text"] = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
        if not batch.has_image_loss:
            return None, losses
        n, p = batch.soi_positions.shape
        contexts = [hidden_states[i, : batch.soi_positions[i, j] + 1] for j in range(p) for i in range(n)]
        prompt_embeds = self.synchronizer.conditioner.prompt_embeds(contexts)
        labels = image_major(batch.inferable_labels)
        losses["cond_mse"], losses["cond_attr"] = self.cond_targets.losses(prompt_embeds, labels)
        if self.text_probe is not None:
            last = torch.stack([context[-1] for context in contexts])
            losses["text_attr"] = attribute_loss(self.text_probe(last), labels)
            losses["coref"] = self.coref_loss(last, image_major(batch.referents))
        return prompt_embeds, losses

    def text_losses(self, texts: TextBatch) -> dict[str, torch.Tensor]:
        """Returns the coreference loss of texts without images, at every token.

        Whether a name is the first or the second of two depends on words alone; among the other losses on whole stories
        it is learned very late.
        """
        hidden_states = self.llm(self.llm.embed_inputs(texts.input_ids))
        error = self.coref_loss(hidden_states.flatten(0, 1), texts.referents.flatten())
        return {"loss": LOSS_WEIGHTS["coref"] * error, "text_coref": error}

    def coref_loss(self, hidden_states, referents) -> torch.Tensor:
        """Cross-entropy of the referent predicted from the LLM's hidden states (N, hidden_size)."""
        logits = self.coref_probe(hidden_states).float()
        error = F.cross_entropy(logits, referents, ignore_index=IGNORE_INDEX, reduction="sum")
        return error / (referents != IGNORE_INDEX).sum().clamp(1)

    def image_losses(self, batch: StoryBatch, prompt_embeds, maps, latents, foreground_mask) -> dict[str, torch.Tensor]:
        """Returns the diffusion loss of all images, each with those before it as context, and that of the residuals."""
        num_noises = NOISES_PER_IMAGE if self.training else 1
        mmfs_net = self.synchronizer.mmfs_module
        maps, image_mask = previous_images(maps, self.synchronizer.config.num_context_images, self.training)
        labels = image_major(batch.image_labels).masked_fill(~image_mask.any(1, keepdim=True), IGNORE_INDEX)
        recorder = RecordingMMFS(mmfs_net, len(mmfs_net.mmfs_down_blocks))
        prompt_embeds, latents, foreground_mask = (
            x.repeat(num_noises, *[1] * (x.ndim - 1))
            for x in (prompt_embeds, image_major(latents), image_major(foreground_mask))
        )
        with attach_mmfs(self.unet, recorder, mmfs_net.project_images(maps, image_mask)):
            image = diffusion_loss(
                self.unet,
                self.noise_scheduler,
                self.synchronizer.conditioner.neg_prompt_embeds,
                prompt_embeds,
                latents,
                self.training,
                foreground_mask if self.training else None,
            )
        targets = (target.repeat(num_noises, 1)[:, :, None, None] for target in self.mmfs_targets(labels))
        errors = [
            (recorder.residuals[index].float() / MMFS_TARGET_SCALE - target).pow(2).mean()
            for index, target in enumerate(targets)
        ]
        return {"image": image, "mmfs_mse": sum(errors) / len(errors) / MMFSTargets.STD**2}


class MMFSObjective(nn.Module):
    """Regression of the MMFS blocks' residuals to the `MMFSTargets` of the image to come.

    The queries are the skips of the U-Net as it is, conditioned on `ConditioningTargets`; only some positions are
    computed, because all of them would cost as much as the U-Net.
    """

    NUM_POSITIONS = 16  # of each block's grid
    COAT_WEIGHT = (
        3.0  # extra loss weight in the span of the coats: the prompt embeddings have a lone hero's other looks
    )

    def __init__(self, blocks: dict[str, nn.Module], scheduler: dict):
        super().__init__()
        self.encoder, self.unet, self.synchronizer = blocks["encoder"], blocks["unet"], blocks["synchronizer"]
        self.noise_scheduler = make_scheduler("ddpm", scheduler)
        c = self.synchronizer.config
        self.cond_targets = ConditioningTargets(c.perceiver.num_queries, c.perceiver.hidden_size)
        self.mmfs_targets = MMFSTargets(c.block_channels)
        self.coat_bases = self.mmfs_targets.coat_bases()

    def forward(self, batch: StoryBatch, latents) -> dict[str, torch.Tensor]:
        """`latents`: (N, P, C, h, w) of the batch's images, scaled."""
        pairs = self.predictions_and_targets(batch, latents)
        errors = [(pred - target) / MMFSTargets.STD for pred, target in pairs]
        mse = sum(error.pow(2).mean() for error in errors) / len(errors)
        coat_errors = [
            error.movedim(1, -1).matmul(basis.to(error)).pow(2).sum(-1).mean() / error.shape[1]
            for error, basis in zip(errors, self.coat_bases)
        ]
        coat_mse = sum(coat_errors) / len(coat_errors)
        return {"loss": mse + self.COAT_WEIGHT * coat_mse, "mmfs_mse": mse, "coat_mse": coat_mse}

    def predictions_and_targets(self, batch: StoryBatch, latents) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns, for each block, the residuals (P * N, C, positions, 1) and their targets (P * N, C, 1, 1)."""
        maps = self.encoder(batch.images.flatten(0, 1)).feature_maps
        maps = [m.unflatten(0, batch.images.shape[:2]) for m in maps]
        maps, image_mask = previous_images(maps, self.synchronizer.config.num_context_images, self.training)
        labels = image_major(batch.image_labels).masked_fill(~image_mask.any(1, keepdim=True), IGNORE_INDEX)
        mmfs_net = self.synchronizer.mmfs_module
        image_values, targets = mmfs_net.project_images(maps, image_mask), self.mmfs_targets(labels)
        queries = self.queries(image_major(latents), self.cond_targets(image_major(batch.inferable_labels)))
        pairs = []
        for index, (block, target) in enumerate(zip(mmfs_net.blocks, targets)):
            x, size = queries[index], tuple(queries[index].shape[-2:])
            positions = torch.randperm(size[0] * size[1], device=x.device)[: self.NUM_POSITIONS]
            pos_embed = interpolate_pos_embed(block.pos_embed, size).to(x)
            reference_points = get_reference_points(size).to(x.device)
            x = x.flatten(2)[..., positions].unsqueeze(-1)
            values = image_values.blocks[index]
            pred = block(x, values, image_mask, pos_embed[..., positions, :], reference_points[positions])
            pairs.append((pred.float(), target[:, :, None, None]))
        return pairs

    @torch.no_grad()
    def rescale_to_targets(self, batches, scale: float = MMFS_TARGET_SCALE) -> list[float]:
        """Scales each block so that its residuals, projected on the targets, are `scale` times as large.

        Least squares shrink a residual that is uncertain, as it often is after generated images, and a U-Net that gets
        half of a coat's residual does not draw half of that coat but another one.

        Args:
            batches: arguments of `forward`.

        Returns:
            The factor of each block.
        """
        blocks = self.synchronizer.mmfs_module.blocks
        sums = torch.zeros(len(blocks), 2)
        for batch, latents in batches:
            for index, (pred, target) in enumerate(self.predictions_and_targets(batch, latents)):
                sums[index] += torch.stack([(pred * target).mean(), target.pow(2).mean()]).cpu()
        factors = (scale * sums[:, 1] / sums[:, 0]).tolist()
        for block, factor in zip(blocks, factors):
            for parameter in block.conv.parameters():
                parameter.mul_(factor)
        return factors

    @torch.no_grad()
    def queries(self, latents, prompt_embeds) -> list[torch.Tensor]:
        """Returns the U-Net's skips and middle features (N, C, h, w) at random timesteps: the queries of the blocks."""
        timesteps = torch.randint(
            self.noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
        )
        noisy_latents = self.noise_scheduler.add_noise(latents, torch.randn_like(latents), timesteps)
        recorder = RecordingMMFS(None, len(self.synchronizer.mmfs_module.mmfs_down_blocks))
        with attach_mmfs(self.unet, recorder, None):
            self.unet(noisy_latents, timesteps, encoder_hidden_states=prompt_embeds)
        return [recorder.queries[index] for index in range(len(self.synchronizer.mmfs_module.blocks))]


def previous_images(
    maps, num_context_images: int, random_length: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gathers the context images of every image: the last `num_context_images` before it, or at random fewer.

    Args:
        maps: the encoder's feature maps, each (N, P, C, h, w).

    Returns:
        Maps (P * N, context, C, h, w), image-major, and the mask of those that exist: bool (P * N, context).
    """
    n, p = maps[0].shape[:2]
    length = min(num_context_images, p - 1)
    if random_length and length > 1:
        length = int(torch.multinomial(torch.tensor([4.0, 3, 2, 1][:length]), 1)) + 1
    indices = torch.arange(p).view(p, 1) - torch.arange(length, 0, -1)  # (P, context), oldest first
    image_mask = (indices >= 0).to(maps[0].device)
    indices = indices.clamp(min=0).to(maps[0].device)
    context_maps = [m[:, indices].transpose(0, 1).flatten(0, 1) for m in maps]
    return context_maps, image_mask.repeat_interleave(n, dim=0)


class RecordingMMFS:
    """Wraps a `MMFSNet` and records the queries and the residuals of its blocks, by index.

    Args:
        mmfs_net: None records the queries and adds nothing.
        num_skips: number of blocks without the middle one.
    """

    def __init__(self, mmfs_net, num_skips: int):
        self.mmfs_net, self.mmfs_down_blocks = mmfs_net, range(num_skips)
        self.queries: dict[int, torch.Tensor] = {}
        self.residuals: dict[int, torch.Tensor] = {}

    def add_residual(self, index: int, x, image_values, scale: float = 1.0):
        self.queries[index] = x
        if self.mmfs_net is None:
            return x
        out = self.mmfs_net.add_residual(index, x, image_values, scale)
        self.residuals[index] = out - x
        return out


def is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def image_major(x: torch.Tensor) -> torch.Tensor:
    """(N, P, ...) of N stories -> (P * N, ...): the first image of every story, then the second of every story."""
    return x.transpose(0, 1).flatten(0, 1)
