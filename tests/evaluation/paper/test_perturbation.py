"""Random transforms have the distance that they are asked for, and are what their method allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from ether_diffusion import playground
from ether_diffusion.cli.programs.weights import perturbation as main
from ether_diffusion.core.targets import find_targets
from ether_diffusion.evaluation.paper.perturbation import KINDS, perturbed, rotation_limit, rotations
from ether_diffusion.metrics.distances import effective_weights, transforms
from ether_diffusion.pipelines.fingerprint import base_hash

N = 2


@pytest.mark.parametrize("distance", [0.01, 0.5, 2.0, 5.0])
def test_rotations_are_orthogonal_at_their_distance(distance: float) -> None:
    blocks = rotations(3, 8, distance, torch.Generator().manual_seed(1)).double()
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(blocks @ blocks.mT, eye.expand(3, 8, 8), atol=1e-5, rtol=0)
    assert torch.linalg.det(blocks).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert (blocks - eye).flatten(1).norm(dim=1).tolist() == pytest.approx([distance] * 3, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "distance"),
    [("ether", 2.0), ("ether_plus", 0.3), ("ether_plus", 2**0.5), ("oft", 1.5), ("naive", 0.1), ("naive", 9.0)],
)
def test_every_projection_is_that_far_from_itself(pipe: DiffusionPipeline, method: str, distance: float) -> None:
    projections = [target.path for target in find_targets(pipe.unet)]
    before = dict(effective_weights(pipe.unet, projections))
    with perturbed(pipe.unet, method, N, distance, seed=3):
        moved = dict(transforms(pipe.unet, KINDS[method].carrier))
        after = dict(effective_weights(pipe.unet))
    sides = 2 if method == "ether_plus" else 1
    assert len(moved) == sides * len(before)
    for matrix in moved.values():
        assert (matrix - torch.eye(len(matrix))).norm().item() == pytest.approx(distance * N**0.5, rel=1e-4)
    for path, weight in after.items():
        expected = before[path] @ moved[path] if sides == 1 else moved[f"{path}, output"] @ before[path] @ moved[path]
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-4)
    assert set(after) == set(projections)
    torch.testing.assert_close(dict(effective_weights(pipe.unet, projections)), before, atol=0, rtol=0)


def test_what_a_method_cannot_reach_is_left_out() -> None:
    assert [KINDS["ether"].reaches(d, 8) for d in (1.0, 2.0, 2.1)] == [False, True, False]
    assert [KINDS["ether_plus"].reaches(d, 8) for d in (0.1, 2**0.5, 1.5)] == [True, True, False]
    assert [KINDS["oft"].reaches(d, 8) for d in (5.6, 5.7)] == [True, False]
    assert rotation_limit(9) == rotation_limit(8) == 2 * 8**0.5
    assert KINDS["naive"].reaches(100, 8)


def test_the_study_draws_and_scores_every_transform(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompts", "a red ball on a beach", "--images_per_prompt", "2", "--distances", "0.1", "2", "40"]
    arguments += ["--dino", "playground", "--clip", "playground", "--num_inference_steps", "2", "--guidance_scale", "3"]
    main([*arguments, "--output_dir", str(tmp_path)])
    assert "| naive | 40.00 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "perturbation.json").read_text())
    rows = written["rows"]
    assert written["base_hash"] == base_hash(playground.load().unet)
    found = [(row["method"], row["distance"]) for row in rows]
    assert found == [
        *[("base", 0), ("ether", 2), ("ether_plus", 0.1), ("oft", 0.1), ("oft", 2)],
        *[("naive", 0.1), ("naive", 2), ("naive", 40)],
    ]
    likeness = {key: row["dino"]["mean"] for key, row in zip(found, rows, strict=True)}
    assert likeness["base", 0] == pytest.approx(1, abs=1e-5)
    assert 1 > likeness["naive", 0.1] > likeness["naive", 40]
    assert (tmp_path / "perturbation.png").is_file()
    assert (tmp_path / "perturbed.png").is_file()
