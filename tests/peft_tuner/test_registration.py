"""PEFT knows the type ETHER: these fail when PEFT moves what the registration rests on."""

from __future__ import annotations

import enum
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft_tuner.models import KINDS, batch, config, small, tuned

from ether_diffusion.peft_tuner import EtherModel, EtherPeftConfig, registration
from ether_diffusion.peft_tuner.config import CARD

ROOT = Path(__file__).parents[2]


def test_the_type_is_a_real_member() -> None:
    member = peft.PeftType["ETHER"]
    assert member is peft.PeftType("ETHER") is peft.PeftType.ETHER is registration.peft_type()
    assert member in list(peft.PeftType)
    assert (member, member.value, member.name) == ("ETHER", "ETHER", "ETHER")
    assert pickle.loads(pickle.dumps(member)) is member
    assert hash(member) == hash(peft.PeftType("ETHER"))
    assert len(set(peft.PeftType)) == len(list(peft.PeftType))


def test_every_mapping_of_peft_has_it() -> None:
    member = peft.PeftType("ETHER")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is EtherPeftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is EtherModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == f"{member.value.lower()}_"  # as transformers derives it
    assert member not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_registering_again_does_nothing_and_another_tuner_of_the_name_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registration.register(EtherPeftConfig, EtherModel)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType("ETHER"), peft.LoraConfig)
    with pytest.raises(RuntimeError, match=r"has a tuner ETHER already, peft\.tuners\.lora\.config\.LoraConfig"):
        registration.register(EtherPeftConfig, EtherModel)


def test_an_enum_that_is_built_in_another_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(type(peft.PeftType)):  # type: ignore[misc]
        def __iter__(cls) -> object:
            return iter([None])

    other = Stubborn("PeftType", (str, enum.Enum), Stubborn.__prepare__("PeftType", ()))
    monkeypatch.setattr(registration, "PeftType", other)
    with pytest.raises(RuntimeError, match=r"PeftType\.ETHER could not be added; install peft==0\.21\.2"):
        registration.peft_type()


def test_a_peft_without_what_the_tuner_overrides_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in registration.OVERRIDDEN:
        assert name in EtherModel.__dict__
    monkeypatch.delattr(registration.BaseTuner, "_remap_adapter_state_dict_for_load")
    with pytest.raises(RuntimeError, match=r"has no BaseTuner\._remap_adapter_state_dict_for_load"):
        registration.register(EtherPeftConfig, EtherModel)


def test_the_status_of_a_model_counts_the_layers() -> None:
    status = peft.get_model_status(tuned("ether_plus"))
    assert (status.adapter_model_type, status.peft_types) == ("EtherModel", {"default": "ETHER"})
    assert (status.num_adapter_layers, status.trainable_params) == (2, 4 * (16 + 24))
    assert status.enabled
    assert status.available_adapters == ["default"]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_survive_the_folder(kind: str, tmp_path: Path) -> None:
    settings = config(kind, seed=3, modules_to_save=["classifier"], exclude_modules=["x"])
    settings.save_pretrained(str(tmp_path))
    again = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(again) is EtherPeftConfig
    assert again == settings


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_process_without_the_import_gets_pefts_key_error_and_the_card_says_what_to_import(tmp_path: Path) -> None:
    model = tuned("ether_plus")
    model.save_pretrained(tmp_path)
    bare = run(f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert bare.returncode == 1
    assert bare.stderr.strip().endswith("KeyError: 'ETHER'")
    card = (tmp_path / "README.md").read_text()
    assert card.count(CARD.strip()) == 1
    imports = next(line for line in CARD.splitlines() if line.startswith("import ether_diffusion"))
    done = run(f"{imports}\nimport peft; print(peft.PeftConfig.from_pretrained({str(tmp_path)!r}).variant)")
    assert done.stdout.strip() == "ether_plus", done.stderr


def test_the_card_of_a_named_adapter_says_it_in_both_places_once(tmp_path: Path) -> None:
    model = peft.get_peft_model(small(), config("ether"), adapter_name="dog")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "dog"):
        assert (folder / "README.md").read_text().count(CARD.strip()) == 1


def test_what_the_user_wrote_into_the_card_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nMy dog.\n")
    tuned("ether").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "My dog." in text
    assert "license: mit" in text
    assert CARD.strip() in text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_gives_the_same_output_bit_for_bit(kind: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, x = tuned(kind), batch()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(x), model(x))
