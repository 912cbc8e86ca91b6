"""The registry of methods: one entry is all that a method of another library needs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
import pytest
from diffusers import DiffusionPipeline

from ether_diffusion import registry
from ether_diffusion.config import EtherConfig
from ether_diffusion.registry import METHODS, OWN_METHODS, Rate
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.sections import AdapterSection
from ether_diffusion.training.trainables import check_trainables, make_trainables, save_trained


def config(folder: Path, **changes: Any) -> DreamBoothConfig:
    needed: dict[str, Any] = {"pretrained_model_name_or_path": "base", "instance_data_dir": Path("dog")}
    return DreamBoothConfig(**needed, output_dir=folder, instance_prompt="a dog", **changes)


def test_every_entry_names_settings_that_exist() -> None:
    known = {field.name for field in fields(DreamBoothConfig)}
    own = {field.name for field in fields(EtherConfig)}
    for name, entry in METHODS.items():
        assert name == entry.name
        assert set(entry.settings) <= known
        assert not entry.is_own or set(entry.settings) - {"initial_length"} <= own  # that is of training alone


def test_an_adapter_file_holds_the_methods_of_this_library_alone() -> None:
    assert {EtherConfig(name).method for name in OWN_METHODS} == {
        *("ether", "ether_plus", "naive"),
        *("anchored", "ether_plus_free"),
    }
    with pytest.raises(ValueError, match="unknown method 'lora'"):
        EtherConfig("lora")


def test_the_rates_of_the_paper(tmp_path: Path) -> None:
    """App. C; guessed: ETHER's and OFT's; LoRA's and full finetuning's of controls are from diffusers' scripts."""
    subjects = {name: entry.rate.value for name, entry in METHODS.items() if entry.rate is not None}
    assert subjects == {
        **dict.fromkeys(("ether", "ether_plus", "anchored", "ether_plus_free"), 6e-3),
        **dict.fromkeys(("naive", "oft", "boft", "hra"), 6e-5),
        **{"lora": 6e-4, "full": 5e-6},
    }
    controls = {name: entry.control_rate.value for name, entry in METHODS.items() if entry.control_rate is not None}
    assert controls == {
        **dict.fromkeys(("ether", "ether_plus", "anchored", "ether_plus_free"), 1e-3),
        **dict.fromkeys(("naive", "oft", "boft", "hra"), 1e-5),
        **{"lora": 1e-4, "full": 1e-5, "none": 1e-4},
    }
    assert config(tmp_path, method="lora").default_rate == METHODS["lora"].rate
    control = ControlConfig("base", tmp_path, method="lora", train_data_dir="playground")
    assert control.default_rate == Rate(1e-4, "diffusers")


def test_a_new_method_needs_one_entry(pipe: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(sizes: registry.Sizes, names: list[str]) -> peft.PeftConfig:
        return peft.LoHaConfig(r=sizes.rank, alpha=sizes.rank, target_modules=names)

    entry = replace(METHODS["hra"], name="loha", title="LoHa", build=build, transform=None)
    monkeypatch.setitem(METHODS, "loha", entry)
    settings = config(tmp_path, method="loha", rank=2)
    assert settings.guessed_rate
    (trainable,) = trainables = make_trainables({"unet": pipe.unet}, settings)
    assert trainable.num_parameters() > 0
    save_trained(pipe, trainables, settings)
    assert peft.PeftConfig.from_pretrained(tmp_path / "unet").peft_type == peft.PeftType.LOHA


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "peft"}, "needs peft_config"),
        ({"method": "lora", "peft_config": {"peft_type": "DELORA"}}, "no other has it"),
        ({"method": "peft", "peft_config": {"r": 8}, "learning_rate": 1e-3}, "needs peft_type"),
        ({"method": "peft", "peft_config": {"peft_type": "DELORA"}}, "no learning rate of its own: give learning_rate"),
        (
            {"method": "peft", "peft_config": {"peft_type": "DELORA", "target_modules": []}, "learning_rate": 1e-3},
            "leave out target_modules",
        ),
    ],
    ids=["nothing", "another method", "no type", "no rate", "layers"],
)
def test_settings_that_no_adapter_of_peft_has(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"peft_type": "DELROA"}, "no peft_type 'DELROA'; it has ADALORA"),
        ({"peft_type": "DELORA", "rank": 8}, "unexpected keyword argument 'rank'"),
        ({"peft_type": "PREFIX_TUNING"}, "unexpected keyword argument 'target_modules'"),
        ({"peft_type": "ADALORA", "total_step": 10}, "ADALORA changes its ranks by a call after every step"),
    ],
    ids=["type", "argument", "prompts", "calls"],
)
def test_what_peft_refuses_is_a_value_error(given: dict[str, Any], told: str, pipe: DiffusionPipeline) -> None:
    section = config(Path("out"), method="peft", peft_config=given, learning_rate=1e-3).section(AdapterSection)
    with pytest.raises(ValueError, match=told):
        check_trainables({"unet": pipe.unet}, section)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_is_refused(start: str, pipe: DiffusionPipeline) -> None:
    """Turned off, as the samples of step 0 are drawn, it would leave another base behind."""
    given = {"peft_type": "LORA", "r": 4, "init_lora_weights": start}
    section = config(Path("out"), method="peft", peft_config=given, learning_rate=1e-3).section(AdapterSection)
    with pytest.raises(ValueError, match="unet: this adapter begins by changing the base's own weights"):
        make_trainables({"unet": pipe.unet}, section)


@pytest.mark.parametrize(
    "given", [{"peft_type": "IA3"}, {"peft_type": "LORA", "r": "4"}], ids=["architecture", "kind of value"]
)
def test_what_peft_stumbles_over_names_the_component(given: dict[str, Any], pipe: DiffusionPipeline) -> None:
    section = config(Path("out"), method="peft", peft_config=given, learning_rate=1e-3).section(AdapterSection)
    with pytest.raises(ValueError, match="unet: peft cannot make this adapter of method=peft"):
        make_trainables({"unet": pipe.unet}, section)
