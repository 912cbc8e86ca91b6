"""A base that cannot be loaded: what it is instead, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.training.base_model import BaseModelError, load_base
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.sections import BaseSection


def load(name: str | Path, **settings: str) -> object:
    config = DreamBoothConfig(str(name), Path("run"), instance_data_dir=Path("a"), instance_prompt="a", **settings)  # type: ignore[arg-type]
    return load_base(config.section(BaseSection), "no")


def test_a_folder_of_one_variant_says_which_flag_it_needs(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base", variant="fp16")
    with pytest.raises(BaseModelError, match="base has its weights as fp16 only: add --variant fp16"):
        load(tmp_path / "base")
    assert load(tmp_path / "base", variant="fp16")


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.safetensors", "is damaged or cut off"), ("model.ckpt", r"is no \.safetensors file: .* convert it")],
)
def test_a_single_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(BaseModelError, match=f"{name} {said}"):
        load(tmp_path / name)


def test_a_misspelt_playground_is_offered() -> None:
    with pytest.raises(BaseModelError, match='there is no folder playgruond, did you mean "playground"'):
        load("playgruond")
