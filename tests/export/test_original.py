"""The layout of the models' authors, against diffusers' own readers of their checkpoints and of their LoRA files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from export.conftest import adapted
from families.tiny import build
from safetensors.torch import load_file
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion.export.factors import ExportError, LoraLayer
from ether_diffusion.export.names import keys_of, tensors_of
from ether_diffusion.families.chroma import Chroma
from ether_diffusion.families.flux import Flux
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.sd3 import StableDiffusion3

RANK = 2


class Checkpoint(dict[str, Tensor]):
    """The weights of a checkpoint; what else its reader asks for is made up."""

    def pop(self, key: str, *default: object) -> Any:
        return super().pop(key, torch.zeros(21504 if key.endswith("linear1.bias") else 6))  # q, k, v and MLP of FLUX.1


def on_meta(kind: type, **config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind(**config)
    return model


def denoisers() -> dict[str, tuple[Any, nn.Module]]:
    """FLUX.1 at its real width, since diffusers' reader knows no other, and SD3.5's two kinds of blocks."""
    flux = on_meta(FluxTransformer2DModel, num_layers=2, num_single_layers=2, guidance_embeds=True)
    sizes = {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32}
    sd35 = on_meta(SD3Transformer2DModel, dual_attention_layers=(0, 1), qk_norm="rms_norm", **sizes)
    return {
        "flux": (Flux, flux),
        "sd3": (StableDiffusion3, sd35),
        "chroma": (Chroma, on_meta(ChromaTransformer2DModel, num_layers=2, num_single_layers=2)),
        "flux2": (type(family_of(build("flux2"))), build("flux2").transformer),
        "z_image": (type(family_of(build("z_image"))), build("z_image").transformer),
    }


def updates(model: nn.Module) -> dict[str, LoraLayer]:
    """Random updates of every Linear."""
    rng = torch.Generator().manual_seed(0)

    def layer(path: str, module: nn.Linear) -> LoraLayer:
        down = torch.randn(RANK, module.in_features, generator=rng, dtype=torch.float64)
        up = torch.randn(module.out_features, RANK, generator=rng, dtype=torch.float64)
        return LoraLayer("transformer", path, down, up, down[:0], up.mT[:0])

    return {
        f"transformer.{path}": layer(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("name", ["chroma", "flux", "flux2", "sd3", "z_image"])
def test_every_layer_is_where_the_reader_of_checkpoints_finds_it(name: str) -> None:
    """The reader moves rows; so it moves those of up, and down has the columns.

    Two products are equal if they are on a few random vectors; whole ones of FLUX.1 have 66 M numbers.
    """
    kind, model = denoisers()[name]
    family = object.__new__(kind)
    family.pipe = SimpleNamespace(transformer=model)
    layers = updates(model)
    keys = keys_of(layers, family, "original")
    tensors = tensors_of(layers, keys)
    assert len(tensors) < 2 * len(layers), "q, k and v are one layer"
    assert {key.split(".lora_")[0].split(".")[0] for key in tensors} == {"diffusion_model"}
    names = {
        where: key.up.removeprefix("diffusion_model.").removesuffix(".lora_B.weight") for where, key in keys.items()
    }
    checkpoint = Checkpoint({f"{names[where]}.weight": tensors[key.up].clone() for where, key in keys.items()})
    if name == "sd3":
        marks = {f"joint_blocks.{n}.{part}" for n in range(2) for part in ("x_block.attn2.ln_q.weight",)}
        checkpoint |= dict.fromkeys(marks, torch.zeros(6))
    reader = getattr(single_file_utils, f"convert_{name}_transformer_checkpoint_to_diffusers")
    read = reader(checkpoint)
    rng = torch.Generator().manual_seed(1)
    for where, layer in layers.items():
        probes = torch.randn(layer.down.shape[1], 3, generator=rng, dtype=torch.float64)
        seen = read[f"{layer.path}.weight"] @ (tensors[keys[where].down] @ probes)
        torch.testing.assert_close(seen, layer.up @ (layer.down @ probes), rtol=0, atol=1e-10, msg=where)


def test_diffusers_draws_from_it(tmp_path: Path) -> None:
    """FLUX.2's reader takes the authors' names; FLUX.1's knows its real sizes only, Z-Image's passes over q, k, v."""
    pipe = adapted("flux2", "attention+mlp")
    made = ether.export_lora(pipe, tmp_path / "lora.safetensors", "original", dtype="float32")
    assert made.verified.loaded == 0
    assert made.verified.difference < 1e-5
    stock = build("flux2")
    stock.set_progress_bar_config(disable=True)

    def draw(drawn: Any) -> Tensor:
        given = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
        return drawn(prompt="a dog", generator=[torch.Generator().manual_seed(0)], **given).images

    before = draw(stock)
    stock.load_lora_weights(str(tmp_path / "lora.safetensors"))
    effect = float((draw(pipe) - before).abs().max())
    assert effect > 1e-2
    torch.testing.assert_close(draw(stock), draw(pipe), rtol=0, atol=1e-3 * effect + 1e-5)


def test_parts_without_an_adapter_are_zero(tmp_path: Path) -> None:
    pipe = build("flux")
    ether.attach(pipe.transformer, ether.EtherConfig(targets=("attn.to_k",)), "a")
    ether.export_lora(pipe, tmp_path / "lora.safetensors", "original")
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {key.split(".lora_")[0] for key in tensors} == {
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "diffusion_model.single_blocks.0.linear1",
    }
    up = tensors["diffusion_model.single_blocks.0.linear1.lora_B.weight"]
    assert up.shape == (3 * 32 + 128, 16)
    assert not up[:32].any()
    assert up[32:64].any()
    assert not up[64:].any()


def test_text_encoders_have_no_names_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="know no name for text_encoder"):
        ether.export_lora(adapted("flux", encoders=("text_encoder",)), tmp_path / "lora.safetensors", "original")
    with pytest.raises(ExportError, match="has no LoRA format 'original'"):
        ether.export_lora(adapted("sdxl"), tmp_path / "lora.safetensors", "original")
