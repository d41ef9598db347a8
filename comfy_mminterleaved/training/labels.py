"""What a scene has, as class labels: for the judge, and for guiding what a drawing is told."""

from __future__ import annotations

from . import world

NONE = "none"
LOOK = {"species": (NONE, *world.SPECIES), "colour": (NONE, *world.COLOURS), "accessory": (NONE, *world.ACCESSORIES)}
HEADS: dict[str, tuple[str, ...]] = {
    "action": tuple(world.ACTIONS), "place": tuple(world.PLACES), "prop": tuple(world.PROPS),
    "sky": tuple(world.SKIES), "far": ("near", "far"),
    **{f"{part}{slot}": values for slot in (0, 1) for part, values in LOOK.items()},
}  # fmt: skip


def labels_of(scene: world.Scene) -> dict[str, int]:
    """The right answer of every head."""
    said = {"action": scene.action, "place": scene.place, "prop": scene.prop, "sky": scene.sky}
    said["far"] = "far" if scene.far else "near"
    for slot in (0, 1):
        look = scene.heroes[slot].look if slot < len(scene.heroes) else (NONE,) * 3
        said |= {f"{part}{slot}": value for part, value in zip(LOOK, look)}
    return {head: HEADS[head].index(value) for head, value in said.items()}
