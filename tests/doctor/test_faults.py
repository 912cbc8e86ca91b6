"""Common faults are found, each with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from ether_diffusion.doctor import faults as module
from ether_diffusion.doctor.bases import KnownBase
from ether_diffusion.doctor.devices import Device
from ether_diffusion.doctor.faults import Fault, faults
from ether_diffusion.doctor.packages import Extra

CPU = Device("cpu", "a processor", 1, 1, ("no",))
CARD = Device("cuda:0", "a card", 1, 1, ("no",))


@pytest.fixture(autouse=True)
def sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing amiss."""
    monkeypatch.setattr(module, "unmet", list)
    monkeypatch.setattr(module, "installed_version", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def only(extras: list[Extra] = [], devices: list[Device] = [CPU], bases: list[KnownBase] = []) -> Fault:  # noqa: B006
    (found,) = faults(extras, devices, bases)
    return found


def test_on_a_sound_machine_nothing_is_amiss() -> None:
    sound = Extra("peft", (), True, "pip"), Extra("wandb", ("wandb",), False, "pip")
    assert faults(sound, [CARD, CPU], [KnownBase("a/b", (), "absent")]) == []


def test_an_extra_that_lacks_torchvision_has_the_command_that_adds_it() -> None:
    found = only([Extra("clip", ("torchvision",), True, "pip install 'ether-diffusion[clip]'")])
    assert found == Fault(
        "the extra clip is only in part there, without torchvision", "pip install 'ether-diffusion[clip]'"
    )


def test_a_package_that_is_needed_stops_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unmet", lambda: ["torch >=2.8 (it is 1.0)"])
    assert only().stops
    assert "torch >=2.8 (it is 1.0)" in only().what


def test_the_message_of_bitsandbytes_about_kernels_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_version", {"bitsandbytes": "1"}.get)
    assert "gemm_4bit_forward" in only().what
    monkeypatch.setattr(module, "installed_version", {"bitsandbytes": "1", "kernels": "1"}.get)
    assert faults([], [CPU], []) == []


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_a_launcher_that_shards_stops_a_training(variable: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    assert only().stops
    assert only().what == f"{variable} is set: {name} is not supported"


@pytest.mark.parametrize(
    ("kind", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")]
)
@pytest.mark.parametrize("file", ["default_config.yaml", "default_config.json"])
def test_settings_of_accelerate_that_shard_are_named(file: str, kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / file).write_text(f'{{"distributed_type": "{kind}"}}')
    assert str(tmp_path / "accelerate" / file) in only().what
    assert only().what.endswith(f"{name} is not supported")
    (tmp_path / "accelerate" / file).write_text('{"distributed_type": "MULTI_GPU"}')
    assert faults([], [CPU], []) == []


def test_a_gpu_that_torch_does_not_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    assert "has no CUDA" in only().what
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert only().what == "torch is built for CUDA 12.8 and finds no GPU"
    assert faults([], [CARD, CPU], []) == []


def test_offline_means_that_absent_bases_stay_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in only(bases=[KnownBase("a/b", (), "absent")]).what
    assert faults([], [CPU], [KnownBase("a/b", (), "here"), KnownBase("playground", (), "embedded")]) == []


def test_a_broken_download_has_the_command_that_completes_it() -> None:
    found = only(bases=[KnownBase("a/b", (), "incomplete", ("unet",))])
    assert (found.what, found.remedy) == ("a/b is in part downloaded, without unet", "hf download a/b")
