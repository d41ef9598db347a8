"""What is learned: modules whose forward takes a batch and gives losses (paper 3.3; `MMInterleaved.forward`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..drawing import make_scheduler, sites_attached
from .data import IGNORE, Batch
from .labels import HEADS

IMAGE_WEIGHT = 10.0  # of the noise prediction's loss beside the text's
UNCONDITIONAL = 0.1
GUIDE_WEIGHT = 0.2
NOISES = 2  # of each picture in a batch: what it is told and looks at is made once for them


class LearnVAE(nn.Module):
    """Reconstruction of pictures through AutoencoderTiny's latents.

    L1 and L2 on pixels, L1 on their differences, so that edges stay edges; noise on the latents, so that near latents
    mean near pictures; a pull to unit size, so that a diffusion model finds them as it expects them.
    """

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """pictures (N, 3, side, side) in [0, 1]."""
        wanted = pictures * 2 - 1
        latents = self.vae.encode(wanted).latents
        noise = torch.randn_like(latents) * 0.05 if self.training else 0
        found = self.vae.decode(latents + noise).sample
        pixels = (found - wanted).abs().mean()
        squares = (found - wanted).pow(2).mean()
        edges = sum((found.diff(dim=d) - wanted.diff(dim=d)).abs().mean() for d in (-1, -2))
        size = latents.float().pow(2).mean()
        return {
            "loss": pixels + squares + edges + 0.01 * (size - 1).pow(2),
            "pixels": pixels,
            "edges": edges,
            "latent_size": size,
        }


class LearnStories(nn.Module):
    """Next token and noise prediction on whole stories, each panel in view of all before it.

    Args:
        blocks: by name; those to be trained have parameters that require gradients.
        scheduler: settings of the noise schedule.
        texts, draws: which of the two losses.

    Beside them, `guides` read what a scene has (`labels.HEADS`), as far as the text and the panels before tell it, from
    the LLM's state at the start-of-image token and from the mean of the states that condition the U-Net; so these say
    it before the U-Net has learned to listen. The guides are left behind when training is done.
    """

    def __init__(self, blocks: dict[str, nn.Module], scheduler: dict, texts: bool = True, draws: bool = True):
        super().__init__()
        self.encoder, self.llm = blocks["encoder"], blocks["llm"]
        self.decoder, self.unet = blocks["synchronizer"], blocks["unet"] if draws else None
        self.noise = make_scheduler("ddpm", scheduler)
        self.texts, self.draws = texts, draws
        c, classes = self.decoder.config, sum(map(len, HEADS.values()))
        self.guides = nn.ModuleList([nn.Linear(c.llm_width, classes), nn.Linear(c.resampler.width, classes)])

    def forward(self, batch: Batch, latents: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`latents`: (N, P, 4, h, w) of the batch's pictures, scaled; needed to draw."""
        n, p = batch.pixels.shape[:2]
        reads = any(q.requires_grad for block in (self.encoder, self.llm) for q in block.parameters())
        with torch.set_grad_enabled(reads and torch.is_grad_enabled()):
            features = self.encoder(batch.pixels.flatten(0, 1))
            maps = [m.unflatten(0, (n, p)) for m in features.maps]
            x = self.llm.embed(batch.ids, features.tokens.flatten(0, 1))
            hidden = self.llm(x, self.llm.prepare(maps), batch.visible)
        losses = {}
        if self.texts:
            logits = self.llm.logits(hidden).float()
            losses["text"] = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        if batch.draws:
            states, losses["guide"] = self.tell(batch, hidden)
            if self.draws:
                losses["image"] = self.draw(states, maps, latents)
        total = losses.get("text", 0) + IMAGE_WEIGHT * losses.get("image", 0) + GUIDE_WEIGHT * losses.get("guide", 0)
        return {"loss": total, **losses}

    def tell(self, batch: Batch, hidden) -> tuple[torch.Tensor, torch.Tensor]:
        """What conditions the drawing of every picture of every story, and the guides' error.

        Drawings are ordered picture by picture: the p-th of every story, then the next.
        """
        n, p = batch.starts.shape
        contexts = [hidden[i, : batch.starts[i, j] + 1] for j in range(p) for i in range(n)]
        states = self.decoder.condition(contexts)
        said = torch.stack([context[-1] for context in contexts]), states.mean(1)
        labels = batch.labels.transpose(0, 1).flatten(0, 1)
        return states, sum(self.guide(guide(x.float()), labels) for guide, x in zip(self.guides, said))

    def draw(self, states, maps, latents) -> torch.Tensor:
        """Mean squared error of what the U-Net predicts for every picture of every story.

        What that is is a matter of the schedule's kind. `epsilon`: the noise, as in the reference. `v_prediction`
        (Salimans and Ho 2022, section 4): the same model, with the errors of its clean picture weighed evenly; made
        from nothing, it learns far sooner what to draw.
        """
        count = NOISES if self.training else 1
        states = states.repeat(count, 1, 1)
        if self.training:
            dropped = torch.rand(len(states), 1, 1, device=states.device) < UNCONDITIONAL
            states = torch.where(dropped, self.decoder.negative.to(states), states)
        prepared = self.decoder.prepare(*self.seen(maps))
        wanted = latents.transpose(0, 1).flatten(0, 1).repeat(count, 1, 1, 1)
        noise = torch.randn_like(wanted)
        times = torch.rand(len(wanted), device=wanted.device)
        if self.training:  # what a picture shows is decided early: half of the draws are of the noisier two fifths
            times = torch.where(torch.rand_like(times) < 0.5, times, 0.6 + 0.4 * times)
        times = (times * self.noise.config.num_train_timesteps).long()
        noisy = self.noise.add_noise(wanted, noise, times)
        with sites_attached(self.unet, self.decoder, prepared):
            found = self.unet(noisy, times, encoder_hidden_states=states).sample
        if self.noise.config.prediction_type == "v_prediction":
            noise = self.noise.get_velocity(wanted, noise, times)
        return F.mse_loss(found.float(), noise.float())

    @staticmethod
    def guide(logits, labels) -> torch.Tensor:
        """The summed cross-entropy of all heads (N, their classes), over the labels (N, heads) that can be known."""
        total = 0
        for found, wanted in zip(logits.split([len(values) for values in HEADS.values()], dim=-1), labels.T):
            error = F.cross_entropy(found, wanted, ignore_index=IGNORE, reduction="sum")
            total = total + error / (wanted != IGNORE).sum().clamp(1)
        return total

    def seen(self, maps) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The pictures that each drawing looks at: of those before it the last few, in training at random how many.

        Args:
            maps: the encoder's, each (N, P, C, h, w).

        Returns:
            Maps (P * N, most, C, h, w), picture by picture, and which of them count: bool (P * N, most).
        """
        n, p = maps[0].shape[:2]
        most = min(self.decoder.config.look_back, p - 1)
        if self.training and most > 1:
            most = int(torch.multinomial(torch.tensor([4.0, 3, 2, 1][:most]), 1)) + 1
        before = torch.arange(p).view(p, 1) - torch.arange(most, 0, -1)  # (P, most), oldest first
        shown = (before >= 0).to(maps[0].device)
        before = before.clamp(min=0).to(maps[0].device)
        taken = [m[:, before].transpose(0, 1).flatten(0, 1) for m in maps]
        return taken, shown.repeat_interleave(n, dim=0)
