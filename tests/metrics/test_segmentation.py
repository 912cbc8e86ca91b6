"""Maps: one confusion matrix, equal to torchmetrics', and segmenters of every kind through one loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import (
    ConvNextConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessorPil,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ether_diffusion.metrics.segmentation import (
    MapIds,
    Segmenter,
    class_table,
    map_confusion,
    segmentation_scores,
)
from ether_diffusion.playground.world import Region, draw, random_scene

CLASSES = 7


def maps(seed: int, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and ids of 5 of the 7 classes (a sixth only predicted), two thirds of the pixels right, some 255."""
    dice = np.random.default_rng(seed)
    ids = dice.integers(0, 5, (count, 20, 30))
    predicted = np.where(dice.random(ids.shape) < 0.6, ids, dice.integers(0, 6, ids.shape))
    return predicted, np.where(dice.random(ids.shape) < 0.1, 255, ids)


def total(predicted: np.ndarray, ids: np.ndarray, labels: MapIds) -> torch.Tensor:
    return torch.stack([map_confusion(p, i, labels) for p, i in zip(predicted, ids, strict=True)]).sum(0)


def test_miou_is_torchmetrics_over_the_dataset_and_not_the_mean_of_images() -> None:
    predicted, ids = maps(0)
    found = segmentation_scores(total(predicted, ids, MapIds(CLASSES)))
    oracle = MulticlassJaccardIndex(CLASSES, ignore_index=255, average="macro")
    for p, i in zip(predicted, ids, strict=True):
        oracle.update(torch.from_numpy(p), torch.from_numpy(i))
    assert found["miou"] == pytest.approx(oracle.compute().item(), abs=1e-6)
    counted = ids != 255
    assert found["aacc"] == pytest.approx((predicted == ids)[counted].mean(), abs=1e-12)
    recalls = [(predicted == c)[ids == c].mean() for c in range(5)]  # of the classes that the maps have
    assert found["macc"] == pytest.approx(np.mean(recalls), abs=1e-12)
    of_images = [
        segmentation_scores(map_confusion(p, i, MapIds(CLASSES)))["miou"] for p, i in zip(predicted, ids, strict=True)
    ]
    assert abs(np.mean(of_images) - found["miou"]) > 1e-4


def test_a_shuffled_dataset_has_the_same_matrix() -> None:
    predicted, ids = maps(1)
    order = np.random.default_rng(2).permutation(len(ids))
    assert torch.equal(total(predicted, ids, MapIds(CLASSES)), total(predicted[order], ids[order], MapIds(CLASSES)))


def test_a_perfect_prediction_scores_exactly_one() -> None:
    _, ids = maps(3)
    assert segmentation_scores(total(np.where(ids == 255, 4, ids), ids, MapIds(CLASSES))) == {
        "miou": 1.0,
        "macc": 1.0,
        "aacc": 1.0,
    }


def test_ignore_index_and_label_offset_by_hand() -> None:
    # the file's ids 1, 2, 3 are the classes 0, 1, 2; 0 is "other", 9 is ignored
    ids = np.array([[0, 1, 1, 2], [9, 2, 2, 1]])
    predicted = np.array([[2, 0, 1, 1], [0, 1, 1, 0]])
    matrix = map_confusion(predicted, ids, MapIds(3, offset=1, ignore_index=9))
    assert matrix.tolist() == [[2, 1, 0], [0, 3, 0], [0, 0, 0]]
    assert segmentation_scores(matrix) == pytest.approx(
        {"miou": (2 / 3 + 3 / 4) / 2, "macc": (2 / 3 + 1) / 2, "aacc": 5 / 6}
    )
    assert map_confusion(predicted, np.where(ids == 9, 3, ids), MapIds(3, 1, None)).tolist() == [
        [2, 1, 0],
        [0, 3, 0],
        [1, 0, 0],
    ]
    with pytest.raises(ValueError, match=r"ids 9, but the segmenter's 3 classes are the ids 1 to 3; --ignore_index"):
        map_confusion(predicted, ids, MapIds(3, 1, None))
    with pytest.raises(ValueError, match=r"2, 4\) pixels cannot be compared"):
        map_confusion(predicted, ids[:1], MapIds(3, 1, 9))


def test_classes_that_occur_nowhere_are_left_out_and_those_without_pixels_have_no_accuracy() -> None:
    matrix = torch.tensor([[3, 1, 0, 0], [0, 2, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert class_table(matrix, ["sky", "sea", "sand", "hill"]) == [
        {"id": 0, "name": "sky", "iou": 3 / 4, "accuracy": 3 / 4, "pixels": 4, "predicted": 3},
        {"id": 1, "name": "sea", "iou": 2 / 5, "accuracy": 2 / 4, "pixels": 4, "predicted": 3},
        {"id": 3, "name": "hill", "iou": 0.0, "accuracy": None, "pixels": 0, "predicted": 2},
    ]
    nothing = segmentation_scores(torch.zeros(3, 3, dtype=torch.long))
    assert all(np.isnan(value) for value in nothing.values())


def test_the_playgrounds_segmenter_knows_the_playgrounds_scenes() -> None:
    segmenter = Segmenter("playground")
    assert segmenter.names == [region.name.lower() for region in Region]
    assert segmenter.label_offset == 0
    drawings = [draw(random_scene(11, index)) for index in range(8)]
    seen = np.stack(list(segmenter.maps([drawing.image for drawing in drawings])))
    matrix = total(seen, np.stack([drawing.semantic_map for drawing in drawings]), MapIds(len(Region)))
    assert segmentation_scores(matrix)["aacc"] > 0.97
    assert set(segmenter.identity) == {"model", "weights", "preprocessing"}


def test_images_are_seen_at_their_own_sizes_whatever_their_neighbours_are() -> None:
    segmenter = Segmenter("playground")
    pictures = [draw(random_scene(12, index)).image for index in range(3)]
    pictures[1] = pictures[1].resize((96, 80))
    together = list(segmenter.maps(pictures))
    assert [each.shape for each in together] == [(64, 64), (80, 96), (64, 64)]
    for picture, seen in zip(pictures, together, strict=True):
        (alone,) = segmenter.maps([picture])
        assert (alone == seen).mean() > 0.999  # sums of another order


NAMES = {number: f"class {number}" for number in range(CLASSES)}
SWIN = {
    **{"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    **{"window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
MASKS = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_attention_heads": 2}


def segformer() -> SegformerForSemanticSegmentation:
    config = SegformerConfig(
        num_encoder_blocks=2,
        **{"depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2]},
        **{"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8, "id2label": NAMES},
    )
    return SegformerForSemanticSegmentation(config)


def upernet() -> UperNetForSemanticSegmentation:
    backbone = ConvNextConfig(
        **{"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, id2label=NAMES
    )
    return UperNetForSemanticSegmentation(config)


def mask2former() -> Mask2FormerForUniversalSegmentation:
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**SWIN), dim_feedforward=16, id2label=NAMES, **widths, **MASKS
    )
    return Mask2FormerForUniversalSegmentation(config)


def maskformer() -> MaskFormerForInstanceSegmentation:
    from transformers import DetrConfig

    decoder = DetrConfig(
        d_model=32,
        **{"num_queries": 5, "decoder_layers": 1, "encoder_layers": 1, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16},
        **{"decoder_attention_heads": 2, "encoder_attention_heads": 2},
    )
    config = MaskFormerConfig(
        backbone_config=SwinConfig(**SWIN),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        id2label=NAMES,
    )
    return MaskFormerForInstanceSegmentation(config)


PROCESSORS = {
    segformer: SegformerImageProcessorPil(size={"height": 64, "width": 64}, do_reduce_labels=True),
    upernet: SegformerImageProcessorPil(size={"height": 64, "width": 64}),
    mask2former: Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, do_reduce_labels=True),
    maskformer: MaskFormerImageProcessorPil(size={"height": 64, "width": 64}),
}


@pytest.mark.parametrize("build", list(PROCESSORS))
def test_every_kind_of_segmenter_loads_from_a_folder_and_sees_what_its_processor_says(
    build: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, processor = build().eval(), PROCESSORS[build]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_predictor" in name or "mask_embedder" in name:
                parameter.mul_(30)  # untrained masks would say the same of all pixels
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    segmenter = Segmenter(str(tmp_path))
    assert segmenter.names == list(NAMES.values())
    assert segmenter.label_offset == int(bool(processor.do_reduce_labels))
    pictures = [draw(random_scene(13, index)).image.resize((72, 56)) for index in range(3)]
    seen = np.stack(list(segmenter.maps(pictures)))
    assert seen.shape == (3, 56, 72)
    with torch.no_grad():
        outputs = model(**processor(images=pictures, return_tensors="pt"))
    said = processor.post_process_semantic_segmentation(outputs, target_sizes=[(56, 72)] * 3)
    assert (seen == torch.stack(list(said)).numpy()).mean() > 0.999
    assert len(np.unique(seen)) > 1


def test_what_is_no_segmenter_or_not_whole_is_refused(tmp_path: Path) -> None:
    PROCESSORS[segformer].save_pretrained(tmp_path)
    model = segformer()
    SegformerForImageClassification(model.config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="SegformerForImageClassification, which is no model for semantic segmentation"
    ):
        Segmenter(str(tmp_path))
    state = {key: value for key, value in model.state_dict().items() if "classifier" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 2 of its weights, decode_head.classifier.bias among them"):
        Segmenter(str(tmp_path))
    with pytest.raises(OSError):
        Segmenter(str(tmp_path / "nowhere"))


def test_a_batch_of_paths_is_read_when_its_turn_comes(tmp_path: Path) -> None:
    draw(random_scene(14, 0)).image.save(tmp_path / "0.png")
    (seen,) = Segmenter("playground").maps([tmp_path / "0.png"])
    (same,) = Segmenter("playground").maps([Image.open(tmp_path / "0.png")])
    assert (seen == same).all()
