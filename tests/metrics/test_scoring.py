"""Scores of a subject's images: every number again, pair by pair, and every image looked at once."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.pairwise import pairwise_cosine_similarity

from ether_diffusion.metrics.backbones import Dino
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.metrics.perceptual import Lpips
from ether_diffusion.metrics.scoring import Judges, References, score_class_images, score_drift, score_images
from ether_diffusion.playground.world import draw, random_scene

PROMPTS = ["a qwe robot", "a qwe robot at night", None, "a qwe robot", "a qwe robot at night", "a qwe robot"]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's convolutions with random weights."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    dice = torch.Generator().manual_seed(2)
    state = {}
    for layer, (channels, before, side) in shapes.items():
        state[f"features.{layer}.weight"] = (
            torch.randn(channels, before, side, side, generator=dice) / before**0.5 / side
        )
        state[f"features.{layer}.bias"] = 0.1 * torch.randn(channels, generator=dice)
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def judges(trunk: Path) -> Judges:
    return load_judges("playground", "playground", str(trunk), lpips_size=64)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine drawings; the last three are the references."""
    folder = tmp_path_factory.mktemp("pictures")
    found = [folder / f"{number}.png" for number in range(9)]
    for number, path in enumerate(found):
        draw(random_scene(9, number)).image.save(path)
    return found


def test_every_number_again(judges: Judges, paths: list[Path]) -> None:
    images, real = paths[:6], paths[6:]
    references = References(real, judges)
    scored = score_images(images, PROMPTS, references, judges, "qwe")
    assert judges.lpips is not None
    for name, model in (("dino", judges.dino), ("clip_i", judges.clip)):
        expected = pairwise_cosine_similarity(model.image_features(images), model.image_features(real))
        for row, values in zip(scored.images, expected, strict=True):
            assert row["pairs"][name] == pytest.approx(values.tolist(), abs=1e-5)
            assert row[name] == pytest.approx(values.mean().item(), abs=1e-5)
    for image, row in zip(images, scored.images, strict=True):
        alone = [judges.lpips.among([image, other]) for other in real]
        assert row["pairs"]["lpips"] == pytest.approx(alone, rel=1e-4)
    seen = judges.clip.image_features(images)
    for number, (row, prompt) in enumerate(zip(scored.images, PROMPTS, strict=True)):
        if prompt is None:
            assert "clip_t" not in row
            continue
        for name, text in (("clip_t_written", prompt), ("clip_t", prompt.replace("qwe ", ""))):
            said = judges.clip.text_features([text])
            assert row[name] == pytest.approx(cosine_similarity(seen[number : number + 1], said).item(), abs=1e-5)
    by_prompt = {row["prompt"]: row["div"] for row in scored.prompts}
    for prompt in ("a qwe robot", "a qwe robot at night"):
        group = [image for image, asked in zip(images, PROMPTS, strict=True) if asked == prompt]
        pairs = [judges.lpips.among(list(pair)) for pair in combinations(group, 2)]
        assert by_prompt.pop(prompt) == pytest.approx(sum(pair or 0 for pair in pairs) / len(pairs), rel=1e-4)
    assert by_prompt == {}


def test_every_image_passes_every_model_once(trunk: Path, paths: list[Path]) -> None:
    judges = load_judges("playground", "playground", str(trunk), lpips_size=64)
    assert isinstance(judges.lpips, Lpips)
    looks = {"dino": 0, "clip": 0, "lpips": 0}
    watched = {"dino": judges.dino.model, "clip": judges.clip.model.vision_model, "lpips": judges.lpips.model[0]}
    for name, module in watched.items():

        def count(module: object, args: object, output: object, name: str = name) -> None:
            tensor = output if isinstance(output, torch.Tensor) else output.last_hidden_state  # type: ignore[attr-defined]
            looks[name] += len(tensor)

        module.register_forward_hook(count)
    many = [paths[number % 6] for number in range(70)]
    scored = score_images(many, ["a robot", "a fish"] * 35, References(paths[3:], judges), judges)
    assert looks == {"dino": 76, "clip": 76, "lpips": 76}
    assert scored.images[0]["dino"] == pytest.approx(scored.images[66]["dino"], abs=1e-5)


def test_real_images_among_themselves(judges: Judges, paths: list[Path]) -> None:
    among = References(paths[6:], judges).among(judges)
    features = judges.dino.image_features(paths[6:])
    pairs = [float(a @ b) for a, b in combinations(features, 2)]
    assert among["dino"] == pytest.approx(sum(pairs) / 3, abs=1e-5)
    assert set(among) == {"dino", "clip_i", "lpips"}
    assert References(paths[:1], judges).among(judges) == {}


def test_class_images_and_drift(judges: Judges, paths: list[Path]) -> None:
    references = References(paths[6:], judges)
    rows = score_class_images(paths[:2], references, judges)
    features = judges.dino.image_features(paths)
    assert [row["pres"] for row in rows] == pytest.approx((features[:2] @ features[6:].T).mean(1).tolist(), abs=1e-5)
    moved = [row["drift"] for row in score_drift(paths[:2], paths[2:4], judges)]
    assert moved == pytest.approx([(1 - float(features[n] @ features[n + 2])) / 2 for n in (0, 1)], abs=1e-5)


def test_what_a_score_depends_on_stands_beside_it(judges: Judges) -> None:
    identity = judges.identity
    assert identity["dino"]["model"] == "playground"
    assert "size" in identity["dino"]["preprocessing"]
    assert identity["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert Dino("playground").identity == identity["dino"]
    assert "model" not in judges.weights["dino"]


def test_the_weights_of_a_judge_are_known_wherever_its_file_lies(trunk: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(trunk, tmp_path / "elsewhere.pth"))
    first, second = (load_judges("playground", "playground", str(path), lpips_size=64) for path in (trunk, moved))
    assert first.identity != second.identity
    assert first.weights == second.weights
    state = torch.load(moved)
    torch.save({**state, "features.0.bias": state["features.0.bias"] + 1}, moved)
    assert load_judges("playground", "playground", str(moved), lpips_size=64).weights != first.weights


def test_without_a_token_only_the_prompt_as_written_is_compared(judges: Judges, paths: list[Path]) -> None:
    rows = score_images(paths[:1], ["a robot"], References(paths[6:], judges), judges).images
    assert "clip_t_written" in rows[0]
    assert "clip_t" not in rows[0]
