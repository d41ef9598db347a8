"""The training loop of every stage: accelerate, AdamW, EMA, a JSONL log, curves, checkpoints that survive anything."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from comfy_mminterleaved.errors import SettingError
from comfy_mminterleaved.files import atomic_path

from .muon import Muon


@dataclass(frozen=True)
class StageConfig:
    """One stage's settings, read from its file.

    blocks: those trained. needs: those that must be there already. steps, batch (pictures), learning_rate, warmup
    (steps), cooldown (the share of the steps in which the rate falls), weight_decay, clip, ema: as usual. seed.
    log_every, validate_every, save_every, sample_every: in steps.
    """

    name: str
    blocks: tuple[str, ...]
    needs: tuple[str, ...]
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    cooldown: float = 0.2
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 250
    sample_every: int = 2000

    @classmethod
    def read(cls, path: Path, **changes) -> StageConfig:
        data = json.loads(path.read_text(encoding="utf-8")) | {k: v for k, v in changes.items() if v is not None}
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise SettingError(f"The stage file {path.name!r} has unknown settings: {', '.join(sorted(unknown))}.")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


class EMA:
    """Exponential moving average of parameters; early on it follows faster."""

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [parameters[n].float() for n in self.average], 1 - decay)


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, level, then linear to a twentieth; no step before the fall depends on how many there will be."""
    rise = (step + 1) / stage.warmup if stage.warmup else 1.0
    fall = (stage.steps - step) / (stage.cooldown * stage.steps) if stage.cooldown else 1.0
    return stage.learning_rate * min(1.0, rise, 0.05 + 0.95 * max(0.0, fall))


def train(
    stage: StageConfig,
    learner: nn.Module,
    blocks: dict[str, nn.Module],
    folder: Path,
    get_batch: Callable[[int], tuple],
    validation: list[tuple],
    precision: str = "no",
    minutes: float | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> bool:
    """Trains to the stage's last step, or for some minutes, going on from the last checkpoint in `folder`.

    Args:
        learner: its forward gives a dict with "loss"; the parameters that require gradients are trained.
        blocks: those whose averaged weights are kept, at the end of each run in `folder`/BLOCK.safetensors.
        batch_of: (seed) -> the learner's arguments; called with a different seed for each step and process.
        validation: the learner's arguments for a few fixed batches that training does not see.
        precision: accelerate's "no", "bf16" or "fp16".
        minutes: stop after so long, at a checkpoint.
        on_sample: called with the step, with the averaged weights in the blocks.

    Returns:
        Whether the last step is done. Of several processes this ends the group: each can train once.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed

    began = time.monotonic()
    # Captions, texts and stories do not all use the same parameters.
    some = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[some])
    folder.mkdir(parents=True, exist_ok=True)
    learner = learner.to(accelerator.device)
    named = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    optimizer = Muon(named, stage.learning_rate, stage.weight_decay)
    ema = EMA(named, stage.ema)
    start = _resume(folder / "state.pt", named, optimizer, ema)
    wrapped, optimizer = accelerator.prepare(learner, optimizer)

    sums: dict[str, list[float]] = {}
    step, since = start, time.monotonic()
    for step in range(start, stage.steps):
        set_seed(stage.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        learner.train()
        losses = wrapped(*get_batch(stage.seed + step * accelerator.num_processes + accelerator.process_index))
        optimizer.zero_grad()
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(named.values(), stage.clip)
        optimizer.step()
        ema.update(named, step)
        for name, value in losses.items():
            sums.setdefault(name, []).append(float(value.detach()))
        done = step + 1
        late = minutes is not None and _in_any_process(accelerator, time.monotonic() - began > minutes * 60)
        last = late or done == stage.steps
        if not accelerator.is_main_process:
            if late:
                break
            continue
        if done % stage.log_every == 0 or last:
            record = {"step": done, "lr": learning_rate(stage, step), "seconds": round(time.monotonic() - since, 2)}
            _log(folder, record | {name: sum(v) / len(v) for name, v in sums.items()})
            sums, since = {}, time.monotonic()
        if done % stage.validate_every == 0 or last:
            with _averaged(named, ema):
                _log(folder, {"step": done, "validation": True} | validate(learner, validation, accelerator))
        if done % stage.save_every == 0 or last:
            _save(folder, done, named, optimizer, ema, blocks)
        if on_sample is not None and (done % stage.sample_every == 0 or done == stage.steps):
            with _averaged(named, ema):
                learner.eval()
                on_sample(done)
        if late:
            break
    if accelerator.is_main_process and (folder / "log.jsonl").exists():
        plot(folder)
    accelerator.wait_for_everyone()  # a process that ends while another still writes takes that one with it
    # What holds on to the group must be gone before it is destroyed, or its threads are torn down while they run.
    losses = wrapped = optimizer = None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return step + 1 >= stage.steps


def _in_any_process(accelerator, here: bool) -> bool:
    """Whether it is so in any process; all have to ask. One that stopped alone would leave the others waiting."""
    if here:
        accelerator.set_trigger()
    return accelerator.check_trigger()


@torch.no_grad()
def validate(learner: nn.Module, batches: list[tuple], accelerator) -> dict[str, float]:
    """Mean losses over fixed batches, with fixed noise."""
    learner.eval()
    sums: dict[str, list[float]] = {}
    with torch.random.fork_rng(), accelerator.autocast():
        torch.manual_seed(0)
        for batch in batches:
            for name, value in learner(*batch).items():
                sums.setdefault(name, []).append(float(value))
    return {name: sum(v) / len(v) for name, v in sums.items()}


class _averaged:
    """Within it, the parameters hold their averages."""

    def __init__(self, parameters: dict[str, torch.Tensor], ema: EMA):
        self.parameters, self.ema = parameters, ema

    @torch.no_grad()
    def __enter__(self):
        self.kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(self.ema.average[name])

    @torch.no_grad()
    def __exit__(self, *_):
        for name, p in self.parameters.items():
            p.copy_(self.kept[name])


def _resume(path: Path, parameters, optimizer, ema: EMA) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state["parameters"][name])
            ema.average[name] = state["ema"][name].to(p.device)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(folder: Path, step: int, parameters, optimizer, ema: EMA, blocks: dict[str, nn.Module]) -> None:
    """Writes the state to go on from, and the blocks' averaged weights; each aside, then renamed."""
    from safetensors.torch import save_file

    state = {
        "step": step,
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "ema": ema.average,
    }
    with atomic_path(folder / "state.pt") as temp_path:
        torch.save(state, temp_path)
    with _averaged(parameters, ema):
        for name, block in blocks.items():
            tensors = {key: t.detach().cpu().contiguous() for key, t in block.state_dict().items()}
            with atomic_path(folder / f"{name}.safetensors") as temp_path:
                save_file(tensors, temp_path)


def _log(folder: Path, record: dict) -> None:
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def plot(folder: Path) -> Path:
    """Loss curves from a stage's log: curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [k for k in records[-1] if k not in ("step", "lr", "seconds", "validation")]
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names):
        for validation, style in ((False, {"lw": 0.8, "alpha": 0.7}), (True, {"marker": ".", "lw": 1.6})):
            points = [(r["step"], r[name]) for r in records if bool(r.get("validation")) == validation and name in r]
            if points:
                axis.plot(*zip(*points), label="validation (averaged weights)" if validation else "training", **style)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(folder.name)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
    return folder / "curves.png"
