"""The training loop of every stage: accelerate, Muon, EMA, a JSONL log, loss curves, atomic checkpoints."""

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
    """Settings of a stage, read from its file in stages/.

    Args:
        blocks: those that are trained.
        needs: those that an earlier stage must have trained.
        batch: images per step.
        warmup: steps of the linear warm-up.
        cooldown: share of the steps in which the learning rate falls.
        clip: largest norm of the gradients.
        ema: decay of the averaged weights.
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
    """Exponential moving average of parameters, with a smaller decay in the first steps."""

    def __init__(self, parameters: dict[str, torch.Tensor], decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, torch.Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [parameters[n].float() for n in self.average], 1 - decay)


def learning_rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, constant, then linear decay to a twentieth; before the decay independent of the stage's steps."""
    rise = (step + 1) / stage.warmup if stage.warmup else 1.0
    fall = (stage.steps - step) / (stage.cooldown * stage.steps) if stage.cooldown else 1.0
    return stage.learning_rate * min(1.0, rise, 0.05 + 0.95 * max(0.0, fall))


def train(
    stage: StageConfig,
    objective: nn.Module,
    blocks: dict[str, nn.Module],
    stage_dir: Path,
    get_batch: Callable[[int], tuple],
    validation: list[tuple],
    precision: str = "no",
    minutes: float | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> bool:
    """Trains to the stage's last step or for some minutes, from the last checkpoint in `stage_dir`.

    Args:
        objective: its forward returns a dict of losses; "loss" is minimized over the parameters that require gradients.
        blocks: their averaged weights are written to `stage_dir`/BLOCK.safetensors.
        get_batch: seed -> the objective's arguments; every step and process has another seed.
        validation: the objective's arguments for a few fixed batches that are not trained on.
        precision: accelerate's "no", "bf16" or "fp16".
        minutes: stop after this time, at a checkpoint.
        on_sample: called with the step while the blocks hold the averaged weights.

    Returns:
        Whether the last step is done. With several processes this ends the process group: each can train once.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import set_seed

    start_time = time.monotonic()
    # Captions, texts and stories do not use the same parameters.
    ddp_kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[ddp_kwargs])
    stage_dir.mkdir(parents=True, exist_ok=True)
    objective = objective.to(accelerator.device)
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = Muon(parameters, stage.learning_rate, stage.weight_decay)
    ema = EMA(parameters, stage.ema)
    first_step = _resume(stage_dir / "state.pt", parameters, optimizer, ema)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)

    history: dict[str, list[float]] = {}
    step, log_time = first_step, time.monotonic()
    for step in range(first_step, stage.steps):
        set_seed(stage.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        objective.train()
        losses = wrapped(*get_batch(stage.seed + step * accelerator.num_processes + accelerator.process_index))
        optimizer.zero_grad()
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(parameters.values(), stage.clip)
        optimizer.step()
        ema.update(parameters, step)
        for name, value in losses.items():
            history.setdefault(name, []).append(float(value.detach()))
        num_steps = step + 1
        timed_out = minutes is not None and _in_any_process(accelerator, time.monotonic() - start_time > minutes * 60)
        last = timed_out or num_steps == stage.steps
        if not accelerator.is_main_process:
            if timed_out:
                break
            continue
        if num_steps % stage.log_every == 0 or last:
            record = {
                "step": num_steps,
                "lr": learning_rate(stage, step),
                "seconds": round(time.monotonic() - log_time, 2),
            }
            _log(stage_dir, record | {name: sum(v) / len(v) for name, v in history.items()})
            history, log_time = {}, time.monotonic()
        if num_steps % stage.validate_every == 0 or last:
            with _averaged(parameters, ema):
                _log(stage_dir, {"step": num_steps, "validation": True} | validate(objective, validation, accelerator))
        if num_steps % stage.save_every == 0 or last:
            _save(stage_dir, num_steps, parameters, optimizer, ema, blocks)
        if on_sample is not None and (num_steps % stage.sample_every == 0 or num_steps == stage.steps):
            with _averaged(parameters, ema):
                objective.eval()
                on_sample(num_steps)
        if timed_out:
            break
    if accelerator.is_main_process and (stage_dir / "log.jsonl").exists():
        plot(stage_dir)
    accelerator.wait_for_everyone()  # a process that exits while another still writes takes that one with it
    # Whatever refers to the process group must be freed before the group is destroyed, or its threads are torn down
    # while they run.
    losses = wrapped = optimizer = None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    return step + 1 >= stage.steps


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _in_any_process(accelerator, condition: bool) -> bool:
    """Whether the condition holds in any process. All must call it: if one stopped alone, the others would wait."""
    if condition:
        accelerator.set_trigger()
    return accelerator.check_trigger()


@torch.no_grad()
def validate(objective: nn.Module, batches: list[tuple], accelerator) -> dict[str, float]:
    """Returns mean losses over fixed batches, with fixed noise."""
    objective.eval()
    history: dict[str, list[float]] = {}
    with torch.random.fork_rng(), accelerator.autocast():
        torch.manual_seed(0)
        for batch in batches:
            for name, value in objective(*batch).items():
                history.setdefault(name, []).append(float(value))
    return {name: sum(v) / len(v) for name, v in history.items()}


class _averaged:
    """Context in which the parameters hold their moving averages."""

    def __init__(self, parameters: dict[str, torch.Tensor], ema: EMA):
        self.parameters, self.ema = parameters, ema

    @torch.no_grad()
    def __enter__(self):
        self.saved = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.copy_(self.ema.average[name])

    @torch.no_grad()
    def __exit__(self, *_):
        for name, p in self.parameters.items():
            p.copy_(self.saved[name])


# Submodules of the objectives as older state files name them.
LEGACY_NAMES = {
    "decoder": "synchronizer",
    "tokens": "token_probe",
    "sees": "token_probe",
    "glance": "pooled_map_probe",
    "maps": "map_probes",
    "knows": "text_probe",
    "meant": "coref_probe",
    "critic": "discriminator",
}


def _current_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = [(name.partition("."), tensor) for name, tensor in tensors.items()]
    return {LEGACY_NAMES.get(module, module) + dot + key: tensor for (module, dot, key), tensor in parts}


def _resume(path: Path, parameters, optimizer, ema: EMA) -> int:
    """Loads a state file, if there is one, and returns the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    values, averages = _current_names(state["parameters"]), _current_names(state["ema"])
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])
            ema.average[name] = averages[name].to(p.device)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(stage_dir: Path, step: int, parameters, optimizer, ema: EMA, blocks: dict[str, nn.Module]) -> None:
    """Writes the state to resume from and the blocks' averaged weights, each atomically."""
    from safetensors.torch import save_file

    state = {
        "step": step,
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizer": optimizer.state_dict(),
        "ema": ema.average,
    }
    with atomic_path(stage_dir / "state.pt") as temp_path:
        torch.save(state, temp_path)
    with _averaged(parameters, ema):
        for name, block in blocks.items():
            tensors = {key: t.detach().cpu().contiguous() for key, t in block.state_dict().items()}
            with atomic_path(stage_dir / f"{name}.safetensors") as temp_path:
                save_file(tensors, temp_path)


def _log(stage_dir: Path, record: dict) -> None:
    with open(stage_dir / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def plot(stage_dir: Path) -> Path:
    """Plots the losses of a stage's log to curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (stage_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
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
    figure.suptitle(stage_dir.name)
    figure.tight_layout()
    figure.savefig(stage_dir / "curves.png", dpi=110)
    plt.close(figure)
    return stage_dir / "curves.png"
