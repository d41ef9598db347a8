"""What is learned: modules whose forward takes a batch and gives losses (paper 3.3; `MMInterleaved.forward`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..drawing import make_scheduler, sites_attached
from .data import Batch
from .labels import IGNORE, SIZES, Codes, guide

WEIGHTS = {"text": 1.0, "image": 10.0, "sees": 0.2, "knows": 0.2, "says": 0.2, "code": 1.0}  # text, image: the paper's
UNCONDITIONAL = 0.1
FORGOTTEN = 0.1  # of what a drawing could be told, in learning to draw
LOOKS_FORGOTTEN = 0.5  # of the drawings that are not told how heroes look, so that their synchronizers learn to look
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
        losses = pixel_errors(found, wanted)
        size = latents.float().pow(2).mean()
        return {"loss": sum(losses.values()) + 0.01 * (size - 1).pow(2), **losses, "latent_size": size}


class LearnToSee(nn.Module):
    """What a picture shows, read by guides that are left behind: from the visual tokens, and from the finest maps.

    The ViT hears of the adapter's convolutions through gates that begin at zero, so these learn far sooner when they
    are asked themselves; and the synchronizers read the maps.
    """

    MAPS = 3  # of the four; each is read on a grid of at most this side
    SIDE = 8

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.tokens = sight(encoder)
        self.maps = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveMaxPool2d(self.SIDE), nn.Conv2d(encoder.config.width, 32, 1), nn.ReLU(), nn.Flatten(),
                nn.Linear(32 * self.SIDE**2, 256), nn.ReLU(), nn.Linear(256, sum(SIZES)),
            )
            for _ in range(self.MAPS)
        )  # fmt: skip

    def forward(self, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pictures (N, 3, side, side) in [0, 1], labels (N, heads)."""
        features = self.encoder(pictures)
        tokens = guide(self.tokens(features.tokens.flatten(1)), labels)
        read = [guide(reader(found), labels) for reader, found in zip(self.maps, features.maps)]
        return {"loss": tokens + sum(read) / len(read), "tokens": tokens, "maps": sum(read) / len(read)}


class LearnDetail(nn.Module):
    """The decoder half of a VAE, so that the encoder sees in what it makes of latents what it sees in the picture.

    A face far away is a few pixels, and errors of pixels hardly miss it; features that were learned by telling faces
    and tools apart do (Johnson et al. 2016). Latents stay as they are, and with them what a U-Net knows, so this can be
    done at any time; they get noise, as what a U-Net draws is never quite clean.
    """

    NOISE = 0.15  # at most, in units of the latents' size

    def __init__(self, vae, encoder):
        super().__init__()
        self.vae, self.encoder = vae, encoder

    def forward(self, latents: torch.Tensor, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """latents (N, 4, h, w), scaled, of pictures (N, 3, side, side) in [0, 1]."""
        if self.training:
            size = torch.rand(len(latents), 1, 1, 1, device=latents.device) * self.NOISE
            latents = latents + torch.randn_like(latents) * size
        found = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        losses = pixel_errors(found, pictures * 2 - 1)
        with torch.no_grad():
            true = self.encoder(pictures)
        seen = self.encoder((found / 2 + 0.5).contiguous(memory_format=torch.channels_last))
        errors = [relative_error(a, b) for a, b in zip((seen.tokens, *seen.maps), (true.tokens, *true.maps))]
        losses["seen"] = sum(errors) / len(errors)
        return {"loss": sum(losses.values()), **losses}


def pixel_errors(found: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 and L2 of pixels, and L1 of their differences, so that edges stay edges."""
    return {
        "pixels": (found - wanted).abs().mean(),
        "squares": (found - wanted).pow(2).mean(),
        "edges": sum((found.diff(dim=d) - wanted.diff(dim=d)).abs().mean() for d in (-1, -2)),
    }


def relative_error(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Mean square of found - true, in units of true's variance."""
    return (found - true).pow(2).mean() / true.var().clamp(min=1e-6)


class LearnToDraw(nn.Module):
    """Drawing from `Codes`, before there is an LLM to say what to draw: the U-Net alone."""

    def __init__(self, unet, decoder, scheduler: dict):
        super().__init__()
        self.unet, self.noise = unet, make_scheduler("ddpm", scheduler)
        self.negative = decoder.negative
        self.codes = Codes(decoder.config.resampler.queries, decoder.config.resampler.width)

    def forward(self, latents: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """latents (N, 4, h, w), scaled; labels (N, heads) of what they show."""
        if self.training:
            labels = labels.masked_fill(torch.rand(labels.shape, device=labels.device) < FORGOTTEN, IGNORE)
        states = self.codes(labels)
        return {"loss": diffusion_error(self.unet, self.noise, self.negative, states, latents, self.training)}


def sight(encoder) -> nn.Linear:
    """A guide that reads from all visual tokens together what their picture shows."""
    return nn.Linear(encoder.config.resampler.queries * encoder.config.out_width, sum(SIZES))


def diffusion_error(unet, noise_schedule, negative, states, latents, training: bool) -> torch.Tensor:
    """Mean squared error of what the U-Net predicts of noised latents (N, 4, h, w), told `states`.

    What that is is a matter of the schedule's kind. `epsilon`: the noise, as in the reference. `v_prediction`
    (Salimans and Ho 2022, section 4): the same model, with the errors of its clean picture weighed evenly; made from
    nothing, it learns far sooner what to draw.
    """
    if training:
        dropped = torch.rand(len(states), 1, 1, device=states.device) < UNCONDITIONAL
        states = torch.where(dropped, negative.to(states), states)
    noise = torch.randn_like(latents)
    times = torch.rand(len(latents), device=latents.device)
    if training:  # faces and tools are decided in the middle: half of the draws are from there
        times = torch.where(torch.rand_like(times) < 0.5, times, 0.1 + 0.5 * times)
    times = (times * noise_schedule.config.num_train_timesteps).long()
    found = unet(noise_schedule.add_noise(latents, noise, times), times, encoder_hidden_states=states).sample
    wanted = noise
    if noise_schedule.config.prediction_type == "v_prediction":
        wanted = noise_schedule.get_velocity(latents, noise, times)
    return F.mse_loss(found.float(), wanted.float())


class LearnStories(nn.Module):
    """Next token and noise prediction on whole stories, each panel in view of all before it.

    Args:
        blocks: by name; those to be trained have parameters that require gradients.
        scheduler: settings of the noise schedule.
        draws: whether the diffusion loss is learned beside the text's.

    Beside them, guides read what a scene has (`labels.HEADS`), as far as the text and the panels before tell it: from
    the visual tokens and from the LLM's state at the start-of-image token. And the states that condition the U-Net are
    drawn towards the `Codes` that it has learned to draw from. Guides and codes are left behind when training is done.
    If encoder and LLM stand still, there are no guides and there is no loss of text: they would teach nobody.
    """

    def __init__(self, blocks: dict[str, nn.Module], scheduler: dict, draws: bool = True):
        super().__init__()
        self.encoder, self.llm = blocks["encoder"], blocks["llm"]
        self.decoder, self.unet = blocks["synchronizer"], blocks["unet"] if draws else None
        self.noise = make_scheduler("ddpm", scheduler)
        self.draws = draws
        c = self.decoder.config
        self.reads = any(q.requires_grad for block in (self.encoder, self.llm) for q in block.parameters())
        if self.reads:
            self.sees, self.knows = sight(self.encoder), nn.Linear(c.llm_width, sum(SIZES))
        self.codes = Codes(c.resampler.queries, c.resampler.width)

    def forward(self, batch: Batch, latents: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`latents`: (N, P, 4, h, w) of the batch's pictures, scaled; needed to draw."""
        n, p = batch.pixels.shape[:2]
        losses = {}
        with torch.set_grad_enabled(self.reads and torch.is_grad_enabled()):
            features = self.encoder(batch.pixels.flatten(0, 1))
            maps = [m.unflatten(0, (n, p)) for m in features.maps]
            x = self.llm.embed(batch.ids, features.tokens.flatten(0, 1))
            hidden = self.llm(x, self.llm.prepare(maps), batch.visible)
        if self.reads:
            logits = self.llm.logits(hidden).float()
            losses["text"] = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
            losses["sees"] = guide(self.sees(features.tokens.flatten(1)), batch.shown.flatten(0, 1))
        if batch.draws:
            states, told = self.tell(batch, hidden)
            losses |= told
            if self.draws:
                losses["image"] = self.draw(states, maps, latents)
        return {"loss": sum(WEIGHTS[name] * error for name, error in losses.items()), **losses}

    def tell(self, batch: Batch, hidden) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What conditions the drawing of every picture of every story, and the errors of guide and codes.

        Drawings are ordered picture by picture: the p-th of every story, then the next.
        """
        n, p = batch.starts.shape
        contexts = [hidden[i, : batch.starts[i, j] + 1] for j in range(p) for i in range(n)]
        states = self.decoder.condition(contexts)
        labels = batch.labels.transpose(0, 1).flatten(0, 1)
        code, says = self.codes.error(states, labels)
        losses = {"says": says, "code": code}
        if self.reads:
            losses["knows"] = guide(self.knows(torch.stack([context[-1] for context in contexts])), labels)
        return states, losses

    def draw(self, states, maps, latents) -> torch.Tensor:
        """The diffusion error for every picture of every story, each in view of those before it."""
        count = NOISES if self.training else 1
        prepared = self.decoder.prepare(*self.seen(maps))
        wanted = latents.transpose(0, 1).flatten(0, 1).repeat(count, 1, 1, 1)
        states = states.repeat(count, 1, 1)
        if self.training:
            forgotten = torch.rand(len(states), 1, 1, device=states.device) < LOOKS_FORGOTTEN
            states = torch.where(forgotten, self.codes.without_looks(states), states)
        with sites_attached(self.unet, self.decoder, prepared):
            return diffusion_error(self.unet, self.noise, self.decoder.negative, states, wanted, self.training)

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
