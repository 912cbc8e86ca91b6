"""An adapter beside a LoRA, under offloading, and among adapters per sample: right, or refused with a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from helpers import shake
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion import EtherConfig
from ether_diffusion.core.host import attach_made, host_of
from ether_diffusion.core.linear import Projection
from ether_diffusion.pipelines import verbs
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.pipelines.loaded import hosts_of
from ether_diffusion.playground.tiny import tiny_pipeline


def attached(pipe: DiffusionPipeline, name: str = "dog", seed: int = 1) -> None:
    shake(ether.attach(pipe.unet, EtherConfig(), name), seed=seed)


def with_lora(pipe: DiffusionPipeline, folder: Path) -> Path:
    """A LoRA file for the pipeline."""
    other = tiny_pipeline()
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(other.unet).items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers={k.removeprefix("unet."): v for k, v in state.items()}
    )
    return folder


def weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    return {
        key.replace(".base_layer", ""): value.clone()
        for key, value in pipe.unet.state_dict().items()
        if "lora" not in key
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 0.0) -> bool:
    return first.keys() == second.keys() and all((first[k] - second[k]).abs().max() <= atol for k in first)


def drawn(pipe: DiffusionPipeline) -> Tensor:
    picture: Tensor = pipe(
        "a", num_inference_steps=1, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    return picture


def test_unfusing_over_a_merged_lora_is_refused_and_names_it(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = weights(pipe)
    attached(pipe)
    ether.fuse(pipe)
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    pipe.fuse_lora()
    before = weights(pipe)
    with pytest.raises(RuntimeError, match=r"PEFT has merged paint .*unfuse_lora\(\) first"):
        ether.unfuse(pipe)
    assert same(weights(pipe), before)
    assert ether.adapters(pipe)["dog"].fused
    pipe.unfuse_lora()
    ether.unfuse(pipe)  # what PEFT's rounding left is no reason to refuse
    ether.unload(pipe)
    pipe.unload_lora_weights()
    assert same(weights(pipe), base)


def test_weights_that_someone_changed_are_not_overwritten_unless_that_is_asked_for(pipe: DiffusionPipeline) -> None:
    base = weights(pipe)
    attached(pipe)
    ether.fuse(pipe)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.weight.data += 0.05 * torch.randn_like(layer.weight)
    before = weights(pipe)
    with pytest.raises(RuntimeError, match=r"the weight of mid_block.*attn1.to_q was changed since.*force=True"):
        ether.unfuse(pipe)
    assert same(weights(pipe), before)
    assert ether.adapters(pipe)["dog"].fused
    ether.unfuse(pipe, force=True)
    assert same(weights(pipe), base)
    assert not ether.adapters(pipe)["dog"].fused


def test_a_lora_merged_beneath_an_acting_adapter_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    attached(pipe)
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    expected = drawn(pipe)
    pipe.fuse_lora()
    with pytest.raises(RuntimeError, match=r"PEFT has merged paint into weights that an adapter transforms"):
        drawn(pipe)
    pipe.unfuse_lora()
    torch.testing.assert_close(drawn(pipe), expected, atol=1e-4, rtol=0)


def test_a_part_called_alone_refuses_a_merged_lora_too(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    attached(pipe)
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 16, 64), torch.randn(2, 3, 32)
    expected = block(x, encoder_hidden_states=text)
    pipe.fuse_lora()
    with pytest.raises(RuntimeError, match=r"PEFT has merged paint into weights that an adapter transforms"):
        block(x, encoder_hidden_states=text)
    pipe.unfuse_lora()
    torch.testing.assert_close(block(x, encoder_hidden_states=text), expected, atol=1e-4, rtol=0)


def test_a_lora_that_came_and_went_since_fusing_is_no_change(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = weights(pipe)
    attached(pipe)
    ether.fuse(pipe)
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    ether.unfuse(pipe)
    assert same(weights(pipe), base)


def test_fusing_over_a_merged_lora_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = weights(pipe)
    attached(pipe)
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    pipe.fuse_lora()
    with pytest.raises(RuntimeError, match=r"cannot fuse: PEFT has merged paint .*unfuse_lora\(\)"):
        ether.fuse(pipe)
    pipe.unfuse_lora()
    assert same(weights(pipe), base, 1e-6)
    ether.fuse(pipe)
    pipe.fuse_lora()
    drawn(pipe)


def test_a_forced_unfuse_tells_peft_that_its_update_is_gone(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    base = weights(pipe)
    attached(pipe)
    ether.fuse(pipe)
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    pipe.fuse_lora()
    ether.unfuse(pipe, force=True)
    assert same(weights(pipe), base)
    drawn(pipe)
    pipe.unfuse_lora()  # takes nothing off that is not there
    assert same(weights(pipe), base)


def test_only_a_lora_beneath_what_acts_is_in_the_way(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    shake(ether.attach(pipe.unet, EtherConfig("naive", targets=("attn1.to_q",)), "naive"))
    shake(ether.attach(pipe.unet, EtherConfig(targets=("attn2.to_v",)), "cross"))
    pipe.load_lora_weights(with_lora(pipe, tmp_path), adapter_name="paint")
    pipe.fuse_lora()
    for name, acts in (("naive", True), ("cross", True), ([], False)):
        ether.set_adapters(pipe, name)
        if acts:
            with pytest.raises(RuntimeError, match="PEFT has merged paint"):
                drawn(pipe)
        else:
            drawn(pipe)


def test_unloading_one_of_the_samples_adapters_turns_all_components_off(pipe: DiffusionPipeline) -> None:
    attached(pipe, "dog", 1)
    attached(pipe, "cat", 2)
    shake(ether.attach(pipe.text_encoder, EtherConfig(), "dog"), seed=3)
    ether.set_adapters(pipe, per_sample=["dog", "cat"])
    ether.unload(pipe, "cat")
    assert not ether.adapters(pipe)["dog"].active


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_is_loaded_among_adapters_per_sample_does_not_act(
    pipe: DiffusionPipeline, strength: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attached(pipe, "dog", 1)
    attached(pipe, "cat", 2)
    shake(ether.attach(pipe.text_encoder, EtherConfig(), "cat"), seed=3)
    ether.save(pipe, tmp_path / "cat", "cat")
    ether.unload(pipe, "cat")
    attached(pipe, "fish", 4)
    ether.set_adapters(pipe, per_sample=["dog", "fish"])

    def two() -> Tensor:
        found: Tensor = pipe(
            ["a", "b"],
            num_inference_steps=1,
            output_type="pt",
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        ).images
        return found

    before = two()
    ether.load(pipe, tmp_path / "cat", name="cat", strength=strength)
    assert "does not act: each sample has an adapter of its own" in caplog.text
    assert not ether.adapters(pipe)["cat"].active
    assert torch.equal(two(), before)
    ether.set_adapters(pipe, "cat", strength)
    assert not torch.equal(two(), before)


def test_there_is_a_way_out_of_fused_weights_that_were_offloaded(pipe: DiffusionPipeline) -> None:
    base = weights(pipe)
    attached(pipe)
    ether.fuse(pipe)
    fused = drawn(pipe)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    for verb in (ether.unfuse, ether.unload):
        with pytest.raises((ValueError, RuntimeError), match="unfuse"):
            verb(pipe)  # type: ignore[operator]
    torch.testing.assert_close(drawn(pipe), fused)
    with pytest.raises(ValueError, match=r"cannot unfuse offloaded weights: call pipe.remove_all_hooks\(\)"):
        ether.unfuse(pipe)
    pipe.remove_all_hooks()
    ether.unfuse(pipe)
    ether.unload(pipe)
    assert same(weights(pipe), base)


def test_saved_base_weights_are_in_main_memory(pipe: DiffusionPipeline) -> None:
    attached(pipe)
    ether.fuse(pipe)
    host = host_of(pipe.unet)
    assert host is not None
    assert {weight.device.type for weight in host.base_weights().values()} == {"cpu"}


def group_offloaded(pipe: DiffusionPipeline, **settings: Any) -> None:
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **settings)


GROUPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "leaves": lambda folder: {"offload_type": "leaf_level"},
    "blocks": lambda folder: {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaves on disk": lambda folder: {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)},
    "blocks on disk": lambda folder: {
        **{"offload_type": "block_level", "num_blocks_per_group": 1},
        "offload_to_disk_path": str(folder),
    },
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_group_offloading_changes_nothing_and_fusing_under_it_is_refused(
    pipe: DiffusionPipeline, kind: str, strength: float, tmp_path: Path
) -> None:
    attached(pipe)
    ether.set_adapters(pipe, "dog", strength)
    expected, known = drawn(pipe), base_hash(pipe.unet)
    group_offloaded(pipe, **GROUPS[kind](tmp_path))
    torch.testing.assert_close(drawn(pipe), expected, atol=1e-5, rtol=0)
    assert base_hash(pipe.unet) in (known, None)  # never the hash of placeholders
    with pytest.raises(ValueError, match="cannot fuse under group offloading"):
        ether.fuse(pipe)
    torch.testing.assert_close(drawn(pipe), expected, atol=1e-5, rtol=0)


def test_loading_at_a_strength_changes_no_other_adapter(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    attached(pipe, "style", 1)
    ether.save(pipe, tmp_path, "style")
    attached(pipe, "dog", 2)
    ether.set_adapters(pipe, "dog", 0.5)
    shake(ether.attach(pipe.text_encoder, EtherConfig(), "dog"), seed=3)  # at strength 1 there
    ether.load(pipe, tmp_path, name="cat", strength=0.7)
    found = {component: host.strengths for component, host in hosts_of(pipe).items()}
    assert found == {"unet": {"dog": 0.5, "cat": 0.7}, "text_encoder": {"dog": 1.0}}


def test_loading_turns_no_component_off_that_was_on(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    attached(pipe)
    ether.save(pipe, tmp_path)
    ether.disable(pipe)
    shake(ether.attach(pipe.text_encoder, EtherConfig(), "style"), seed=3)
    ether.load(pipe, tmp_path, name="cat")
    assert {component: host.enabled for component, host in hosts_of(pipe).items()} == {
        "unet": False,
        "text_encoder": True,
    }


def of_both(pipe: DiffusionPipeline) -> None:
    attached(pipe)
    shake(ether.attach(pipe.text_encoder, EtherConfig(), "dog"), seed=3)


def test_an_interrupted_fuse_leaves_no_component_fused(
    pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_both(pipe)
    before, fuse = weights(pipe), Projection.fuse

    def interrupted(projection: Projection) -> None:
        if "self_attn" in projection.path:  # of the text encoder, which comes after the UNet
            raise KeyboardInterrupt
        fuse(projection)

    monkeypatch.setattr(Projection, "fuse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ether.fuse(pipe)
    assert same(weights(pipe), before)
    assert not ether.adapters(pipe)["dog"].fused


def test_an_interrupted_load_leaves_no_component_with_the_adapter(
    pipe: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_both(pipe)
    ether.save(pipe, tmp_path)
    ether.unload(pipe)

    def interrupted(model: nn.Module, *given: Any) -> Any:
        if model is pipe.text_encoder:
            raise KeyboardInterrupt
        return attach_made(model, *given)

    monkeypatch.setattr(verbs, "attach_made", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ether.load(pipe, tmp_path)
    assert ether.adapters(pipe) == {}
    assert host_of(pipe.unet) is None
