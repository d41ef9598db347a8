"""Small classifiers that judge pictures: trained on the generator's own drawings and on nothing else.

One convolutional net with a head for everything a scene has: how many heroes, the look of each from left to right, the
action, place, prop, sky, and whether it is far. `python -m starter_training.classifier` trains it on stories of
all combinations, those held out of the model's training too: a judge that never saw a trumpet in the snow takes it for
a teddy. Half of the drawings are softened, or it would take any raccoon whose edges are not quite the generator's for
a koala. It reports how often each head is right on other stories, of held-out combinations only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from comfy_mminterleaved.errors import CheckpointError, MMInterleavedError
from comfy_mminterleaved.files import ensure_writable_dir, write_json

from .dataset import StoryDataset
from .targets import ABSENT, APPEARANCE, ATTRIBUTES, guide

TWO_CHARACTER_PROB = 0.5  # of the drawings, only such as show two heroes, whose faces are the smallest
BLUR_PROB = 0.5  # of the drawings
SHIPPED = Path(__file__).with_name("classifier.safetensors")


@dataclass(frozen=True)
class Prediction:
    """What the judge sees in a picture; `looks` from left to right."""

    looks: tuple[tuple[str, str, str], ...]
    action: str
    place: str
    prop: str


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(F.relu(x))))))


class AttributeClassifier(nn.Module):
    """Pictures (N, 3, 128, 128) in [0, 1] -> logits by head; `features` are those before the heads."""

    def __init__(self, widths=(24, 48, 96, 160), feature_width: int = 384):
        super().__init__()
        layers, inner = [], 3
        for width in widths:
            layers += [nn.Conv2d(inner, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), Residual(width)]
            inner = width
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(inner, 48, 1), nn.ReLU(), nn.Flatten())
        self.squeeze = nn.Linear(48 * 8 * 8, feature_width)
        self.heads = nn.ModuleDict({name: nn.Linear(feature_width, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, pictures):
        return F.relu(self.squeeze(self.layers(pictures * 2 - 1)))

    def forward(self, pictures) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def judge(self, pictures: torch.Tensor) -> list[Prediction]:
        """The likeliest reading of each picture; a second hero counts only if all its parts are seen."""
        self.eval()
        found = {name: logits.argmax(-1).tolist() for name, logits in self(pictures).items()}
        verdicts = []
        for i in range(len(pictures)):
            said = {name: ATTRIBUTES[name][values[i]] for name, values in found.items()}
            looks = [tuple(said[f"{part}{slot}"] for part in APPEARANCE) for slot in (0, 1)]
            shown = tuple(look for look in looks if ABSENT not in look)
            verdicts.append(Prediction(shown, said["action"], said["place"], said["prop"]))
        return verdicts


def train_judge(
    book: StoryDataset,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    judge: AttributeClassifier | None = None,
) -> AttributeClassifier:
    """Trains a new judge, or an old one on, on a book's pictures: cross-entropy of all heads, a one-cycle schedule."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    judge = (judge or AttributeClassifier()).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        rows = book.random_rows(batch, rng, TWO_CHARACTER_PROB)
        pictures = random_blur(book.pictures(rows), rng)
        pictures = (pictures + torch.randn_like(pictures) * 0.02).clamp(0, 1)  # a drawing model is never quite flat
        loss = guide(torch.cat(list(judge(pictures).values()), -1), book.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            sys.stderr.write(f"judge: step {step} of {steps}, loss {loss.item():.3f}\n")
    return judge.eval()


def random_blur(pictures: torch.Tensor, rng: random.Random, share: float = BLUR_PROB) -> torch.Tensor:
    """Pictures (N, 3, side, side), a share of them as they look when made smaller, down to half, and large again."""
    side, made = pictures.shape[-1], []
    for picture in pictures.split(1):
        if rng.random() < share:
            small = F.interpolate(picture, size=rng.randint(side // 2, side - 1), mode="area")
            picture = F.interpolate(small, size=side, mode="bicubic", align_corners=False).clamp(0, 1)
        made.append(picture)
    return torch.cat(made)


@torch.no_grad()
def accuracy(judge: AttributeClassifier, book: StoryDataset, soft: bool = False) -> dict[str, float]:
    """How often each head is right on a book's drawings, or on these `random_blur`, and how often all are."""
    right: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "all")}
    rng = random.Random(0)
    for start in range(0, len(book), 64):
        rows = range(start, min(start + 64, len(book)))
        pictures = book.pictures(rows)
        logits = judge(random_blur(pictures, rng, 1.0) if soft else pictures)
        labels = book.labels[rows.start : rows.stop].T
        per_head = {name: logits[name].argmax(-1) == wanted for name, wanted in zip(ATTRIBUTES, labels)}
        for name, found in per_head.items():
            right[name] += found.tolist()
        right["all"] += torch.stack(list(per_head.values())).all(0).tolist()
    return {name: sum(found) / len(found) for name, found in right.items()}


def save(judge: AttributeClassifier, path: Path) -> None:
    """Writes a judge, its floats as float16."""
    from safetensors.torch import save_file

    tensors = judge.state_dict()
    halved = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in halved.items()}, path)


def load(path: str | Path = SHIPPED) -> AttributeClassifier:
    """A judge saved by `save`, computing in float32; raises CheckpointError."""
    from comfy_mminterleaved.checkpoints.tensors import read_tensors
    from comfy_mminterleaved.models.build import param_shapes

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no judge {str(path)!r}; train it with python -m starter_training.classifier.")
    judge, tensors = AttributeClassifier(), read_tensors(path)
    if param_shapes(judge) != {name: tuple(t.shape) for name, t in tensors.items()}:
        raise CheckpointError(f"{str(path)!r} is no judge, or one of another size; training.judge makes one.")
    judge.load_state_dict(tensors)
    return judge.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/judge")
    parser.add_argument("--stories", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--judge", help="one to train on, instead of a new one")
    args = parser.parse_args(argv)
    try:
        old = load(args.judge) if args.judge else None
        out = ensure_writable_dir(args.out)
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    book = StoryDataset(out, args.stories, held_out=None)
    judge = train_judge(book, args.steps, learning_rate=args.learning_rate, judge=old)
    save(judge, out / "judge.safetensors")
    other = StoryDataset(out, 300, held_out=True)
    found = {"drawings": accuracy(judge, other), "softened": accuracy(judge, other, soft=True)}
    write_json(out / "accuracy.json", found)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
