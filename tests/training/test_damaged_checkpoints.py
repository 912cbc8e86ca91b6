"""Damage and change since a checkpoint was written do not pass unnoticed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training.helpers import draw_photo, metrics, provenance, same_tensors, trained

from ether_diffusion.data.pairs import PairFiles
from ether_diffusion.runs.checksums import CHECKSUMS, damage
from ether_diffusion.runs.folder import changed_facts
from ether_diffusion.training.control import _facts

Train = Callable[..., Path]

COMMON: dict[str, Any] = {"resolution": 16, "checkpointing_steps": 1}


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", CHECKSUMS])
def test_a_damaged_newest_checkpoint_is_named_and_the_newest_good_one_offered(
    name: str, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(max_train_steps=2, **COMMON)
    assert [damage(path) for path in sorted((run / "checkpoints").iterdir())] == [[], []]
    path = run / "checkpoints" / "step-000002" / name
    cut(path) if name == CHECKSUMS else flip(path)
    with pytest.raises(ValueError, match=rf"step-000002 is damaged \({name}: .*the newest good one is step-000001"):
        train(max_train_steps=3, resume="latest", **COMMON)
    assert provenance(run)["status"] == "finished"
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=3, resume="latest-good", **COMMON)
    assert f"damaged ({name}" in caplog.text
    whole = train("whole", max_train_steps=3, **COMMON)
    assert metrics(run) == metrics(whole)
    assert same_tensors(trained(run, 3), trained(whole, 3))


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.bin"])
def test_a_cut_checkpoint_of_0_1_is_noticed_without_checksums(name: str, train: Train) -> None:
    run = train(max_train_steps=2, **COMMON)
    for path in run.rglob(CHECKSUMS):
        path.unlink()
    cut(run / "checkpoints" / "step-000002" / name)
    with pytest.raises(ValueError, match="the newest good one is step-000001"):
        train(max_train_steps=3, resume="latest", **COMMON)
    train(max_train_steps=3, resume="latest-good", **COMMON)


def test_no_good_one_is_said(train: Train) -> None:
    run = train(max_train_steps=1, **COMMON)
    flip(run / "checkpoints" / "step-000001" / "optimizer.bin")
    for wanted in ("latest", "latest-good"):
        with pytest.raises(ValueError, match="no other checkpoint is whole"):
            train(max_train_steps=3, resume=wanted, **COMMON)


def test_changed_pictures_are_named(
    train: Train, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = shutil.copytree(photos, tmp_path / "own")
    common = COMMON | {"instance_data_dir": own}
    train(max_train_steps=1, **common)
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=2, resume="latest", **common)
    assert "resuming with another set of" not in caplog.text
    (own / "0.png").unlink()
    (own / "1.txt").write_text("another caption")
    draw_photo(own / "9.png", 5)
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=3, resume="latest", **common)
    said = "another set of pictures, 3 → 3 (gone: instance/0.png; new: instance/9.png; changed: instance/1.png)"
    assert said in caplog.text


def test_another_number_of_processes_and_batch_are_named(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    run = train(max_train_steps=1, **COMMON)
    known = provenance(run)
    (run / "provenance.json").write_text(json.dumps(known | {"num_processes": 2}))
    with caplog.at_level(logging.WARNING):
        train(max_train_steps=2, resume="latest", train_batch_size=2, **COMMON)
    assert "another number of processes, 2 → 1" in caplog.text
    assert "train_batch_size: 1 → 2" in caplog.text


def test_changed_pairs_are_noticed(tmp_path: Path) -> None:
    image, condition = draw_photo(tmp_path / "a.png"), draw_photo(tmp_path / "b.png")
    pair = PairFiles(image, condition, ("a dog", "a pet"), "a.png")
    before = _facts([pair])
    assert changed_facts(before, _facts([pair])) == []
    assert "set of pictures" in changed_facts(before, _facts([replace(pair, captions=("a dog", "a cat"))]))[0]
    draw_photo(condition, 3, (80, 80))
    assert "set of pictures" in changed_facts(before, _facts([pair]))[0]
