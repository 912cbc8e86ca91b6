"""Distances of every method after training, against the weights that its own library merges."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion.attention import find_targets
from ether_diffusion.evaluation.distances import effective_weights, mean_distances, transforms
from ether_diffusion.evaluation.energy import change, energies
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.trainables import make_trainables, save_trained, trained_components

METHODS = ("ether", "ether_plus", "naive", "lora", "oft", "boft", "hra", "full")


def config(method: str, folder: Path) -> DreamBoothConfig:
    names = {"pretrained_model_name_or_path": "x", "instance_data_dir": folder, "instance_prompt": "x"}
    return DreamBoothConfig(**names, output_dir=folder, method=method, n_blocks=2)  # type: ignore[arg-type]


def trained(pipe: DiffusionPipeline, method: str, folder: Path, size: float = 0.05) -> None:
    """Attach the method and move its parameters."""
    (trainable,) = make_trainables({"unet": pipe.unet}, config(method, folder))
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=dice))


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_that_are_merged(pipe: DiffusionPipeline, method: str, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    trained(pipe, method, tmp_path)
    found = dict(effective_weights(pipe.unet))
    distances = mean_distances(pipe.unet, base, method)
    for layer in pipe.unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    host = pipe.unet.__dict__.get("_ether_host")
    if host is not None:
        host.fuse()
    before = {target.path: target.module.weight.detach().clone() for target in find_targets(base)}
    moved = []
    for target in find_targets(pipe.unet):
        merged = target.module.weight.detach()
        torch.testing.assert_close(found[target.path], merged, atol=1e-5, rtol=1e-4)
        moved.append((merged - before[target.path]).norm().item())
    assert distances["weights"] == pytest.approx(sum(moved) / len(moved), rel=1e-3)


@pytest.mark.parametrize("method", ["ether", "naive", "oft", "hra"])
def test_the_transforms_are_what_multiplies_the_weight(pipe: DiffusionPipeline, method: str, tmp_path: Path) -> None:
    before = dict(effective_weights(pipe.unet))
    trained(pipe, method, tmp_path)
    matrices, after = dict(transforms(pipe.unet, method)), dict(effective_weights(pipe.unet))
    assert len(matrices) == len(after)
    for path, weight in after.items():
        options = [before[path] @ matrices[path], before[path] @ matrices[path].T]  # peft's own convention of the side
        assert min((weight - option).abs().max() for option in options) < 1e-4 * weight.abs().max()


def test_the_distance_of_ether_is_what_the_paper_says(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    trained(pipe, "ether", tmp_path)
    assert mean_distances(pipe.unet, base, "ether")["transforms"] == pytest.approx(2 * 2**0.5, rel=1e-5)
    assert mean_distances(base, base, "full") == {"weights": 0.0, "transforms": None}


def test_a_loaded_peft_adapter_has_the_same_distances(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    settings = config("oft", tmp_path)
    trainables = make_trainables(trained_components(pipe, settings), settings)
    with torch.no_grad():
        for parameter in trainables[0].parameters():
            parameter.add_(0.1)
    save_trained(pipe, trainables, settings)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "unet"))
    assert mean_distances(loaded, base, "oft") == pytest.approx(mean_distances(pipe.unet, base, "oft"), rel=1e-5)


def test_reflections_keep_the_energy_of_every_layer(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    before = energies(base, "base")
    trained(pipe, "ether", tmp_path)
    kept = change(before, energies(pipe.unet, "ether"))
    assert abs(kept["all"]) < 1e-6
    assert max(map(abs, kept["layers"].values())) < 1e-5
    pipe.register_modules(unet=copy.deepcopy(base))
    trained(pipe, "naive", tmp_path, 0.2)
    assert abs(change(before, energies(pipe.unet, "naive"))["all"]) > 1e-4
    with pytest.raises(ValueError, match="same attention projections"):
        change(before, dict(list(before.items())[1:]))
