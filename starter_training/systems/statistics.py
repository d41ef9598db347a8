"""Figures with intervals over stories, not over panels, and paired differences."""

from __future__ import annotations

import random

ROUNDS = 1000  # of the bootstrap


def bootstrap_by_story(cases: list[tuple[int, float]], seed: int = 0) -> dict:
    """The mean of values, the number of cases, and a 95% interval that resamples stories.

    Args:
        cases: The story and the value of each.
    """
    by_story: dict[int, list[float]] = {}
    for story, value in cases:
        by_story.setdefault(story, []).append(float(value))
    groups, rng, means = list(by_story.values()), random.Random(seed), []
    for _ in range(ROUNDS):
        sample = [value for group in rng.choices(groups, k=len(groups)) for value in group]
        means.append(sum(sample) / len(sample))
    means.sort()
    mean = sum(value for _, value in cases) / len(cases)
    return {
        "mean": mean,
        "cases": len(cases),
        "low": means[int(ROUNDS * 0.025)],
        "high": means[int(ROUNDS * 0.975) - 1],
    }


def paired_difference(cases: list[tuple[int, float]], others: list[tuple[int, float]]) -> dict:
    """By how much the mean of `cases` is above that of `others`, which are of the same images in the same order."""
    return bootstrap_by_story([(story, float(a) - float(b)) for (story, a), (_, b) in zip(cases, others, strict=True)])
