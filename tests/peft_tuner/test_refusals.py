"""What PEFT can ask for and this tuner does not do: each refused by name, before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from peft_tuner.models import batch, config, layers, small, tuned
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import ether_diffusion as ether
from ether_diffusion.core.state import StateMismatchError
from ether_diffusion.peft_tuner import EtherLinear, EtherPeftConfig


class Others(nn.Module):
    """A Linear, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.embedding = nn.Embedding(8, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("conv", "Conv2d"), ("embedding", "Embedding"), ("norm", "LayerNorm"), ("attention", "MultiheadAttention")],
)
def test_a_target_that_is_no_linear_is_refused_and_nothing_is_replaced(name: str, kind: str) -> None:
    model = Others()
    with pytest.raises(ValueError, match=rf"Target module {name} is of torch\.nn\.\S*\.{kind}, which is not supported"):
        peft.get_peft_model(model, EtherPeftConfig(target_modules=["linear", name]))
    assert type(model.linear) is nn.Linear


def test_a_linear_that_attention_reads_past_the_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention\.out_proj is not supported: torch\.nn\.MultiheadAttention reads"):
        peft.get_peft_model(Others(), EtherPeftConfig(target_modules=["out_proj"]))


def test_conv1d_of_gpt2_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(ValueError, match=r"c_attn is of transformers\.pytorch_utils\.Conv1D, which is not supported"):
        peft.get_peft_model(model, EtherPeftConfig())


def test_fused_experts_are_refused_by_name() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match=r"mlp\.experts is of \S*MixtralExperts, which is not supported"):
        peft.get_peft_model(model, EtherPeftConfig(target_modules=["experts"]))
    with pytest.raises(TypeError, match="target_parameters"):
        EtherPeftConfig(target_parameters=["experts.gate_up_proj"])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "ether+"}, "unknown variant 'ether\\+', did you mean"),
        ({"variant": "naive"}, "unknown variant 'naive'"),
        ({"n_blocks": 0}, "n_blocks must be a whole number of at least 1"),
        ({"init_weights": "gaussian"}, "init_weights='gaussian' means nothing to ETHER"),
        ({"exclude_parts": ["w"]}, "exclude_parts has 'w'"),
        ({"target_modules": "first", "layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
        ({"target_modules": "first", "layers_pattern": "h"}, "cannot be used when `target_modules` is a str"),
        ({"target_modules": ["first"], "layers_pattern": "h"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EtherPeftConfig(**settings)


@pytest.mark.parametrize(
    ("n_blocks", "targets"), [(5, ["first"]), (16, ["first"]), (3, ["first", "second"]), (3, "all-linear")]
)
def test_blocks_that_do_not_fit_leave_the_model_as_it_is(n_blocks: int, targets: list[str] | str) -> None:
    model = small()
    with pytest.raises(ValueError, match="n_blocks="):
        peft.get_peft_model(model, EtherPeftConfig(n_blocks=n_blocks, target_modules=targets))
    assert not [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_all_linear_is_checked_before_the_first_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 15), nn.Linear(15, 4))
    with pytest.raises(ValueError, match=r"all targets share these divisors: 1$"):
        peft.get_peft_model(model, EtherPeftConfig(n_blocks=4, target_modules="all-linear"))
    assert [type(module) for module in model] == [nn.Linear] * 3


def test_blocks_of_width_one_are_refused() -> None:
    with pytest.raises(ValueError, match="cuts the 16 features of first into blocks of width 1"):
        peft.get_peft_model(small(), EtherPeftConfig(n_blocks=16, variant="ether", target_modules=["first"]))


def test_mixed_models_are_refused() -> None:
    with pytest.raises(ValueError, match="'ETHER' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(small(), config("ether"), mixed=True)


def test_an_adapter_of_attach_and_one_of_peft_exclude_each_other() -> None:
    model = small()
    adapter = ether.attach(model, ether.EtherConfig(targets=("first",)))
    with pytest.raises(ValueError, match=r"ether\.attach has put an adapter on this model: detach it first"):
        peft.get_peft_model(model, config("ether"))
    adapter.detach()
    tuner = peft.inject_adapter_in_model(config("ether"), model)
    with pytest.raises(ValueError, match="PEFT has an ETHER layer around first"):
        ether.attach(tuner, ether.EtherConfig(targets=("first",)))


def broken(value: str, state: dict[str, torch.Tensor]) -> None:
    key = next(key for key in state if key.endswith("first.ether_methods.v"))
    if value == "zero":
        state[key][0] = 0
    elif value == "nan":
        state[key][0, 0] = torch.nan
    elif value == "missing":
        del state[key]
    elif value == "unknown":
        state[f"{key}_out_2"] = state[key].clone()
    else:
        state[key] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("zero", "zero vector: .*first"),
        ("nan", "not finite: .*first"),
        ("missing", "missing key: .*first"),
        ("unknown", "unknown key: .*v_out_2"),
        ("shape", r"wrong shape: .*first.* is \(2, 2\)"),
    ],
)
def test_a_broken_file_is_refused(value: str, message: str, tmp_path: Path) -> None:
    tuned("ether_plus").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    broken(value, state)
    save_file(state, path)
    with pytest.raises(StateMismatchError, match=message):
        peft.PeftModel.from_pretrained(small(), tmp_path)


def test_a_lora_that_is_merged_beneath_is_refused() -> None:
    model = tuned("ether_plus").base_model.model
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first"], init_lora_weights=False), model, "lora")
    unmerged = model(batch())
    model.first.merge()
    with pytest.raises(RuntimeError, match=r"peft\.tuners\.lora\.layer\.Linear .* has merged lora into the weight"):
        model(batch())
    with pytest.raises(RuntimeError, match="has merged lora"):
        model.first(batch())
    model.first.unmerge()
    assert torch.allclose(model(batch()), unmerged, atol=1e-6)


def test_merging_around_another_tuner_is_refused() -> None:
    model = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["first"], init_lora_weights=False))
    inner = model.base_model.model
    peft.inject_adapter_in_model(config("ether_plus", target_modules=["first"]), inner, "outer")
    layer = layers(inner)["first"]
    assert isinstance(layer.base_layer, peft.tuners.lora.LoraLayer)
    with pytest.raises(ValueError, match=r"cannot merge into first: peft\.tuners\.lora\.layer has a layer between"):
        layer.merge()
    assert not layer.supports_lora_conversion()


@pytest.mark.parametrize("name", ["first", "u", "v_out", "ether_methods"])
def test_a_name_that_would_cost_other_adapters_their_vectors_is_refused(name: str, tmp_path: Path) -> None:
    model = tuned("ether_plus")
    with pytest.raises(ValueError, match=f"the adapter name '{name}' is also part of a name in this model"):
        model.add_adapter(name, config("ether_plus"))
    assert list(model.peft_config) == ["default"]
    alone = peft.get_peft_model(small(), config("ether_plus"), adapter_name=name).eval()  # there is no other one
    alone.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(small(), tmp_path / name)
    assert torch.equal(again(batch()), alone(batch()))
    with pytest.raises(ValueError, match="give it another name"):
        alone.add_adapter("other", config("ether_plus"))


def test_rescaling_by_pefts_lora_helper_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="scaling is only supported for"),
        peft.helpers.rescale_adapter_scale(tuned("ether"), 0.5),
    ):
        pass


def test_what_only_lora_has_is_refused_by_name(tmp_path: Path) -> None:
    model = tuned("ether_plus")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a weighted sum of ETHER adapters is no ETHER adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but ETHER was passed"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        EtherPeftConfig(bias="all")  # type: ignore[call-arg]


def test_pefts_switch_of_input_casting_changes_nothing() -> None:
    model = tuned("ether_plus")
    expected = model(batch())
    with peft.helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(batch()), expected)


def test_no_layer_is_left_behind_by_a_refusal() -> None:
    model = small()
    with pytest.raises(ValueError, match="n_blocks"):
        peft.get_peft_model(model, EtherPeftConfig(n_blocks=7, target_modules=["first"]))
    assert not any(isinstance(module, EtherLinear) for module in model.modules())
    assert not model._forward_pre_hooks
