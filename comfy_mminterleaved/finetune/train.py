"""The training loop: AdamW on the LoRA's weights, resumable, one file at its end."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import OutputError, SettingError, is_out_of_memory
from ..files import apply_umask, atomic_path, ensure_writable_dir, friendly_errors
from ..stories.story import Story
from .dataset import Panel, story_panels
from .lora import LAYERS, TrainableLoRA, import_peft, story_lora_tensors
from .objective import FinetuneObjective

if TYPE_CHECKING:
    from ..pipeline import MMInterleavedPipeline

WARMUP, COOLDOWN = 50, 0.3  # steps, and the share of the steps in which the learning rate falls
MAX_GRAD_NORM = 1.0
SAVE_SECONDS = 30.0  # between states to resume from


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of fine-tuning.

    Args:
        steps: Half of them learn from texts, half from images.
        batch_size: Panels per step.
        rank: Of the LoRA's matrices.
        reconstruction_weight: How much reading and drawing correct each other (2212.12249); 0 turns it off.
        blocks: That get a LoRA: "llm", "unet" or both.
        seed: Of the batches, the noise and the LoRA's first weights.
    """

    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 5e-4
    rank: int = 4
    reconstruction_weight: float = 1.0
    blocks: tuple[str, ...] = ("llm", "unet")
    seed: int = 0

    def __post_init__(self):
        limits = {"steps": (1, 10**6), "batch_size": (1, 256), "rank": (1, 256), "seed": (0, 2**63 - 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SettingError(f"{name} must be a whole number from {low} to {high}, not {value!r:.60}.")
        for name, high in (("learning_rate", 1.0), ("reconstruction_weight", 100.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= high or (name == "learning_rate" and not value):
                raise SettingError(f"{name} must be a number from 0 to {high:g}, not {value!r:.60}.")
        if not self.blocks or set(self.blocks) - set(LAYERS):
            raise SettingError(f"blocks must be of {', '.join(LAYERS)}, not {self.blocks!r:.60}.")


def finetune(
    pipeline: MMInterleavedPipeline,
    stories: Sequence[Story],
    out: str | Path,
    config: FinetuneConfig = FinetuneConfig(),
    on_step: Callable[[int, int, dict[str, float]], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains a LoRA on stories and writes it to `out`, a .safetensors file for `load_lora` and for ComfyUI.

    The state to resume from is beside it, named `out` with .state, until the last step is done. The pipeline itself
    stays as it is.

    Args:
        on_step: Called with the steps done, their number, and the step's losses.
        should_stop: Asked after each step; if true, the state is kept and training ends.

    Returns:
        Whether the last step is done.

    Raises:
        StoryError: If the stories have no image with a text before it.
        StoryTooLongError: If the LLM cannot hold one of the stories.
        SettingError: For a checkpoint beside `out` of other stories, settings or weights, or a model that cannot be
            trained.
        OutputError: If `out` exists or cannot be written.
    """
    out = check_output(out)
    panels = story_panels(stories)
    for panel in panels:
        pipeline.text.truncate_to_context(panel.story, 1, None)
    if pipeline.placement is not None:
        raise SettingError("The model must fit the card as a whole to be trained; this one takes turns on it.")
    if pipeline.has_lora:
        raise SettingError("The model has a LoRA already; call unload_lora before it is trained.")
    run = _Run(pipeline, panels, out, config)
    try:
        return run.train(on_step, should_stop)
    finally:
        run.close()


def check_output(out: str | Path) -> Path:
    """The file to write, its folder made; raises OutputError, and SettingError if peft is missing."""
    import_peft()
    out = Path(out)
    if out.suffix != ".safetensors":
        raise OutputError(f"The LoRA must be written to a .safetensors file, not to {out.name!r:.80}.")
    if out.exists():
        raise OutputError(f"{str(out)!r} already exists; choose another name.")
    ensure_writable_dir(out.parent)
    return out


class _Run:
    def __init__(self, pipeline: MMInterleavedPipeline, panels: list[Panel], out: Path, config: FinetuneConfig):
        self.pipeline, self.panels, self.out, self.config = pipeline, panels, out, config
        self.state_path = out.with_suffix(".state")
        state = self._read_state()
        modules = {"llm": pipeline.llm, "unet": pipeline.unet}
        self.loras: dict[str, TrainableLoRA] = {}
        self.frozen = [
            p for block in (pipeline.encoder, pipeline.synchronizer, pipeline.vae) for p in block.parameters()
        ]
        self.frozen = [p for p in self.frozen if p.requires_grad]
        for p in self.frozen:
            p.requires_grad_(False)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                for block in config.blocks:
                    self.loras[block] = TrainableLoRA(modules[block], LAYERS[block], config.rank, f"The {block}")
        except BaseException:
            self.close()
            raise
        self.parameters = {
            f"{block}.{name}": p for block, lora in self.loras.items() for name, p in lora.parameters.items()
        }
        self.optimizer = torch.optim.AdamW(self.parameters.values(), config.learning_rate, weight_decay=0.0)
        self.objective = FinetuneObjective(pipeline, config.reconstruction_weight)
        self.step = 0
        if state is not None:
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    @property
    def fingerprint(self) -> str:
        """Of the settings, the panels and the model's weights."""
        about = [asdict(self.config), self.pipeline.encoder.encoder_id]
        for weight in (self.pipeline.llm.soi_token, self.pipeline.unet.conv_out.weight):
            data = weight.detach().half().cpu().numpy().tobytes()
            about.append(hashlib.blake2b(data, digest_size=16).hexdigest())
        about += [[panel.story.text, panel.caption, panel.image.digest] for panel in self.panels]
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()

    def _read_state(self) -> dict | None:
        if not self.state_path.exists():
            return None
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
            fingerprint = state["fingerprint"]
        except OSError as error:
            raise SettingError(f"{str(self.state_path)!r} cannot be read: {error.strerror or error}.") from None
        except (pickle.UnpicklingError, KeyError, TypeError, EOFError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise SettingError(
                f"{str(self.state_path)!r} is not a checkpoint of a fine-tuning run; move it away, or choose another "
                "name."
            ) from None
        if fingerprint != self.fingerprint:
            raise SettingError(
                f"{str(self.state_path)!r} is of other stories, settings or weights; choose another name, or "
                "delete it to start anew."
            )
        return state

    def train(self, on_step, should_stop) -> bool:
        total, saved = self.config.steps, time.monotonic()
        with torch.random.fork_rng():
            while self.step < total:
                losses = self._step()
                self.step += 1
                if on_step is not None:
                    on_step(self.step, total, losses)
                stopped = should_stop() and self.step < total
                if stopped or time.monotonic() - saved > SAVE_SECONDS:
                    self._save_state()
                    saved = time.monotonic()
                if stopped:
                    return False
        self._save()
        return True

    def _step(self) -> dict[str, float]:
        seed = (self.config.seed * 1_000_003 + self.step) % 2**63
        torch.manual_seed(seed)
        rng = random.Random(seed)
        count = min(self.config.batch_size, len(self.panels))
        batch = rng.sample(self.panels, count)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self._schedule()
        self.optimizer.zero_grad()
        learns_from_images = "llm" in self.loras or self.config.reconstruction_weight  # else captions teach nobody
        if self.step % 2 and learns_from_images:
            losses = self.objective.from_images(batch)
        else:
            losses = self.objective.from_texts(batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not math.isfinite(values["loss"]):
            raise SettingError(f"The loss is not a number at step {self.step + 1}; lower learning_rate.")
        return values

    def _schedule(self) -> float:
        """The learning rate's factor: linear warm-up, constant, linear decay."""
        steps = self.config.steps
        rise = (self.step + 1) / min(WARMUP, steps)
        return min(1.0, rise, max(0.02, (steps - self.step) / (COOLDOWN * steps)))

    def _save_state(self) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        with friendly_errors(self.state_path, "The checkpoint"), atomic_path(self.state_path) as temp_path:
            torch.save(state, temp_path)

    def _save(self) -> None:
        from safetensors.torch import save_file

        parts = ((block, lora.parameters) for block, lora in self.loras.items())
        tensors = {key: t.detach().half().cpu().contiguous() for key, t in story_lora_tensors(parts).items()}
        about = {f.name: str(getattr(self.config, f.name)) for f in fields(self.config)}
        with friendly_errors(self.out, "The LoRA"), atomic_path(self.out) as temp_path:
            save_file(tensors, temp_path, {"mm_interleaved": json.dumps({"finetune": about})})
            apply_umask(temp_path)
        self.state_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Takes the LoRA out of the pipeline."""
        for lora in self.loras.values():
            lora.remove()
        for p in self.frozen:
            p.requires_grad_(True)
        self.pipeline.clear_cache()
