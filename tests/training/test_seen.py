"""How often each picture is shown stands in the record: planned from the start, counted at the end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training.helpers import draw_photo, provenance

from ether_diffusion.training import dreambooth

Train = Callable[..., Path]


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    """Six squares and one wide photo."""
    for number in range(6):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    draw_photo(tmp_path / "photos" / "wide.png", 6, (120, 60))
    return tmp_path / "photos"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """The shapes of all samples that pass the model."""
    shapes: Counter[tuple[int, ...]] = Counter()
    original = dreambooth.DenoisingModel.forward

    def forward(model: Any, lanes: Any) -> Any:
        for batch in lanes[0]:
            shapes[tuple(batch.latents.shape[2:])] += len(batch.latents)
        return original(model, lanes)

    monkeypatch.setattr(dreambooth.DenoisingModel, "forward", forward)
    return shapes


def test_a_lone_shape_has_its_share_of_the_samples(train: Train, lone: Path, shown: Counter[tuple[int, ...]]) -> None:
    run = train(instance_data_dir=lone, aspect_ratio_buckets=True, train_batch_size=4, max_train_steps=7)
    assert sorted(shown.values()) == [4, 24]  # of 28: a seventh, as of any picture
    record = provenance(run)
    names = [*(f"{number}.png" for number in range(6)), "wide.png"]
    expected = {"batch": 4, "fewest": 4, "most": 4, "times": dict.fromkeys(names, 4)}
    assert record["pictures_seen"] == {"since_step": 0, "until_step": 7, "instance": expected}
    assert record["pictures_planned"] == record["pictures_seen"]


def test_each_bucket_is_told_and_recorded(train: Train, lone: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = train(instance_data_dir=lone, aspect_ratio_buckets=True, train_batch_size=4, max_train_steps=8)
    square = {"height": 32, "width": 32, "pictures": 6, "seen_per_epoch": 1, "fewest": 4, "most": 5}
    wide = {"height": 22, "width": 46, "pictures": 1, "seen_per_epoch": 1, "fewest": 4, "most": 4}
    assert provenance(run)["buckets"] == {"instance": {"epochs_of_a_cycle": 4, "sizes": [wide, square]}}
    told = [message for message in caplog.messages if "bucket of" in message]
    assert told == [
        "instance, bucket of 22 x 46 pixels (height x width): 1 picture, each seen once an epoch, 4 times in all",
        "instance, bucket of 32 x 32 pixels (height x width): 6 pictures, each seen once an epoch, 4 to 5 times in all",
    ]
    assert "buckets" not in provenance(train("squares", instance_data_dir=lone))


def test_a_run_that_fails_records_what_it_showed(
    train: Train, lone: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, steps = dreambooth.DenoisingModel.forward, []

    def broken(model: Any, lanes: Any) -> Any:
        steps.append(lanes)
        losses = original(model, lanes)
        return [{key: value * torch.nan for key, value in losses[0].items()}] if len(steps) > 2 else losses

    with monkeypatch.context() as patched:
        patched.setattr(dreambooth.DenoisingModel, "forward", broken)
        with pytest.raises(RuntimeError, match="not finite"):
            train(instance_data_dir=lone, train_batch_size=2, max_train_steps=7, checkpointing_steps=2)
    record = provenance(tmp_path / "run")
    assert sum(record["pictures_planned"]["instance"]["times"].values()) == 14
    assert sum(record["pictures_seen"]["instance"]["times"].values()) == 4
    run = train(instance_data_dir=lone, train_batch_size=2, max_train_steps=7, resume="latest")
    assert provenance(run)["pictures_seen"]["instance"] == record["pictures_planned"]["instance"]


def test_after_another_batch_only_what_follows_is_counted(train: Train, lone: Path) -> None:
    train(instance_data_dir=lone, train_batch_size=2, max_train_steps=2)
    run = train(instance_data_dir=lone, train_batch_size=3, max_train_steps=4, resume="latest")
    seen = provenance(run)["pictures_seen"]
    assert (seen["since_step"], seen["until_step"], sum(seen["instance"]["times"].values())) == (2, 4, 6)
    run = train(instance_data_dir=lone, train_batch_size=3, max_train_steps=5, resume="latest")
    seen = provenance(run)["pictures_seen"]
    assert (seen["since_step"], seen["until_step"], sum(seen["instance"]["times"].values())) == (2, 5, 9)
