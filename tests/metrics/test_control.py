"""Control accuracy of lists of pictures: sums over pictures, spread over sample numbers, sizes, failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.control.conditions import canny, colour_map
from ether_diffusion.metrics import distribution
from ether_diffusion.metrics.backbones import Clip, Picture, as_rgb
from ether_diffusion.metrics.control import ControlScores, score_control
from ether_diffusion.metrics.control_tasks import (
    Canny,
    ControlTask,
    Depth,
    Landmarks,
    MeanTask,
    Measure,
    Pair,
    Segmentation,
    SoftEdges,
    read_grey,
)
from ether_diffusion.metrics.control_tasks.base import Compared
from ether_diffusion.metrics.depth import DepthEstimator
from ether_diffusion.metrics.distribution import frechet_distance, kernel_distance
from ether_diffusion.metrics.segmentation import MapIds, Segmenter, map_confusion, segmentation_scores
from ether_diffusion.playground.world import draw, full_captions, random_scene


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter("playground")


def scenes(count: int, seed: int = 31) -> list[Pair]:
    found = []
    for index in range(count):
        scene = random_scene(seed, index)
        drawing = draw(scene)
        found.append(Pair(f"{index}.png", drawing.image, drawing.semantic_map, full_captions(scene)[0]))
    return found


def noised(picture: Image.Image, deviation: float, seed: int) -> Image.Image:
    values = np.asarray(picture) + np.random.default_rng(seed).normal(0, deviation, (*picture.size[::-1], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def original(pair: Pair) -> Image.Image:
    assert isinstance(pair.original, Image.Image)
    return pair.original


def test_maps_are_scored_by_one_matrix_per_sample_number_and_one_of_all(segmenter: Segmenter) -> None:
    pairs = scenes(9)
    samples = [[noised(original(pair), 15 * (k + 1), 10 * i + k) for k in range(3)] for i, pair in enumerate(pairs)]
    found = score_control(pairs, samples, Segmentation(segmenter))
    matrices = []
    for number in range(3):
        seen = segmenter.maps([of_pair[number] for of_pair in samples])
        matrices.append(
            sum(map_confusion(s, np.asarray(p.condition), MapIds(17)) for s, p in zip(seen, pairs, strict=True))
        )
    by_number = [segmentation_scores(torch.as_tensor(matrix))["miou"] for matrix in matrices]
    score = found.scores["miou"]
    assert score["by_number"] == pytest.approx(by_number, abs=2e-3)  # batches of another size
    assert score["mean"] == pytest.approx(np.mean(score["by_number"]))
    assert score["spread"] == pytest.approx(np.std(score["by_number"], ddof=1))
    overall = segmentation_scores(torch.as_tensor(sum(matrices)))["miou"]
    assert score["overall"] == pytest.approx(overall, abs=2e-3)
    assert found.originals["miou"] == pytest.approx(found.mean("miou"), abs=0.2)
    assert found.originals["miou"] > found.mean("miou")
    assert score_control(pairs, samples, Segmentation(segmenter), originals=False).originals == {}
    assert (found.pairs, found.pictures, found.samples_per_pair) == (9, 27, 3)
    assert found.conditions == {"given": 9, "computed": 0}
    assert found.choices["label offset"] == 0
    assert found.choices["ignore index"] == 255
    assert [(row["pair"], row["number"]) for row in found.rows[:4]] == [
        ("0.png", 0),
        ("0.png", 1),
        ("0.png", 2),
        ("1.png", 0),
    ]
    assert {row["name"] for row in found.classes} <= set(segmenter.names)


def test_a_shuffled_dataset_has_the_same_scores_and_classes(segmenter: Segmenter) -> None:
    pairs = scenes(8)
    samples = [[noised(original(pair), 30, i)] for i, pair in enumerate(pairs)]
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    first = score_control(pairs, samples, Segmentation(segmenter))
    second = score_control([pairs[i] for i in order], [samples[i] for i in order], Segmentation(segmenter))
    assert first.classes == second.classes
    assert first.scores == second.scores


def tasks(segmenter: Segmenter) -> list[ControlTask]:
    def detect(picture: Image.Image | Path) -> Image.Image:
        assert isinstance(picture, Image.Image)
        return picture.convert("L")

    def points(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture, float)[:34, 0, :2].repeat(2, 0)

    return [
        Segmentation(segmenter),
        Segmentation(segmenter, label_offset=1),
        Canny(),
        SoftEdges(detect, "grey values", 3),
        Landmarks(points, "colours of the left border"),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_perfect_generator_scores_exactly_one(segmenter: Segmenter, number: int) -> None:
    pairs = [Pair(pair.name, pair.original, None, pair.prompt) for pair in scenes(6)]
    task = tasks(segmenter)[number]
    found = score_control(pairs, [[original(pair)] * 2 for pair in pairs], task)
    for measure in task.measures:
        assert found.scores[measure.key] == {
            "mean": float(measure.higher_is_better),
            "spread": 0.0,
            "overall": float(measure.higher_is_better),
            "by_number": [float(measure.higher_is_better)] * 2,
        }
    assert found.conditions == {"given": 0, "computed": 6}
    assert found.originals == {}


def test_maps_that_the_segmenter_itself_drew_are_kept_exactly(segmenter: Segmenter) -> None:
    pictures = [original(pair) for pair in scenes(5)]
    maps = list(segmenter.maps(pictures))
    for offset in (0, 1):
        pairs = [Pair(str(i), p, m + offset) for i, (p, m) in enumerate(zip(pictures, maps, strict=True))]
        found = score_control(pairs, [[picture] for picture in pictures], Segmentation(segmenter, offset))
        assert found.mean("miou") == found.mean("aacc") == found.originals["macc"] == 1.0


def test_other_pictures_score_worse_than_noised_ones(segmenter: Segmenter) -> None:
    pairs = scenes(8)
    near = score_control(pairs, [[noised(original(p), 10, 0)] for p in pairs], Segmentation(segmenter))
    far = score_control(pairs, [[original(p)] for p in scenes(8, seed=99)], Segmentation(segmenter))
    assert near.mean("miou") > 0.85
    assert far.mean("miou") < 0.3
    edges = [
        score_control([Pair(p.name, p.original) for p in pairs], pictures, Canny()).mean("f1")
        for pictures in ([[noised(original(p), 10, 0)] for p in pairs], [[original(p)] for p in scenes(8, seed=99)])
    ]
    assert edges[0] > edges[1] + 0.2


class MeanColours:
    """Three features of a picture that anybody can recompute."""

    identity: ClassVar = {"model": "mean colours"}

    def raw_features(self, images: Sequence[Picture], show: str | None = None) -> Tensor:
        return torch.stack([torch.from_numpy(np.asarray(as_rgb(image), np.float64).mean((0, 1))) for image in images])


def test_clip_t_is_its_own_function(segmenter: Segmenter) -> None:
    pairs = scenes(6)
    samples = [[noised(original(pair), 20, i), noised(original(pair), 60, i)] for i, pair in enumerate(pairs)]
    clip = Clip("playground")
    found = score_control(pairs, samples, Segmentation(segmenter), clip, MeanColours())  # type: ignore[arg-type]
    said = clip.text_features([str(pair.prompt) for pair in pairs])
    cosines = [(clip.image_features([s[k] for s in samples]) * said).sum(1).mean().item() for k in range(2)]
    assert found.scores["clip_t"]["by_number"] == pytest.approx(cosines, abs=1e-5)
    assert found.originals["clip_t"] > found.mean("clip_t")
    assert [measure.key for measure in found.measures] == ["miou", "macc", "aacc", "clip_t"]
    assert set(found.judges) == {"segmenter", "clip"}  # nothing was compared by features
    sizes = "there are 3 real and 6 generated images."
    assert f"KID is left out: it needs 256 images of each kind, {sizes}" in found.warnings
    assert any("FID is left out" in warning and sizes in warning for warning in found.warnings)
    without = score_control(pairs, samples, Segmentation(segmenter), clip, prompts=[["a box", None]] * 6)
    assert without.scores["clip_t"]["by_number"][1] is None
    assert without.scores["clip_t"]["mean"] is None
    assert "6 of 12 pictures have no prompt, and no CLIP-T." in without.warnings


class Anything(MeanTask):
    """A task that costs nothing, for sets of thousands of pictures."""

    name: ClassVar = "anything"
    measures: ClassVar = (Measure("one", "One"),)
    filter: ClassVar = Image.Resampling.NEAREST

    def _see(self, pictures: Sequence[Picture]) -> Sequence[int]:
        return [0] * len(pictures)

    def _compare(self, seen: int, reference: int) -> Compared:
        return self._row({"one": 1.0})


def dots(count: int, seed: int) -> list[Image.Image]:
    """Pictures of a single pixel each, whose colours are their features."""
    colours = np.random.default_rng(seed).integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    return [Image.fromarray(colour) for colour in colours]


def score_dots(
    pictures: Sequence[Picture], samples: Sequence[Sequence[Picture]], **more: Any
) -> tuple[ControlScores, Callable[[Sequence[Picture]], Tensor]]:
    """Score pairs by the mean colours of their pictures; return the scores and what gives the features."""
    judge = MeanColours()
    pairs = [Pair(str(number), picture) for number, picture in enumerate(pictures)]
    return score_control(pairs, samples, Anything(), None, judge, **more), judge.raw_features  # type: ignore[arg-type]


def kid(real: Tensor, generated: Tensor, size: int | None = None) -> float:
    return float(kernel_distance(real, generated, size)["kid"])


@pytest.fixture
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "FID_ENOUGH", 6)
    monkeypatch.setattr(distribution, "KID_ENOUGH", 6)


def test_fid_and_kid_of_many_pictures_are_those_of_the_halves() -> None:
    originals, drawn = dots(4096, 0), dots(4096, 1)
    found, features = score_dots(originals, [[picture] for picture in drawn], kid_subset_size=50)
    real, generated = features(originals[1::2]), features(drawn[::2])
    assert len(real) == 2048
    assert found.mean("fid") == pytest.approx(frechet_distance(real, generated))
    assert found.mean("kid") == pytest.approx(kid(real, generated, 50))
    other_half = features(originals[::2])
    assert found.originals["fid"] == pytest.approx(frechet_distance(real, other_half))
    assert found.originals["kid"] == pytest.approx(kid(real, other_half, 50))
    assert found.warnings == []
    assert found.choices["FID and KID"].startswith(
        "2,048 pictures of every second pair against 2,048 originals of the pairs between;"
    )
    assert found.judges["features"] == MeanColours.identity


@pytest.mark.parametrize(("pairs", "left"), [(4095, ["one", "kid"]), (512, ["one", "kid"]), (511, ["one"])])
def test_too_few_pairs_have_no_fid_and_no_kid_but_a_reason(pairs: int, left: list[str]) -> None:
    originals = dots(pairs, 0)
    found, _ = score_dots(originals, [[picture] for picture in originals], kid_subset_size=50)
    assert [measure.key for measure in found.measures] == list(found.scores) == left
    sets = f"there are {pairs // 2:,} real and {pairs - pairs // 2:,} generated images."
    reasons = [f"FID is left out: it needs 2,048 images of each kind with these features, {sets}"]
    reasons += [] if "kid" in left else [f"KID is left out: it needs 256 images of each kind, {sets}"]
    assert found.warnings == reasons


@pytest.mark.usefixtures("few_are_enough")
def test_fid_needs_more_pictures_than_features_have_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    three = MeanColours.raw_features
    monkeypatch.setattr(MeanColours, "raw_features", lambda *given: three(*given).repeat(1, 4))
    for pairs, left in ((24, ["one", "kid"]), (26, ["one", "fid", "kid"])):
        found, _ = score_dots(dots(pairs, 0), [[picture] for picture in dots(pairs, 1)])
        assert list(found.scores) == left
    (reason,) = score_dots(dots(24, 0), [[picture] for picture in dots(24, 1)])[0].warnings
    assert reason.startswith("FID is left out: it needs 13 images of each kind with these features, there are 12 real")


@pytest.mark.usefixtures("few_are_enough")
def test_copies_of_the_originals_are_no_nearer_than_the_other_half() -> None:
    """Sets of the same pictures have FID 0, and always a KID below 0."""
    coupled, found_kids = [], []
    for seed in range(40):
        originals = dots(24, seed)
        found, features = score_dots(originals, [[picture] for picture in originals])
        coupled.append(kid(features(originals), features(originals)))
        found_kids.append(found.mean("kid"))
        assert found.mean("fid") == found.originals["fid"] > 1
        assert frechet_distance(features(originals), features(originals)) == pytest.approx(0, abs=1e-6)
    assert max(coupled) < 0
    error = np.std(found_kids, ddof=1) / len(found_kids) ** 0.5
    assert abs(np.mean(found_kids)) < 4 * error < abs(np.mean(coupled))  # without bias


@pytest.mark.usefixtures("few_are_enough")
def test_several_samples_give_a_score_each() -> None:
    originals, drawn = dots(13, 0), [dots(13, 1), dots(13, 2)]
    samples: list[list[Picture]] = [list(of_pair) for of_pair in zip(*drawn, strict=True)]
    samples[0].append(originals[0])  # not all pairs have it: it counts only in all as one set
    found, features = score_dots(originals, samples)
    real = features(originals[1::2])
    everything = features([picture for of_pair in samples[::2] for picture in of_pair])
    assert len(everything) == 15
    for key, distance in (("fid", frechet_distance), ("kid", kid)):
        expected = [distance(real, features(each[::2])) for each in drawn]
        assert found.scores[key]["by_number"] == pytest.approx(expected)
        assert found.scores[key]["spread"] == pytest.approx(np.std(expected, ddof=1))
        assert found.scores[key]["overall"] == pytest.approx(distance(real, everything))
    assert "fid" not in score_dots(originals, samples, originals=False)[0].originals


@pytest.mark.usefixtures("few_are_enough")
def test_other_real_images_are_held_against_all_pictures() -> None:
    originals, drawn, others = dots(8, 0), dots(8, 1), dots(20, 2)
    found, features = score_dots(originals, [[picture] for picture in drawn], unrelated=others)
    assert found.mean("fid") == pytest.approx(frechet_distance(features(others), features(drawn)))
    assert found.originals["fid"] == pytest.approx(frechet_distance(features(others), features(originals)))
    assert found.choices["FID and KID"].startswith("8 pictures against 20 other real images;")
    nothing, _ = score_dots(originals, [[picture] for picture in drawn], unrelated=[])
    assert "there are 0 real and 8 generated images" in nothing.warnings[0]  # and no split instead
    few, features = score_dots(originals[:4], [drawn[:2], drawn[2:4], drawn[4:6], drawn[6:]], unrelated=others)
    assert few.scores["fid"]["mean"] is None
    assert few.scores["fid"]["overall"] == pytest.approx(frechet_distance(features(others), features(drawn)))
    assert few.warnings[0] == "FID is of all samples as one set only: 4 pictures, one of each pair, are too few."


@pytest.mark.usefixtures("few_are_enough")
def test_an_original_is_never_compared_with_the_pictures_that_were_drawn_for_it(tmp_path: Path) -> None:
    originals, drawn = dots(12, 0), [[picture] for picture in dots(12, 1)]
    others = [originals[3], *dots(9, 2), originals[4]]
    found, features = score_dots(originals, drawn, unrelated=others)
    generated = features([picture for (picture,) in drawn])
    assert found.mean("fid") == pytest.approx(frechet_distance(features(others[1:-1]), generated))
    assert found.warnings == ["FID and KID leave out 2 of the real images: the scored pictures were drawn for them."]
    assert found.choices["FID and KID"].startswith("12 pictures against 9 other real images;")

    paths = [tmp_path / f"{number}.png" for number in range(16)]
    for picture, path in zip(dots(16, 3), paths, strict=True):
        picture.save(path)
    (tmp_path / "link.png").symlink_to(paths[0])
    pairs = [paths[0], tmp_path / "link.png", *paths[2:]]  # one original, two pairs, one in each half
    found, _ = score_dots(pairs, [[picture] for picture in dots(16, 4)])
    assert found.warnings == ["FID and KID leave out 1 of the real images: the scored pictures were drawn for them."]
    assert "against 7 originals of the pairs between" in found.choices["FID and KID"]


def test_unequal_numbers_of_samples_are_told(segmenter: Segmenter) -> None:
    pairs = scenes(3)
    samples = [[original(pair)] * count for pair, count in zip(pairs, (3, 2, 3), strict=True)]
    found = score_control(pairs, samples, Segmentation(segmenter))
    assert (found.samples_per_pair, found.pictures) == (2, 8)
    assert len(found.scores["miou"]["by_number"]) == 2
    assert any("Not all pairs have equally many" in warning for warning in found.warnings)
    with pytest.raises(ValueError, match=r"1 pairs have no picture: 1.png"):
        score_control(pairs, [samples[0], [], samples[2]], Segmentation(segmenter))
    with pytest.raises(ValueError, match="every one of 3 pairs needs its pictures, 2 lists"):
        score_control(pairs, samples[:2], Segmentation(segmenter))


def test_another_size_is_an_error_unless_it_is_to_be_resized(segmenter: Segmenter) -> None:
    (pair,) = scenes(1)
    large = Pair("0.png", original(pair), np.kron(np.asarray(pair.condition), np.ones((2, 2), int)))
    with pytest.raises(
        ValueError, match=r"0.png: the condition has 128 x 128 pixels, the generated picture 64 x 64; --resize"
    ):
        score_control([large], [[original(pair)]], Segmentation(segmenter))
    found = score_control([large], [[original(pair)]], Segmentation(segmenter, resize=True))
    assert found.scores == score_control([pair], [[original(pair)]], Segmentation(segmenter)).scores  # nearest
    assert found.choices["other sizes"] == "conditions nearest, originals lanczos"
    plain = Pair("0.png", original(pair).resize((96, 96)))
    with pytest.raises(ValueError, match=r"the original has 96 x 96 pixels"):
        score_control([plain], [[original(pair)]], Canny())
    assert 0 < score_control([plain], [[original(pair)]], Canny(resize=True)).mean("f1") < 1
    small = Pair("0.png", original(pair).resize((32, 32)), pair.condition)
    found = score_control([small], [[original(pair)]], Segmentation(segmenter))
    assert found.originals == {}
    assert any("The originals are not in the table: 0.png: the condition has 64 x 64" in w for w in found.warnings)


def test_conditions_in_files_are_what_they_should_be(segmenter: Segmenter, tmp_path: Path) -> None:
    (pair,) = scenes(1)
    picture, ids = original(pair), np.asarray(pair.condition)
    for name, image in {"ids": Image.fromarray(ids), "colours": colour_map(ids), "edges": canny(picture)}.items():
        image.save(tmp_path / f"{name}.png")
    for name in ("ids", "colours", "edges"):
        files = Pair("0.png", picture, tmp_path / f"{name}.png")
        if name == "ids":
            assert score_control([files], [[picture]], Segmentation(segmenter)).mean("aacc") > 0.95
        else:
            with pytest.raises(ValueError, match=rf"0.png: .*{name}.png: a semantic map holds one class id per pixel"):
                score_control([files], [[picture]], Segmentation(segmenter))
        if name == "edges":
            assert score_control([files], [[picture]], Canny()).mean("f1") == 1.0
        else:
            complaint = "has colours" if name == "colours" else "no picture of white edges on black"
            with pytest.raises(ValueError, match=f"0.png: the condition {complaint}|0.png: .*{complaint}"):
                score_control([files], [[picture]], Canny())
    with pytest.raises(ValueError, match=r"0.png: the map has the ids 40, but the segmenter's 17 classes"):
        score_control([Pair("0.png", picture, np.full((64, 64), 40))], [[picture]], Segmentation(segmenter))
    with pytest.raises(ValueError, match=r"0.png: a map is class ids"):
        score_control([Pair("0.png", picture, np.zeros((64, 64)))], [[picture]], Segmentation(segmenter))
    with pytest.raises(ValueError, match="grey picture of 8 bits"):
        read_grey(np.zeros((2, 2)))


def test_failed_landmarks_are_counted_and_never_dropped() -> None:
    faces = {10: None, 20: np.zeros((68, 2)), 30: np.full((68, 2), 3.0)}

    def detect(picture: Image.Image) -> np.ndarray | None:
        return faces[picture.getpixel((0, 0))[0]]  # type: ignore[index]

    def shade(value: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (value, 0, 0))

    pairs = [Pair(str(i), shade(value)) for i, value in enumerate((20, 20, 10))]
    samples = [[shade(30), shade(20)], [shade(10), shade(20)], [shade(20), shade(20)]]
    found = score_control(pairs, samples, Landmarks(detect, "by shade"))
    assert found.scores["distance"]["by_number"] == pytest.approx([3 * 2**0.5, 0])
    assert found.scores["failed"]["by_number"] == [1, 0]
    assert found.scores["failed_share"]["by_number"] == [0.5, 0.0]
    assert found.scores["failed_share"]["mean"] == found.scores["failed_share"]["overall"] == 0.25
    assert found.scores["unmeasured"]["overall"] == 2
    assert [row.get("failed", False) for row in found.rows] == [False, False, True, False, False, False]
    nobody = score_control(pairs[2:], samples[2:], Landmarks(detect, "by shade"))
    assert nobody.scores["distance"]["mean"] is None
    assert math.isnan(nobody.mean("distance"))


def test_depth_of_a_file_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grey(DepthEstimator):
        def __init__(self) -> None:
            self.identity = {"model": "grey"}

        def maps(self, images: Sequence[Image.Image | Path], show: str | None = None):  # type: ignore[no-untyped-def, override]
            return (np.asarray(image.convert("L"), np.float32) for image in images if isinstance(image, Image.Image))

    depth = np.arange(64, dtype=np.uint8).reshape(8, 8)
    picture = Image.fromarray(depth + 3).convert("RGB")
    found = score_control([Pair("0", picture, depth)], [[picture]], Depth(Grey()))
    assert found.mean("rmse") == pytest.approx(3)
    assert score_control([Pair("0", picture)], [[picture]], Depth(Grey())).mean("rmse") == 0
