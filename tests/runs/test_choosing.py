"""The rule that names the best step of a run."""

from __future__ import annotations

import itertools
import random

from ether_diffusion.runs.choosing import ScoredStep, best_step, prompt_floor, steps_since_best


def row(step: int, dino: float, clip_t: float = 0.3) -> ScoredStep:
    return {"step": step, "dino": dino, "dino_nearest": dino, "clip_t": clip_t}


BASE = row(0, 0.9, 0.4)


def test_the_likest_step_that_follows_its_prompts_is_best() -> None:
    rows = [BASE, row(1, 0.5, 0.39), row(2, 0.6, 0.37), row(3, 0.8, 0.35), row(4, 0.55, 0.40)]
    assert prompt_floor(rows) == 0.9 * 0.4
    assert best_step(rows) == 2
    assert steps_since_best(rows) == 2


def test_where_no_step_follows_its_prompts_the_one_that_does_most_is_best() -> None:
    assert best_step([BASE, row(1, 0.5, 0.30), row(2, 0.6, 0.31), row(3, 0.8, 0.2)]) == 2


def test_of_equal_steps_the_earliest_is_best() -> None:
    assert best_step([BASE, row(1, 0.5, 0.4), row(2, 0.5, 0.4)]) == 1


def test_without_the_base_or_a_trained_step_none_is_best() -> None:
    assert best_step([row(1, 0.5)]) is None
    assert best_step([BASE]) is None
    assert steps_since_best([BASE]) == 0


def test_a_later_step_changes_the_best_only_to_itself() -> None:
    """What lets a run keep the best adapter without keeping all."""
    rng = random.Random(0)
    for _ in range(50):
        rows = [BASE, *(row(step, rng.random(), 0.3 + 0.1 * rng.random()) for step in range(1, 8))]
        bests = [best_step(rows[:count]) for count in range(2, 9)]
        for number, (before, now) in enumerate(itertools.pairwise(bests), 2):
            assert now in (before, number)
