"""Depth: the scale of 0 to 255, RMSE by hand, and a real DPT from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    SegformerConfig,
    SegformerForImageClassification,
)

from ether_diffusion.metrics.depth import DepthEstimator, depth_rmse, to_8_bit_range
from ether_diffusion.playground.world import draw, random_scene


def test_rmse_by_hand() -> None:
    depth = np.array([[0.0, 255.0], [100.0, 50.0]])
    assert depth_rmse(depth, depth) == 0
    assert depth_rmse(depth, np.array([[3, 255], [96, 50]], np.uint8)) == pytest.approx((25 / 4) ** 0.5)
    with pytest.raises(ValueError, match="cannot be compared"):
        depth_rmse(depth, depth[:1])


def test_every_map_is_stretched_by_itself() -> None:
    depth = np.array([[2.0, 4.0], [3.0, 2.5]], np.float32)
    np.testing.assert_allclose(to_8_bit_range(depth), [[0, 255], [127.5, 63.75]])
    np.testing.assert_allclose(to_8_bit_range(7 * depth - 3), to_8_bit_range(depth), atol=1e-4)
    assert (to_8_bit_range(np.full((2, 2), 5, np.float32)) == 0).all()


@pytest.fixture
def dpt(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = DPTConfig(
        **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16},
        **{"image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3]},
        **{"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8},
    )
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


def test_a_dpt_from_a_folder(dpt: Path) -> None:
    estimator = DepthEstimator(str(dpt))
    pictures = [draw(random_scene(21, index)).image.resize((48, 40)) for index in range(2)]
    seen = list(estimator.maps(pictures))
    model, processor = DPTForDepthEstimation.from_pretrained(dpt).eval(), DPTImageProcessorPil.from_pretrained(dpt)
    with torch.no_grad():
        said = model(**processor(images=pictures, return_tensors="pt")).predicted_depth
    said = F.interpolate(said[:, None], (40, 48), mode="bicubic")[:, 0].numpy()
    for depth, raw in zip(seen, said, strict=True):
        assert depth.shape == (40, 48)
        np.testing.assert_allclose(depth, (raw - raw.min()) / np.ptp(raw) * 255, atol=0.05)


def test_what_is_no_depth_model_is_refused(dpt: Path) -> None:
    config = SegformerConfig(num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1])
    SegformerForImageClassification(config).save_pretrained(dpt)
    with pytest.raises(ValueError, match="SegformerForImageClassification, which is no model for depth estimation"):
        DepthEstimator(str(dpt))
    with pytest.raises(ValueError, match="the playground is flat"):
        DepthEstimator("playground")
