"""What a run draws where the user names no prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.helpers import draw_photo

from ether_diffusion.playground.world import known_subject, request_of, subject, write_subject
from ether_diffusion.training.validation_prompts import default_prompts

PHOTO = "a photo of qwe dog"


@pytest.mark.parametrize(
    ("prompt", "class_prompt", "last"),
    [
        (PHOTO, None, f"{PHOTO} wearing a red hat"),
        ("a photo of qwe", "a photo of a woman", "a photo of qwe wearing a red hat"),
        ("a photo of qwe mug", "a photo of a mug", "a photo of qwe mug on a wooden table"),
    ],
)
def test_the_prompts_suit_what_is_alive_or_not(prompt: str, class_prompt: str | None, last: str) -> None:
    found = default_prompts(prompt, class_prompt, "owner/base", [])
    assert found[0] == prompt
    assert found[-1] == last
    assert len(set(found)) == 4


def test_the_playground_is_asked_for_what_its_subject_can_be_compared_with(tmp_path: Path) -> None:
    photos = sorted(write_subject("scarf-robot", tmp_path / "photos").iterdir())
    prompts = default_prompts("a photo of a qwe robot", "a photo of a robot", "playground", photos)
    individual = known_subject(photos)
    assert individual == subject("scarf-robot")
    asked = [request_of(individual, prompt) for prompt in prompts]
    assert asked == [None, *individual.requests[:3]]


def test_on_the_playground_others_are_asked_for_in_its_places(tmp_path: Path) -> None:
    photos = [draw_photo(tmp_path / f"{shade}.png", shade) for shade in range(3)]
    assert known_subject(photos) is None
    assert known_subject([]) is None
    found = default_prompts("a photo of a qwe robot", None, "playground-flow", photos)
    assert found[1] == "a photo of a qwe robot on a meadow"
    assert len(set(found)) == 4


def test_photos_of_two_subjects_or_with_another_are_none_of_the_playground(tmp_path: Path) -> None:
    robot = sorted(write_subject("scarf-robot", tmp_path / "a").iterdir())
    fish = sorted(write_subject("clown-fish", tmp_path / "b").iterdir())
    assert known_subject(robot[:2]) == subject("scarf-robot")
    assert known_subject([robot[0], fish[0]]) is None
    assert known_subject([*robot, draw_photo(tmp_path / "c.png", size=(32, 32))]) is None


def test_a_request_has_one_word_as_its_token() -> None:
    individual = subject("scarf-robot")
    for request in individual.requests:
        assert request_of(individual, request.prompt.format(token="qwe")) == request
        assert request_of(individual, request.prompt.format(token="qwe small")) is None


def test_a_run_without_prompts_draws_these(train: Callable[..., Path]) -> None:
    common: dict[str, Any] = {
        "num_validation_images": 2,
        "resolution": 16,
        "max_train_steps": 1,
        "validation_prompt": [],
    }
    listing = json.loads((train(**common) / "samples" / "prompts.json").read_text())
    assert [entry["prompt"] for entry in listing[::2]] == default_prompts(PHOTO, None, "", [])
