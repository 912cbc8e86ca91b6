"""Training on captions as people have them: several for a picture, tags in other orders, metadata, sub-folders."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.helpers import draw_photo, metrics, provenance, same_tensors, trained

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.cache import TensorCache
from ether_diffusion.data.options import FolderOptions
from ether_diffusion.data.plan import Draw
from ether_diffusion.data.subject import SubjectFolder
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import ObjectiveSettings
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training import dreambooth
from ether_diffusion.training.batches import TrainingSamples, encode_once
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

Train = Callable[..., Path]
SEVERAL = "qwe dog, grass, sun, left\nqwe dog, snow\n"


@pytest.fixture
def captioned(tmp_path: Path, photos: Path) -> Path:
    """Three photos: one with two captions, one with one, one without."""
    folder = tmp_path / "captioned"
    shutil.copytree(photos, folder)
    (folder / "0.txt").write_text(SEVERAL)
    (folder / "1.txt").write_text("qwe dog, beach, waves\n")
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts of all samples that pass the model, in their order."""
    prompts: list[str] = []
    original = dreambooth.DenoisingModel.forward

    def forward(model: Any, lanes: Any) -> Any:
        prompts.extend(prompt for batch in lanes[0] for prompt in batch.prompts)
        return original(model, lanes)

    monkeypatch.setattr(dreambooth.DenoisingModel, "forward", forward)
    return prompts


def test_each_sample_takes_one_caption_of_its_picture(train: Train, captioned: Path, said: list[str]) -> None:
    run = train(instance_data_dir=captioned, max_train_steps=30, train_batch_size=2)
    counts = Counter(said)
    first, second = SEVERAL.splitlines()
    assert counts.keys() == {first, second, "qwe dog, beach, waves", "a photo of qwe dog"}
    assert counts[first] + counts[second] == counts["qwe dog, beach, waves"] == 20
    assert min(counts[first], counts[second]) >= 4
    assert set(provenance(run)["pictures"]) == {f"instance/{number}.png" for number in range(3)}


def test_a_resumed_run_takes_the_same_captions(train: Train, captioned: Path, said: list[str]) -> None:
    common: dict[str, Any] = {
        "instance_data_dir": captioned,
        "checkpointing_steps": 3,
        "shuffle_tags": True,
        "keep_tags": 1,
        "caption_prefix": "a photo of",
        "train_batch_size": 2,
    }
    straight = train("straight", max_train_steps=6, **common)
    expected = said.copy()
    said.clear()
    run = train(max_train_steps=3, **common)
    train(max_train_steps=6, resume="latest", **common)
    assert said == expected
    assert metrics(run) == metrics(straight)
    assert same_tensors(trained(run, 6), trained(straight, 6))


def test_prefix_and_orders_of_tags_reach_the_model(train: Train, captioned: Path, said: list[str]) -> None:
    settings: dict[str, Any] = {"shuffle_tags": True, "keep_tags": 1, "tag_orders": 3, "caption_prefix": "photo,"}
    train(instance_data_dir=captioned, max_train_steps=40, train_batch_size=2, **settings)
    assert {prompt for prompt in said if "beach" in prompt} == {
        "photo, qwe dog, beach, waves",
        "photo, qwe dog, waves, beach",
    }
    orders = {prompt for prompt in said if "grass" in prompt}
    assert 1 < len(orders) <= 3
    assert {tuple(sorted(order.split(", "))) for order in orders} == {("grass", "left", "photo", "qwe dog", "sun")}
    assert "a photo of qwe dog" in said


def test_class_images_get_no_prefix(train: Train, captioned: Path, said: list[str], tmp_path: Path) -> None:
    for number in range(2):
        draw_photo(tmp_path / "class" / "deep" / f"{number}.png", number)
        (tmp_path / "class" / "deep" / f"{number}.txt").write_text("a dog, asleep")
    train(
        instance_data_dir=captioned,
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=tmp_path / "class",
        num_class_images=2,
        nested_folders=True,
        caption_prefix="qwe,",
    )
    assert said.count("a dog, asleep") == 3
    assert sorted(path.name for path in (tmp_path / "class").iterdir()) == ["deep"]  # none had to be drawn


def test_cached_pictures_take_the_captions_that_fresh_ones_take(captioned: Path) -> None:
    family = family_of(tiny_pipeline())
    subject = SubjectFolder(captioned, "a dog", 64, Augmentation(), options=FolderOptions(shuffle_tags=True))
    assert subject.deterministic
    cached = encode_once(subject, family, TensorCache(None))
    objective = family.objective(ObjectiveSettings())
    fresh, stored = (
        [
            TrainingSamples(subject, "instance", 0, family, objective, cached=each)[Draw(0, n)]["prompts"]
            for n in range(20)
        ]
        for each in (None, cached)
    )
    assert fresh == stored
    assert len(set(fresh)) > 4


def test_metadata_give_captions_and_pictures_in_subfolders(
    train: Train, photos: Path, tmp_path: Path, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "listed"
    shutil.copytree(photos, folder)
    (folder / "deep").mkdir()
    (folder / "2.png").rename(folder / "deep" / "0.png")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "caption": ["one", "two"]}\n{"file_name": "deep/0.png", "caption": "three"}\n'
    )
    with caplog.at_level(logging.WARNING):
        run = train(instance_data_dir=folder, caption_column="caption", max_train_steps=12, aspect_ratio_buckets=True)
    counts = Counter(said)
    assert counts["one"] + counts["two"] == counts["three"] == counts["a photo of qwe dog"] == 4
    assert caplog.text.count("1 of 3 pictures") == 2  # without a caption, and with several
    assert provenance(run)["pictures_seen"]["instance"]["times"] == {"0.png": 4, "1.png": 4, "deep/0.png": 4}
    assert set(provenance(run)["pictures"]) == {"instance/0.png", "instance/1.png", "instance/deep/0.png"}


def test_a_resume_names_pictures_whose_captions_changed(
    train: Train, captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(instance_data_dir=captioned, max_train_steps=1)
    (captioned / "0.txt").write_text(SEVERAL.replace("\n", " ", 1))
    with caplog.at_level(logging.WARNING):
        train(instance_data_dir=captioned, max_train_steps=2, resume="latest", caption_prefix="photo")
    assert "another set of pictures, 3 → 3 (changed: instance/0.png)" in caplog.text
    assert "resuming with another setting, caption_prefix:  → photo" in caplog.text


def test_enlarged_pictures_are_warned_of_once(train: Train, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(instance_data_dir=photos, resolution=128, max_train_steps=1)
    assert caplog.text.count("are enlarged, which blurs them: 0.png (64 x 64) to 2.00 of its size") == 1


def test_settings_of_captions_have_a_part_in_the_hash_once_they_are_given(
    settings: Callable[..., DreamBoothConfig],
) -> None:
    plain = settings()
    given: dict[str, Any] = {
        "caption_prefix": "qwe",
        "nested_folders": True,
        "caption_column": "c",
        "shuffle_tags": True,
    }
    hashes = {plain.hash(), *(settings(**{name: value}).hash() for name, value in given.items())}
    assert len(hashes) == 5
    with pytest.raises(ValueError, match="keep_tags and tag_orders are for shuffled captions: add shuffle_tags"):
        settings(keep_tags=1)


def test_broken_metadata_are_told_before_the_base_is_loaded(train: Train, captioned: Path) -> None:
    (captioned / "metadata.csv").write_text("file_name,caption\n0.png,x\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2 has no column 'text' but file_name, caption"):
        train(instance_data_dir=captioned, pretrained_model_name_or_path="./nowhere")
