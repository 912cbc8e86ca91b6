"""ETHER+ with two sides on attention and one on GEGLU: against dense matrices, in files, as a LoRA, in PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import dense_weight, shake, unet_inputs
from safetensors.torch import load_file

import ether_diffusion as ether
from ether_diffusion.core.targets import find_targets
from ether_diffusion.peft_tuner.files import to_peft
from ether_diffusion.pipelines.file import AdapterFileError
from ether_diffusion.playground.tiny import tiny_pipeline

PRESET = "attention+geglu_input"
CONFIG = ether.EtherConfig("ether_plus", n_blocks=2, targets=PRESET)


def test_every_projection_is_the_dense_product_of_its_own_sides() -> None:
    unet = tiny_pipeline().unet.double()
    before = {target.path: target.module.weight.detach().clone() for target in find_targets(unet, PRESET)}
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in unet_inputs().items()}
    adapter = ether.attach(unet, CONFIG, name="a")
    shake(adapter)
    state = adapter.state_dict()
    geglu = {path for path in before if path.endswith("ff.net.0.proj")}
    assert geglu
    with torch.no_grad():
        drawn = unet(**inputs).sample
    adapter.detach()
    for target in find_targets(unet, PRESET):
        path = target.path
        vectors = {key.removeprefix(f"{path}."): value for key, value in state.items() if key.startswith(f"{path}.")}
        assert set(vectors) == ({"u", "v"} if path in geglu else {"u", "v", "u_out", "v_out"})
        target.module.weight.data.copy_(dense_weight(before[path], vectors))
    with torch.no_grad():
        expected = unet(**inputs).sample
    assert (drawn - expected).abs().max() < 1e-5 * expected.abs().max()  # the vectors are fp32


def test_its_file_loads_and_another_sidedness_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    adapter = ether.attach(pipe.unet, CONFIG, name="a")
    shake(adapter)
    state = {key: value.clone() for key, value in adapter.state_dict().items()}
    ether.save(pipe, tmp_path, name="a")
    ether.unload(pipe)
    fresh = tiny_pipeline()
    ether.load(fresh, tmp_path, name="b")
    saved = ether.save(fresh, tmp_path / "again", name="b")
    once, twice = load_file(tmp_path / saved.name), load_file(saved)
    assert once.keys() == twice.keys() == {f"unet.{key}" for key in state}
    assert all(torch.equal(once[f"unet.{key}"], value) for key, value in state.items())
    other = tiny_pipeline()
    again = ether.attach(other.unet, ether.EtherConfig("ether_plus", n_blocks=2, targets="attention+geglu"), name="a")
    assert state.keys() < again.state_dict().keys()
    with pytest.raises((AdapterFileError, RuntimeError, ValueError), match="u_out"):
        again.load_state_dict(state)


def test_its_lora_is_exact(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    inputs = unet_inputs()
    adapter = ether.attach(pipe.unet, CONFIG, name="a")
    shake(adapter)
    with torch.no_grad():
        ours = pipe.unet(**inputs).sample
    ether.export_lora(pipe, tmp_path / "a.safetensors")
    fresh = tiny_pipeline()
    fresh.load_lora_weights(str(tmp_path / "a.safetensors"))
    with torch.no_grad():
        theirs = fresh.unet(**inputs).sample
    assert (ours - theirs).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("method", ["ether_plus", "ether_plus_free"])
def test_peft_has_no_settings_for_it_and_says_so(method: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    shake(ether.attach(pipe.unet, replace(CONFIG, method=method), name="a"))
    ether.save(pipe, tmp_path / "file", name="a")
    with pytest.raises(ValueError, match=r"one-sided on some projections only.*ether\.load.*ether export"):
        to_peft(tmp_path / "file", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
