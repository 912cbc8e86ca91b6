from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.options import FolderOptions
from ether_diffusion.data.randomness import generator
from ether_diffusion.data.subject import SubjectFolder

CENTER = Augmentation(center_crop=True)


def save(path: Path, height: int, width: int, seed: int = 0) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "a.png", 64, 64)
    save(tmp_path / "b.png", 96, 64)
    save(tmp_path / "c.png", 64, 128)
    (tmp_path / "b.txt").write_text("a sks dog on a beach")
    return tmp_path


def test_example_is_the_picture_with_its_own_prompt(folder: Path) -> None:
    subject = SubjectFolder(folder, "a sks dog", 64, CENTER)
    assert len(subject) == 3
    assert [path.name for path in subject.paths] == ["a.png", "b.png", "c.png"]
    assert subject.prompts == ["a sks dog", "a sks dog on a beach", "a sks dog"]
    example = subject.example(1, generator(0))
    with Image.open(folder / "b.png") as image:
        expected = np.asarray(image)[16:80].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(example.pixel_values.numpy(), expected, atol=1e-6)
    assert example.prompt == "a sks dog on a beach"
    assert example.original_size == (96, 64)
    assert example.crop_top_left == (16, 0)
    assert example.target_size == (64, 64)


def test_example_depends_on_the_generator_alone(folder: Path) -> None:
    subject = SubjectFolder(folder, "a sks dog", 64, Augmentation())
    first, again = (subject.example(2, generator(0, 1)) for _ in range(2))
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert len({subject.example(2, generator(0, i)).crop_top_left for i in range(20)}) > 10


def test_buckets_follow_the_aspect_ratio_of_each_upright_picture(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 64)).save(folder / "d.png", exif=exif)
    assert SubjectFolder(folder, "p", 64, CENTER).sizes == [(64, 64)] * 4
    bucketed = SubjectFolder(folder, "p", 64, CENTER, use_buckets=True)
    assert bucketed.sizes == [(64, 64), (72, 56), (48, 88), (88, 48)]
    for index, (height, width) in enumerate(bucketed.sizes):
        assert bucketed.example(index, generator(0)).pixel_values.shape == (3, height, width)


def test_one_picture_that_varies_makes_the_folder_random(folder: Path) -> None:
    assert SubjectFolder(folder, "p", 64, CENTER).deterministic
    assert not SubjectFolder(folder, "p", 64, Augmentation()).deterministic
    assert SubjectFolder(folder, "p", 64, Augmentation(), limit=1).deterministic
    assert not SubjectFolder(folder, "p", 64, Augmentation(random_flip=True), limit=1).deterministic


def test_limit_takes_the_first_pictures(folder: Path) -> None:
    assert [path.name for path in SubjectFolder(folder, "p", 64, CENTER, limit=2).paths] == ["a.png", "b.png"]
    assert len(SubjectFolder(folder, "p", 64, CENTER, limit=9)) == 3
    with pytest.raises(ValueError, match="limit is 0, expected at least 1"):
        SubjectFolder(folder, "p", 64, CENTER, limit=0)


def test_broken_picture_is_left_out_with_its_caption(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:3000])
    with caplog.at_level(logging.WARNING):
        subject = SubjectFolder(folder, "a sks dog", 64, CENTER)
    assert subject.prompts == ["a sks dog", "a sks dog"]
    assert len(caplog.messages) == 1
    assert "b.png" in caplog.messages[0]


def test_fingerprint_changes_with_all_that_the_pixels_depend_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(resolution: int = 64, settings: Augmentation = CENTER) -> dict[str, str | int]:
        return SubjectFolder(folder, "p", resolution, settings).fingerprint(0)

    before = fingerprint()
    assert before == fingerprint()
    assert before["file_sha256"] == hashlib.sha256((folder / "a.png").read_bytes()).hexdigest()
    assert fingerprint(resolution=128) != before
    assert fingerprint(settings=Augmentation()) != before
    with monkeypatch.context() as patch:
        patch.setattr("PIL.__version__", "0.0")
        assert fingerprint() != before
    save(folder / "a.png", 64, 64, seed=1)
    assert fingerprint() != before


def test_fingerprint_ignores_the_name_and_place_of_the_file(folder: Path) -> None:
    before = SubjectFolder(folder, "p", 64, CENTER).fingerprint(0)
    (folder / "a.png").rename(folder / "0.png")
    assert SubjectFolder(folder, "another prompt", 64, CENTER).fingerprint(0) == before


def test_resolution_off_the_grid_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"resolution 100 .* 64; use 64 or 128"):
        SubjectFolder(folder, "p", 100, CENTER, divisible_by=64)


def test_a_photo_that_would_be_scaled_to_gigabytes_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (100, 6000)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match=r"long.png of 100 x 6000 pixels would have 2048 x 122880 once it covers"):
        SubjectFolder(tmp_path, "a dog", 2048, Augmentation())


def test_pictures_that_are_enlarged_are_named_in_one_remark(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / f"{number}.png", 32 + number, 40)
    save(tmp_path / "large.png", 64, 64)
    (remark,) = SubjectFolder(tmp_path, "p", 64, CENTER).remarks()
    assert remark.startswith(f"6 of 7 pictures in {tmp_path} are smaller than the resolution and are enlarged")
    assert "0.png (40 x 32) to 2.00 of its size, 1.png (40 x 33) to 1.94 of its size" in remark
    assert remark.count("of its size") == 4
    assert ", …; use larger pictures, or a smaller --resolution" in remark
    assert SubjectFolder(tmp_path, "p", 32, CENTER).remarks() == []


def test_captions_that_are_missing_in_the_metadata_or_many_are_counted(folder: Path) -> None:
    assert SubjectFolder(folder, "a sks dog", 64, CENTER).remarks() == []
    (folder / "metadata.csv").write_text("file_name,text\na.png,one\n")
    (folder / "b.txt").write_text("a sks dog\non a beach")
    missing, several = SubjectFolder(folder, "a sks dog", 64, CENTER).remarks()
    assert missing == (
        f'1 of 3 pictures in {folder} have no caption in {folder / "metadata.csv"} or beside them, and get "a sks dog"'
    )
    assert several.startswith(f"1 of 3 pictures in {folder} have several captions")


def test_settings_that_change_nothing_are_named(folder: Path) -> None:
    def remarks(**options: Any) -> list[str]:
        return SubjectFolder(folder, "a, sks, dog", 64, CENTER, options=FolderOptions(**options)).remarks()

    (shuffled,) = remarks(shuffle_tags=True, caption_prefix="photo")
    assert shuffled.startswith(f"shuffle_tags changes nothing: no caption in {folder} has two comma-separated tags")
    (folder / "b.txt").write_text("sks dog, beach, sun")
    assert remarks(shuffle_tags=True, keep_tags=1) == []
    assert len(remarks(shuffle_tags=True, keep_tags=2)) == 1
    assert remarks(shuffle_tags=True, tag_orders=1, seed=1) == [], "one other order is a change"
    (folder / "b.txt").unlink()
    assert remarks(caption_prefix="photo") == [
        f"caption_prefix stands before captions only, of which {folder} has none"
    ]
