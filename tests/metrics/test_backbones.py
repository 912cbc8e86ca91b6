"""The playground's judges through the loader that takes any backbone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from ether_diffusion import playground
from ether_diffusion.metrics.backbones import BATCH, Clip, Dino
from ether_diffusion.playground.world import draw, random_scene


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw(random_scene(3, index)).image for index in range(5)]


def pixels(pictures: list[Image.Image]) -> Tensor:
    """[-1, 1], as the playground's models take them, by arithmetic."""
    return torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures]) / 127.5 - 1).permute(0, 3, 1, 2)


def test_dino_is_the_unit_cls_token(pictures: list[Image.Image]) -> None:
    features = Dino("playground").image_features(pictures)
    vit = ViTModel.from_pretrained(playground.BASE / "judges" / "dino", add_pooling_layer=False, dtype=torch.float32)
    with torch.no_grad():
        cls = vit.eval()(pixel_values=pixels(pictures)).last_hidden_state[:, 0]
    torch.testing.assert_close(features, cls / cls.norm(dim=-1, keepdim=True), atol=1e-5, rtol=0)


def test_clip_gives_the_models_own_cosines(pictures: list[Image.Image]) -> None:
    prompts = ["a red robot on a beach", "a ball", "a small green fish under a night sky"]
    judge = Clip("playground")
    cosines = judge.image_features(pictures) @ judge.text_features(prompts).T
    folder = playground.BASE / "judges" / "clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(prompts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels(pictures), **tokens).logits_per_image
    torch.testing.assert_close(cosines, logits / model.logit_scale.exp(), atol=1e-5, rtol=0)


def test_a_folder_does_as_well_as_the_name(pictures: list[Image.Image], tmp_path: Path) -> None:
    shutil.copytree(playground.BASE / "judges" / "dino", tmp_path / "vit")
    named, folder = Dino("playground"), Dino(str(tmp_path / "vit"))
    torch.testing.assert_close(named.image_features(pictures), folder.image_features(pictures), atol=0, rtol=0)


def test_many_images_go_in_batches(pictures: list[Image.Image]) -> None:
    judge = Dino("playground")
    many = [pictures[index % 5] for index in range(BATCH + 3)]
    torch.testing.assert_close(judge.image_features(many)[-1:], judge.image_features(many[-1:]), atol=1e-5, rtol=0)


def test_grey_and_transparent_images_are_seen_in_rgb(pictures: list[Image.Image]) -> None:
    judge = Dino("playground")
    grey = pictures[0].convert("L")
    same = judge.image_features([grey, grey.convert("RGB"), pictures[1].convert("RGBA"), pictures[1]])
    torch.testing.assert_close(same[0], same[1])
    torch.testing.assert_close(same[2], same[3])


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        Dino("playground").image_features([])
