"""The build's figures and losses against closed forms and hand-made cases."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ether_diffusion.playground.build.autoencoder import SCALES, gradient_loss
from ether_diffusion.playground.build.clip import contrastive_loss, fits, map_loss
from ether_diffusion.playground.build.dino import TEMPERATURE, alike_loss
from ether_diffusion.playground.build.evaluate import seen_figures
from ether_diffusion.playground.build.judges import Judges
from ether_diffusion.playground.build.meanings import caption_meaning, scene_meanings
from ether_diffusion.playground.build.metrics import confusion, mean_iou, nearest_accuracy, psnr, share
from ether_diffusion.playground.build.views import crop, soften
from ether_diffusion.playground.world import (
    COLOURS,
    KINDS,
    Look,
    Scene,
    SceneObject,
    full_captions,
    random_scene,
    short_captions,
)


def test_psnr_is_the_closed_form_per_picture() -> None:
    originals = torch.zeros(2, 3, 4, 4)
    pictures = torch.stack([torch.full((3, 4, 4), 0.02), torch.full((3, 4, 4), 0.2)])
    # the range is 2, so the dB are 20 log10(2 / error): 40 and 20
    assert psnr(pictures, originals) == pytest.approx(30, abs=1e-5)


def test_miou_of_a_known_confusion_matrix() -> None:
    true = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    predicted = torch.tensor([[0, 0, 0, 1], [1, 1, 3, 3]])
    matrix = confusion(predicted, true, 4)
    assert matrix.tolist() == [[3, 1, 0, 0], [0, 2, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    # class 0: 3 of 4; class 1: 2 of 5; class 2 occurs nowhere; class 3: predicted twice, never right
    assert mean_iou(matrix) == pytest.approx((3 / 4 + 2 / 5 + 0) / 3)


def test_nearest_neighbour_goes_by_angle_not_by_length() -> None:
    gallery = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    queries = torch.tensor([[1.0, 0.1], [0.2, 3.0], [5.0, 6.0], [0.1, 0.09]])
    labels, gallery_labels = torch.tensor([7, 8, 7, 7]), torch.tensor([7, 8])
    assert nearest_accuracy(queries, labels, gallery, gallery_labels) == 0.75


def test_a_share_of_nothing_is_refused() -> None:
    assert share([True, False, True, True]) == 0.75
    with pytest.raises(ValueError, match="held_out"):
        share([])


def test_gradient_loss_of_a_ramp() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16) * 0.01 + 3
    # the steps double at each halving: 1, 2 and 4 times 0.01, in one direction only; the constant is free
    assert gradient_loss(ramp).item() == pytest.approx(0.07 / SCALES, rel=1e-4)


def test_contrastive_loss_is_infonce_without_duplicates() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(5)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_captions_that_fit_two_pictures_are_not_pushed_apart() -> None:
    fitting = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    logits = 50 * fitting.float()
    # the best that can be reached: log 2 for the two that are alike, 0 for the third
    assert contrastive_loss(logits, fitting).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-5)
    assert contrastive_loss(logits, torch.eye(3).bool()).item() == pytest.approx(2 / 3 * math.log(2), abs=1e-5)
    apart = 50 * torch.eye(3)
    assert contrastive_loss(apart, fitting).item() > 10


def scene(kind: str, colour: str, background: str) -> Scene:
    return Scene(background, (SceneObject(kind, Look(colour), (32, 40), 15),))


def test_a_caption_fits_exactly_the_scenes_that_it_is_true_of() -> None:
    scenes = [scene("robot", "red", "beach"), scene("robot", "blue", "beach"), scene("robot", "red", "snow")]
    scenes += [scene("fish", "red", "beach"), Scene("beach")]
    first = scenes[0]
    captions = {
        "a robot": [1, 1, 1, 0, 0],
        "a red robot": [1, 0, 1, 0, 0],
        "a robot on a beach": [1, 1, 0, 0, 0],
        "a beach": [1, 1, 0, 1, 1],
        "a photo of a red robot at the beach": [1, 0, 0, 0, 0],
    }
    assert set(captions) <= {*short_captions(first), *full_captions(first)}
    said = torch.tensor([caption_meaning(first, caption) for caption in captions])
    true = torch.tensor([scene_meanings(other) for other in scenes])
    assert fits(true, said).T.int().tolist() == list(captions.values())


def test_every_caption_of_the_world_is_true_of_its_own_scene() -> None:
    for index in range(50):
        each = random_scene(5, index)
        meanings = set(scene_meanings(each))
        assert {caption_meaning(each, caption) for caption in short_captions(each)} <= meanings
        assert {caption_meaning(each, caption) for caption in full_captions(each)[:20]} <= meanings


def test_the_alike_loss_picks_the_other_view_among_all_others() -> None:
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cosine = [[(a @ b / (a.norm() * b.norm())).item() for b in features] for a in features]
    total = 0.0
    for view, other in ((0, 2), (1, 3), (2, 0), (3, 1)):
        weights = [math.exp(cosine[view][k] / TEMPERATURE) if k != view else 0.0 for k in range(4)]
        total -= math.log(weights[other] / sum(weights))
    assert alike_loss(features).item() == pytest.approx(total / 4, rel=1e-9)


def test_the_map_loss_is_the_cross_entropy_of_every_pixel_with_its_patch() -> None:
    dice = torch.Generator().manual_seed(2)
    logits, maps = torch.randn(2, 4, 3, generator=dice), torch.randint(3, (2, 6, 6), generator=dice)
    by_pixel = logits.transpose(1, 2).unflatten(2, (2, 2)).repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert map_loss(logits, maps).item() == pytest.approx(F.cross_entropy(by_pixel, maps).item(), rel=1e-5)


def test_a_crop_of_everything_changes_nothing_and_a_smaller_one_magnifies() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(8, 3, 64, 64).contiguous()
    whole = crop(ramp, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole, ramp, atol=1e-5, rtol=0)
    parts = crop(ramp, 0.5, torch.Generator().manual_seed(0))
    spans = (parts[:, 0, 0, -1] - parts[:, 0, 0, 0]) / 2
    assert ((spans > 0.48) & (spans < 1.0)).all()
    assert spans.unique().numel() == 8


def test_softening_blurs_and_never_shifts() -> None:
    dot = torch.zeros(16, 3, 9, 9)
    dot[:, :, 4, 4] = 1
    soft = soften(dot, torch.Generator().manual_seed(0)).mean((0, 1))
    assert 1 / 9 < soft[4, 4] < 1
    assert soft[3, 4] == pytest.approx(soft[5, 4].item(), abs=0.05)
    assert soft[3, 4] > soft[1, 4] + 0.02


@dataclass
class Answers:
    """A judge that knows what to say."""

    said: list[tuple[str, str, str]]

    def kinds(self, pictures: Tensor) -> list[str]:
        return [kind for kind, _, _ in self.said]

    def colours(self, pictures: Tensor) -> list[str]:
        return [colour for _, colour, _ in self.said]

    def backgrounds(self, pictures: Tensor) -> list[str]:
        return [background for _, _, background in self.said]


def test_seen_figures_count_classes_coats_and_backgrounds() -> None:
    two = Look("red", "striped", "blue")
    scenes = [scene("robot", "red", "beach"), scene("fish", "pink", "snow")]
    scenes += [Scene("night", (SceneObject("ball", two, (32, 40), 15),)) for _ in range(2)]
    said = [("robot", "red", "beach"), ("fish", "red", "beach"), ("box", "blue", "night"), ("ball", "green", "night")]
    assert seen_figures(Answers(said), scenes, torch.zeros(4, 3, 64, 64)) == {
        "class": 3 / 4,
        "colour": 2 / 4,
        "colour_plain": 1 / 2,
        "colour_patterned": 1 / 2,
        "background": 3 / 4,
    }


class Cosines(Judges):
    """CLIP's answers with invented cosines."""

    def __init__(self, cosines: dict[str, float]) -> None:
        self.invented, self.clip = cosines, torch.nn.Module()
        self.clip.logit_scale = torch.tensor(math.log(100.0))

    def cosines(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([[self.invented.get(prompt, 0.0) for prompt in prompts]])


def test_the_colour_is_the_likeliest_over_all_classes() -> None:
    # green has the best prompt, but red adds up to more over eight good ones
    cosines = {f"a photo of a red {kind}": 0.50 for kind in KINDS} | {"a photo of a green robot": 0.51}
    cosines["a photo of an orange box"] = 0.40
    assert 8 * math.exp(50) > math.exp(51)
    assert Cosines(cosines).colours(torch.zeros(1)) == ["red"]
    cosines["a photo of an orange box"] = 0.60
    assert Cosines(cosines).colours(torch.zeros(1)) == ["orange"]
    assert set(COLOURS) >= {"red", "orange", "green"}
