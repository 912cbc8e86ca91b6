"""Naive made to keep the energy: the changed weights against closed forms, and one small study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import shake

from ether_diffusion import EtherConfig, attach
from ether_diffusion.cli.programs.studies import energy_intervention as main
from ether_diffusion.core.host import host_of
from ether_diffusion.core.layout import Layout
from ether_diffusion.core.methods import Naive
from ether_diffusion.core.targets import find_targets
from ether_diffusion.evaluation.paper.intervention import CHANGES, change_weights, orthogonal, with_row_norms
from ether_diffusion.evaluation.paper.settings import EnergyConfig
from ether_diffusion.metrics.distances import hyperspherical_energy
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.reading import read_json


@pytest.fixture
def naive() -> Naive:
    method = Naive(Layout.of(12), Layout.of(20), 3, torch.Generator().manual_seed(0))
    shake(method, seed=2)
    return method


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(20, 12, generator=torch.Generator().manual_seed(1))


def changed(weight: torch.Tensor, method: Naive) -> torch.Tensor:
    return weight.double() + method.delta_weight(weight.double())


def test_orthogonal_blocks_keep_energy_and_norms(weight: torch.Tensor, naive: Naive) -> None:
    found = orthogonal(weight, naive)
    assert hyperspherical_energy(found) == pytest.approx(hyperspherical_energy(weight), rel=1e-6)
    torch.testing.assert_close(found @ found.mT, weight.double() @ weight.double().mT)
    assert abs(hyperspherical_energy(changed(weight, naive)) / hyperspherical_energy(weight) - 1) > 1e-3


def test_they_are_the_nearest(weight: torch.Tensor, naive: Naive) -> None:
    """No small rotation of the orthogonal blocks comes nearer to what was learnt."""
    blocks = naive.blocks.detach().double()
    eye = torch.eye(12, dtype=torch.float64)
    q = torch.block_diag(*[orthogonal(eye, naive)[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] for i in range(3)])
    n = torch.block_diag(*blocks)
    least = (q - n).norm()
    for seed in range(20):
        skew = 0.05 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        turn = torch.block_diag(*torch.linalg.matrix_exp(skew - skew.mT))
        assert (q @ turn - n).norm() > least


def test_row_norms_are_those_of_the_base_and_the_energy_that_of_the_training(
    weight: torch.Tensor, naive: Naive
) -> None:
    found, learnt = with_row_norms(weight, naive), changed(weight, naive)
    torch.testing.assert_close(found.norm(dim=1), weight.double().norm(dim=1))
    assert hyperspherical_energy(found) == pytest.approx(hyperspherical_energy(learnt), rel=1e-6)


@pytest.mark.parametrize("name", CHANGES)
def test_the_denoiser_has_the_changed_weights_and_no_adapter(name: str) -> None:
    pipe = tiny_pipeline()
    adapter = attach(pipe.unet, EtherConfig("naive", n_blocks=4))
    shake(adapter, scale=0.05)
    targets = {target.path: target.module for target in find_targets(pipe.unet)}
    expected = {path: CHANGES[name](targets[path].weight, method) for path, method in adapter.methods().items()}  # type: ignore[arg-type]
    change_weights(pipe, CHANGES[name])
    assert host_of(pipe.unet) is None
    for path, value in expected.items():
        torch.testing.assert_close(targets[path].weight.double(), value, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_a_study_draws_one_training_in_three_ways(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(
        """
        protocol: playground
        subjects: [beach-ball]
        dino: playground
        clip: playground
        images_per_prompt: 1
        class_images: 0
        drift: false
        num_inference_steps: 2
        training: {pretrained_model_name_or_path: playground, max_train_steps: 2}
        arms: {naive: {method: naive, learning_rate: 1.0e-2}}
        planned: {"orthogonal minus naive": [["naive, orthogonal"], [naive]]}
        """
    )
    main([f"--config={tmp_path / 'study.yaml'}", f"--output_dir={tmp_path / 'study'}"])
    results = tmp_path / "study" / "results"
    arms = ["naive", *(f"naive, {change}" for change in CHANGES)]
    found = {arm: read_json(results / f"{arm}@0.01" / "beach-ball" / "seed-0.json", dict) for arm in arms}
    distances = {arm: each["distances"]["weights"] for arm, each in found.items()}
    assert len(set(distances.values())) == 3
    assert len(list((tmp_path / "study" / "runs").rglob("provenance.json"))) == 1
    assert (tmp_path / "study" / "planned.md").is_file()


def test_what_was_trained_must_be_kept(tmp_path: Path) -> None:
    training = {"pretrained_model_name_or_path": "playground"}
    with pytest.raises(ValueError, match="keep_runs must stay true"):
        EnergyConfig(tmp_path, arms={"naive": {"method": "naive"}}, training=training, keep_runs=False)


def test_changed_weights_have_no_strength(tmp_path: Path) -> None:
    training = {"pretrained_model_name_or_path": "playground"}
    with pytest.raises(ValueError, match="the changed weights have none: leave it out"):
        EnergyConfig(tmp_path, arms={"naive": {"method": "naive"}}, training=training, strengths=[0.5])


def test_only_naive_is_changed(tmp_path: Path) -> None:
    base = ["--training.pretrained_model_name_or_path=playground", "--dino=playground", "--clip=playground"]
    with pytest.raises(SystemExit, match="arm a: what is changed is Naive's, not LoRA's"):
        main([f"--output_dir={tmp_path}", '--arms={"a": {"method": "lora"}}', "--subjects=[beach-ball]", *base])
