"""The classifier that judges images in the evaluation, trained only on renderings of the world.

It is a convolutional net with a head for each attribute of a scene. `python -m starter_training.classifier` trains it
on stories of all combinations, including those held out of the model's training: a judge that never saw a trumpet in
the snow takes it for a teddy. Half of the images are blurred; otherwise it takes raccoons with soft edges for koalas.
It reports the accuracy of each head on other stories, of held-out combinations only.
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

from .augmentation import random_blur
from .dataset import StoryDataset
from .targets import ABSENT, APPEARANCE, ATTRIBUTES, attribute_loss

TWO_CHARACTER_PROB = 0.5  # of the images: drawn only from those with two heroes, whose faces are the smallest
BLUR_PROB = 0.5
SHIPPED = Path(__file__).with_name("classifier.safetensors")


@dataclass(frozen=True)
class Prediction:
    """Attributes that the classifier predicts for an image; `looks` from left to right."""

    looks: tuple[tuple[str, str, str], ...]
    action: str
    place: str
    prop: str
    sky: str = "day"
    far: bool = False


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(F.relu(x))))))


class AttributeClassifier(nn.Module):
    """Images (N, 3, 128, 128) in [0, 1] -> logits by head; `features` returns the activations before the heads."""

    def __init__(self, widths=(24, 48, 96, 160), feature_width: int = 384):
        super().__init__()
        layers, channels = [], 3
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                ResidualBlock(width),
            ]
            channels = width
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, 48, 1), nn.ReLU(), nn.Flatten())
        self.squeeze = nn.Linear(48 * 8 * 8, feature_width)
        self.heads = nn.ModuleDict({name: nn.Linear(feature_width, len(values)) for name, values in ATTRIBUTES.items()})

    def features(self, images):
        return F.relu(self.squeeze(self.layers(images * 2 - 1)))

    def forward(self, images) -> dict[str, torch.Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> list[Prediction]:
        """Returns the most likely attributes of each image; a hero counts only if all its parts are present."""
        self.eval()
        classes = {name: logits.argmax(-1).tolist() for name, logits in self(images).items()}
        predictions = []
        for i in range(len(images)):
            attributes = {name: ATTRIBUTES[name][indices[i]] for name, indices in classes.items()}
            looks = [tuple(attributes[f"{part}{position}"] for part in APPEARANCE) for position in (0, 1)]
            present = tuple(look for look in looks if ABSENT not in look)
            scene = (attributes[name] for name in ("action", "place", "prop", "sky"))
            predictions.append(Prediction(present, *scene, attributes["far"] == "far"))
        return predictions


def train_classifier(
    dataset: StoryDataset,
    steps: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    judge: AttributeClassifier | None = None,
) -> AttributeClassifier:
    """Trains a new classifier, or continues an old one: cross-entropy of all heads, AdamW, a one-cycle schedule."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    judge = (judge or AttributeClassifier()).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        indices = dataset.random_indices(batch, rng, TWO_CHARACTER_PROB)
        images = random_blur(dataset.images(indices), rng, BLUR_PROB)
        images = (images + torch.randn_like(images) * 0.02).clamp(0, 1)  # generated images are never quite flat
        loss = attribute_loss(torch.cat(list(judge(images).values()), -1), dataset.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            sys.stderr.write(f"judge: step {step} of {steps}, loss {loss.item():.3f}\n")
    return judge.eval()


@torch.no_grad()
def accuracy(judge: AttributeClassifier, dataset: StoryDataset, blur: bool = False) -> dict[str, float]:
    """Returns the accuracy of each head, and of all heads together, on rendered images or on blurred ones."""
    correct: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "all")}
    rng = random.Random(0)
    for start in range(0, len(dataset), 64):
        indices = range(start, min(start + 64, len(dataset)))
        images = dataset.images(indices)
        logits = judge(random_blur(images, rng, 1.0) if blur else images)
        labels = dataset.labels[indices.start : indices.stop].T
        per_head = {name: logits[name].argmax(-1) == target for name, target in zip(ATTRIBUTES, labels)}
        for name, matches in per_head.items():
            correct[name] += matches.tolist()
        correct["all"] += torch.stack(list(per_head.values())).all(0).tolist()
    return {name: sum(cases) / len(cases) for name, cases in correct.items()}


def save(judge: AttributeClassifier, path: Path) -> None:
    """Writes a classifier; floats become float16."""
    from safetensors.torch import save_file

    tensors = judge.state_dict()
    halved = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in halved.items()}, path)


def load(path: str | Path = SHIPPED) -> AttributeClassifier:
    """Reads a classifier written by `save`, in float32; raises CheckpointError."""
    from comfy_mminterleaved.checkpoints.tensors import read_tensors
    from comfy_mminterleaved.models.build import param_shapes

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no judge {str(path)!r}; train it with python -m starter_training.classifier.")
    judge, tensors = AttributeClassifier(), read_tensors(path)
    if param_shapes(judge) != {name: tuple(t.shape) for name, t in tensors.items()}:
        raise CheckpointError(
            f"{str(path)!r} is no judge, or one of another size; python -m starter_training.classifier makes one."
        )
    judge.load_state_dict(tensors)
    return judge.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="starter_training.classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/judge")
    parser.add_argument("--stories", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--judge", help="a classifier to continue instead of a new one")
    args = parser.parse_args(argv)
    try:
        judge = load(args.judge) if args.judge else None
        out = ensure_writable_dir(args.out)
    except MMInterleavedError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    dataset = StoryDataset(out, args.stories, held_out=None)
    judge = train_classifier(dataset, args.steps, learning_rate=args.learning_rate, judge=judge)
    save(judge, out / "judge.safetensors")
    held_out = StoryDataset(out, 300, held_out=True)
    result = {"drawings": accuracy(judge, held_out), "softened": accuracy(judge, held_out, blur=True)}
    write_json(out / "accuracy.json", result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
