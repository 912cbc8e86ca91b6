"""Distances of every method after training, against the weights that its own library merges."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ether_diffusion import registry
from ether_diffusion.core.targets import find_targets
from ether_diffusion.families.registry import family_of
from ether_diffusion.metrics.distances import (
    change,
    components,
    effective_weights,
    energies,
    mean_distances,
    trained_layers,
    transforms,
)
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.trainables import make_trainables, save_trained, trained_components

MATRICES = (torch.nn.Linear, torch.nn.Conv2d)
METHODS = [name for name in registry.METHODS if name not in ("none", "peft")]


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
    distances = mean_distances({"unet": pipe.unet}, {"unet": base}, method)
    for layer in pipe.unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    host = pipe.unet.__dict__.get("_ether_host")
    if host is not None:
        host.fuse()
    after = {target.path: target.module.weight.detach() for target in find_targets(pipe.unet)}
    if method == "full":  # all matrices are trained, not the attention's alone
        after = {path: m.weight.detach() for path, m in pipe.unet.named_modules() if isinstance(m, MATRICES)}
    assert set(found) == set(after)
    moved = []
    for path, merged in after.items():
        torch.testing.assert_close(found[path], merged.flatten(1), atol=1e-5, rtol=1e-4)
        moved.append((merged - base.get_submodule(path).weight).norm().item())
    assert distances["weights"] == pytest.approx(sum(moved) / len(moved), rel=1e-3)


@pytest.mark.parametrize("method", ["ether", "naive", "oft", "hra"])
def test_the_transforms_are_what_multiplies_the_weight(pipe: DiffusionPipeline, method: str, tmp_path: Path) -> None:
    before = dict(effective_weights(pipe.unet, [target.path for target in find_targets(pipe.unet)]))
    trained(pipe, method, tmp_path)
    matrices, after = dict(transforms(pipe.unet, method)), dict(effective_weights(pipe.unet))
    assert len(matrices) == len(after)
    for path, weight in after.items():
        options = [before[path] @ matrices[path], before[path] @ matrices[path].T]  # peft's own convention of the side
        assert min((weight - option).abs().max() for option in options) < 1e-4 * weight.abs().max()


def test_the_distance_of_ether_is_what_the_paper_says(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    trained(pipe, "ether", tmp_path)
    found = mean_distances({"unet": pipe.unet}, {"unet": base}, "ether")
    assert found["transforms"] == pytest.approx(2 * 2**0.5, rel=1e-5)
    assert mean_distances({"unet": base}, {"unet": base}, "full") == {"weights": 0.0, "transforms": None}


@pytest.mark.parametrize("method", ["ether", "ether_plus", "naive", "lora", "oft"])
def test_layers_outside_of_attention_are_measured_too(pipe: DiffusionPipeline, method: str, tmp_path: Path) -> None:
    settings = config(method, tmp_path)
    settings.targets = ["*.ff.net.2"]
    base = copy.deepcopy(pipe.unet)
    (trainable,) = make_trainables({"unet": pipe.unet}, settings)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    layers = trained_layers(pipe.unet)
    assert layers
    assert all(path.endswith("ff.net.2") for path in layers)
    assert mean_distances({"unet": pipe.unet}, {"unet": base}, method)["weights"] > 1e-3
    before, after = energies(base, "base", layers), energies(pipe.unet, method)
    assert set(before) == set(after) == set(layers)
    moved = abs(change(before, after)["all"])
    assert moved < 1e-6 if method in ("ether", "oft") else moved > 1e-6


def test_a_trained_text_encoder_counts(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = {name: copy.deepcopy(module) for name, module in components(pipe).items()}
    assert set(base) == {"unet", "text_encoder"}
    settings = config("naive", tmp_path)
    settings.train_text_encoder = True
    trainables = make_trainables(trained_components(family_of(pipe), settings), settings)
    assert mean_distances(components(pipe), base, "naive")["weights"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for trainable in trainables:
            if trainable.component == "text_encoder":
                for parameter in trainable.parameters():
                    parameter.add_(0.1)
    assert mean_distances(components(pipe), base, "naive")["weights"] > 1e-3


def test_a_loaded_peft_adapter_has_the_same_distances(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    settings = config("oft", tmp_path)
    trainables = make_trainables(trained_components(family_of(pipe), settings), settings)
    with torch.no_grad():
        for parameter in trainables[0].parameters():
            parameter.add_(0.1)
    save_trained(pipe, trainables, settings)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "unet"))
    of_loaded, of_trained = (mean_distances({"unet": m}, {"unet": base}, "oft") for m in (loaded, pipe.unet))
    assert of_loaded == pytest.approx(of_trained, rel=1e-5)


def test_reflections_keep_the_energy_of_every_layer(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = copy.deepcopy(pipe.unet)
    projections = [target.path for target in find_targets(base)]
    before = energies(base, "base", projections)
    trained(pipe, "ether", tmp_path)
    kept = change(before, energies(pipe.unet, "ether"))
    assert abs(kept["all"]) < 1e-6
    assert max(map(abs, kept["layers"].values())) < 1e-5
    pipe.register_modules(unet=copy.deepcopy(base))
    trained(pipe, "naive", tmp_path, 0.2)
    assert abs(change(before, energies(pipe.unet, "naive"))["all"]) > 1e-4
    with pytest.raises(ValueError, match="same layers"):
        change(before, dict(list(before.items())[1:]))
