"""Control examples: picture and condition cut alike, edges of what is seen, prompts left out now and then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.data.augment import Augmentation
from ether_diffusion.data.control import ControlPairs
from ether_diffusion.data.pairs import EndlessPairs, Pair
from ether_diffusion.data.randomness import generator


def coordinates(width: int = 40, height: int = 24) -> Image.Image:
    """Every pixel tells where it is: red is its column, green its row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([6 * columns, 10 * rows, 0 * rows], -1).astype(np.uint8))


def scene(index: int) -> Image.Image:
    image = Image.new("RGB", (96, 80), "white")
    image.paste("black", (20 + index, 10, 60, 50))
    return image


def pairs_of(condition: bool, **settings: object) -> ControlPairs:
    source = EndlessPairs(lambda index: Pair(coordinates(), coordinates() if condition else None, f"pair {index}"))
    values = {"resolution": 24, "augmentation": Augmentation(random_flip=True), "smooth": False} | settings
    return ControlPairs(source, **values)  # type: ignore[arg-type]


def test_picture_and_condition_are_cut_and_mirrored_alike() -> None:
    pairs = pairs_of(condition=True)
    mirrored, places = set(), set()
    for index in range(40):
        example = pairs.example(0, generator(0, index))
        assert example.condition is not None
        torch.testing.assert_close(example.pixel_values / 2 + 0.5, example.condition)
        row = example.condition[0, 0]
        mirrored.add(bool(row[0] > row[-1]))
        places.add(float(row.min()))
        assert (example.pixel_values.shape, example.condition.shape) == ((3, 24, 24), (3, 24, 24))
    assert mirrored == {True, False}
    assert len(places) > 8


def test_a_map_keeps_its_colours_when_it_is_resized() -> None:
    ids = Image.fromarray((np.indices((50, 50)).sum(0) // 17 % 2 * 255).astype(np.uint8)).convert("RGB")
    source = EndlessPairs(lambda index: Pair(ids, ids, ""))
    sharp, smooth = (
        ControlPairs(source, 32, Augmentation(), smooth=smooth).example(0, generator(0)) for smooth in (False, True)
    )
    assert sharp.condition is not None
    assert set(sharp.condition.unique().tolist()) == {0.0, 1.0}
    assert smooth.condition is not None
    assert len(smooth.condition.unique()) > 2


def test_edges_are_those_of_the_picture_that_is_trained_on() -> None:
    cv2 = pytest.importorskip("cv2")
    pairs = ControlPairs(EndlessPairs(lambda index: Pair(scene(index), None, "")), 64, Augmentation(random_flip=True))
    for index in range(8):
        example = pairs.example(index, generator(0, index))
        seen = ((example.pixel_values / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        assert example.condition is not None
        assert np.array_equal(example.condition[0].numpy() * 255, cv2.Canny(np.ascontiguousarray(seen), 100, 200))
        assert example.condition.any()


def test_thresholds_decide_what_is_an_edge() -> None:
    pytest.importorskip("cv2")
    source = EndlessPairs(lambda index: Pair(scene(index), None, ""))
    none = ControlPairs(source, 64, Augmentation(), thresholds=(5000, 6000)).example(0, generator(0))
    assert none.condition is not None
    assert not none.condition.any()


def test_the_share_of_empty_prompts_is_kept_and_does_not_move_the_crop() -> None:
    without, sometimes = pairs_of(True), pairs_of(True, empty_prompts=0.25)
    examples = [(without.example(i, generator(1, i)), sometimes.example(i, generator(1, i))) for i in range(400)]
    assert all(torch.equal(a.pixel_values, b.pixel_values) for a, b in examples)
    assert all(a.prompt for a, _ in examples)
    assert {b.prompt for _, b in examples if b.prompt} <= {f"pair {i}" for i in range(400)}
    empty = sum(not b.prompt for _, b in examples) / 400
    assert abs(empty - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5


def test_what_is_shown_is_the_middle_of_the_pair() -> None:
    pair = pairs_of(condition=True).shown(3)
    assert pair.condition is not None
    assert np.array_equal(pair.image, pair.condition)
    assert np.array_equal(pair.image, coordinates().crop((8, 0, 32, 24)))


@pytest.mark.parametrize(
    ("settings", "message"), [({"resolution": 30}, "resolution 30"), ({"empty_prompts": 1.5}, "1.5")]
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(True, **settings)


def test_of_several_captions_one_is_drawn_by_the_samples_own_counter() -> None:
    """So a resumed run, another worker and another process draw the same one."""
    captions = ("one", "two", "three")
    pairs = ControlPairs(
        EndlessPairs(lambda _: Pair(coordinates(), coordinates(), "one", captions)), 24, Augmentation()
    )
    drawn = [pairs.example(0, generator(5, "augment", n)).prompt for n in range(60)]
    assert min(drawn.count(caption) for caption in captions) > 10
    assert drawn[40:] == [pairs.example(0, generator(5, "augment", n)).prompt for n in range(40, 60)]


def test_a_picture_that_would_be_scaled_to_gigabytes_is_named() -> None:
    long = Image.new("RGB", (6000, 100))
    pairs = ControlPairs(EndlessPairs(lambda _: Pair(long, long, "", name="maps/long.png")), 2048, Augmentation())
    with pytest.raises(ValueError, match=r"maps/long.png of 6000 x 100 pixels would have 122880 x 2048 once it covers"):
        pairs.example(0, generator(0, "augment", 0))
