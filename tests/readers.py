"""Exported LoRA files through the code of the programs that read them: ComfyUI's and kohya's own functions.

    python tests/readers.py --comfyui FOLDER --kohya FOLDER

Each folder is a checkout of that program, which is not part of this project (docs/verification.md names the commits).
Of every family a tiny pipeline with an adapter on all Linears that the format has names for is exported; the reader's
functions make its names and read the file, and what they add to every weight is compared with what the adapter adds.
A checkout needs its own packages only as far as these functions use them: ``einops``, ``torchsde``, ``trampoline``,
``comfy-kitchen``, ``comfy-aimdo``, ``sentencepiece``, ``av`` for ComfyUI, without their dependencies, and
``opencv-python-headless`` for kohya's.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import logging
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401 - before there is a module that goes by the name of torchvision
import torch
import transformers
from diffusers import DiffusionPipeline
from export.conftest import shaken
from families.tiny import build
from safetensors.torch import load_file
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion.core.host import host_of
from ether_diffusion.families.registry import family_of

Weights = dict[str, Tensor]
ENCODERS = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("text_encoder", "text_encoder_2"),
    "flux2": ("text_encoder",),
    "qwen_image": ("text_encoder",),
    "z_image": ("text_encoder",),
}
COMFY_ENCODERS = {
    "sd": {"text_encoder": "clip_l.transformer.text_model."},
    "sdxl": {"text_encoder": "clip_l.transformer.text_model.", "text_encoder_2": "clip_g.transformer.text_model."},
    "sd3": {
        "text_encoder": "clip_l.transformer.text_model.",
        "text_encoder_2": "clip_g.transformer.text_model.",
        "text_encoder_3": "t5xxl.transformer.",
    },
    "flux": {"text_encoder": "clip_l.transformer.text_model.", "text_encoder_2": "t5xxl.transformer."},
    "flux2": {"text_encoder": "qwen3_4b.transformer.model."},
    "qwen_image": {"text_encoder": "qwen25_7b.transformer.model."},
    "z_image": {"text_encoder": "qwen3_4b.transformer.model."},
}
"""What ComfyUI's text encoders call the layers that transformers has in models of several names."""
INSIDE = re.compile(r"^(text_model|model\.language_model|model)\.")


def exported(family: str, kind: str, folder: Path) -> tuple[DiffusionPipeline, Weights, str]:
    """The pipeline with its adapter, the tensors of its file, and what the adapter is on."""
    encoders = () if kind == "original" else ENCODERS.get(family, ())
    for targets in ("all", "attention+mlp"):  # the widest that the format has names for
        pipe = larger(family)
        pipe.set_progress_bar_config(disable=True)
        for component in (family_of(pipe).DENOISER, *encoders):
            wanted = targets if component in ("unet", "transformer") else "attention"
            shaken(ether.attach(getattr(pipe, component), ether.EtherConfig(targets=wanted), "a"), len(component))
        try:
            made = ether.export_lora(pipe, folder / f"{family}.{kind}.safetensors", kind, dtype="float32")
        except ether.ExportError:
            if targets == "attention+mlp":
                raise
        else:
            return pipe, load_file(made.path), targets
    raise AssertionError


def larger(family: str) -> DiffusionPipeline:
    """A tiny pipeline; what widths ComfyUI takes for granted are real, and SD3 has the two kinds of blocks of SD3.5."""
    pipe = build(family)
    changed = {
        "sd3": {
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_projection_dim": 128,
            "dual_attention_layers": (0,),
            "pos_embed_max_size": 8,
        },
        "sdxl": {"layers_per_block": 2},
        "pixart_sigma": {"attention_head_dim": 72, "num_attention_heads": 16, "cross_attention_dim": 1152},
    }
    if family in changed:
        torch.manual_seed(0)
        name = family_of(pipe).DENOISER
        old = getattr(pipe, name)
        setattr(pipe, name, type(old).from_config({**old.config, **changed[family]}))
    return pipe


def weights_of(pipe: DiffusionPipeline, component: str) -> Weights:
    return {key: value.detach().clone() for key, value in getattr(pipe, component).state_dict().items()}


def deltas(pipe: DiffusionPipeline) -> dict[str, tuple[Weights, Weights]]:
    """Of every component its weights, and what the adapters add to them."""
    components = [name for name, part in pipe.components.items() if isinstance(part, nn.Module) and host_of(part)]
    before = {component: weights_of(pipe, component) for component in components}
    ether.fuse(pipe)
    after = {component: weights_of(pipe, component) for component in components}
    ether.unfuse(pipe)
    return {
        component: (before[component], {key: after[component][key] - value for key, value in before[component].items()})
        for component in components
    }


def stand_in_for_torchvision() -> None:
    """Both programs import it, and none of the functions that are called here uses it."""
    transformers.utils.is_torchvision_available()  # is remembered
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]


class Comfy:
    """ComfyUI's functions, of a checkout."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        given, sys.argv = sys.argv, ["comfyui", "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.lora
        import comfy.lora_convert
        import comfy.model_base
        import comfy.model_detection
        import comfy.utils

        sys.argv = given
        self.comfy = comfy
        base = comfy.model_base
        self.classes = {
            "sd": base.BaseModel,
            "sdxl": base.SDXL,
            "sd3": base.SD3,
            "flux": base.Flux,
            "flux2": base.Flux2,
            "qwen_image": base.QwenImage,
            "z_image": base.Lumina2,
            "chroma": base.Chroma,
            "aura_flow": base.AuraFlow,
            "pixart_sigma": base.PixArt,
            "hidream": base.HiDream,
        }

    def denoiser(self, family: str, pipe: DiffusionPipeline, weights: Weights) -> Weights:
        """Weights in ComfyUI's layout, by its own conversion of diffusers' checkpoints."""
        if family in ("sd", "sdxl"):
            names = self.comfy.utils.unet_to_diffusers(self.unet_config(pipe))
            return {f"diffusion_model.{names[key]}": value for key, value in weights.items() if key in names}
        weights = dict(weights)
        if family == "flux2":  # the function asks for a bias of FLUX.1
            weights["x_embedder.bias"] = torch.zeros(len(weights["x_embedder.weight"]))
        made = self.comfy.model_detection.convert_diffusers_mmdit(weights, "")
        if made is None:  # the layout is diffusers' own
            made = weights
        elif family == "flux2":  # it leaves out layers that FLUX.1 does not have, here and below
            made |= self.added(pipe, weights, self.flux2(pipe.transformer.config))
        elif family == "chroma":
            made |= self.added(pipe, weights, self.approximator(pipe.transformer.config))
        return {f"diffusion_model.{key}": value for key, value in made.items()}

    def added(self, pipe: DiffusionPipeline, weights: Weights, known: set[str]) -> Weights:
        """What a base has beside FLUX.1, under names that ComfyUI's class of it has."""
        family = family_of(pipe)
        places = {key: family.original_place(key.removesuffix(".weight")) for key in weights}
        found = {f"{place.name}.weight": weights[key] for key, place in places.items() if place is not None}
        if unknown := found.keys() - known:
            raise AssertionError(f"ComfyUI has no {unknown}")
        return found

    def approximator(self, sizes: Any) -> set[str]:
        """Names of what Chroma has."""
        from comfy.ldm.chroma.layers import Approximator

        model = Approximator(1, 1, 1, sizes.approximator_layers, operations=torch.nn)
        return {f"distilled_guidance_layer.{name}" for name in model.state_dict()}

    def flux2(self, sizes: Any) -> set[str]:
        """Names of what FLUX.2 has."""
        from comfy.ldm.flux.model import Flux

        with torch.device("meta"):
            model = Flux(
                image_model="flux2",
                operations=torch.nn,
                in_channels=sizes.in_channels,
                out_channels=sizes.in_channels,
                vec_in_dim=None,
                context_in_dim=sizes.joint_attention_dim,
                hidden_size=sizes.num_attention_heads * sizes.attention_head_dim,
                mlp_ratio=sizes.mlp_ratio,
                num_heads=sizes.num_attention_heads,
                depth=sizes.num_layers,
                depth_single_blocks=sizes.num_single_layers,
                axes_dim=list(sizes.axes_dims_rope),
                theta=2000,
                patch_size=1,
                qkv_bias=False,
                guidance_embed=False,
                txt_ids_dims=[3],
                global_modulation=True,
                mlp_silu_act=True,
                ops_bias=False,
            )
        return set(model.state_dict())

    def unet_config(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """As ComfyUI would find it in a checkpoint of this UNet."""
        config = pipe.unet.config
        depths = config.transformer_layers_per_block
        depths = [depths] * len(config.block_out_channels) if isinstance(depths, int) else list(depths)
        has = ["CrossAttn" in kind for kind in config.down_block_types]
        per_block = [depth if attention else 0 for depth, attention in zip(depths, has, strict=True)]
        layers = config.layers_per_block
        return {
            "num_res_blocks": [layers] * len(depths),
            "channel_mult": [width // config.block_out_channels[0] for width in config.block_out_channels],
            "transformer_depth": [depth for depth in per_block for _ in range(layers)],
            "transformer_depth_middle": depths[-1],
            "transformer_depth_output": [depth for depth in per_block for _ in range(layers + 1)],
        }

    def model(self, family: str, pipe: DiffusionPipeline, weights: Weights) -> Any:
        """What the functions ask of a model: its class, its weights, its settings."""
        kind, config = self.classes[family], pipe.components.get("transformer")
        model: Any = type(kind.__name__, (kind,), {"__init__": lambda self: None, "state_dict": lambda self: weights})()
        if family in ("sd", "sdxl"):
            settings = self.unet_config(pipe)
        else:
            sizes = config.config
            inner = sizes.get("num_attention_heads", 0) * sizes.get("attention_head_dim", 0)
            settings = {
                "hidden_size": inner,
                "depth": inner // 64 if family == "sd3" else sizes.get("num_layers", 0),
                "num_blocks": sizes.get("num_layers", 0),
                "depth_single_blocks": sizes.get("num_single_layers", 0),
                "n_layers": sizes.get("n_layers", 0),
                "dim": sizes.get("dim", 0),
                "n_refiner_layers": sizes.get("n_refiner_layers", 0),
            }
            if family == "aura_flow":
                joint, single = sizes["num_mmdit_layers"], sizes["num_single_dit_layers"]
                settings = {"n_double_layers": joint, "n_layers": joint + single}
        object.__setattr__(model, "model_config", types.SimpleNamespace(unet_config=settings))
        return model

    def check(self, family: str, kind: str, folder: Path) -> tuple[str, int, int, float]:
        """Targets, keys, keys that are left over, and the largest difference by the effect of a weight."""
        pipe, file, targets = exported(family, kind, folder)
        names: dict[str, Any] = {}
        base: Weights = {}
        expected: Weights = {}
        for component, (weights, delta) in deltas(pipe).items():
            if component == family_of(pipe).DENOISER:
                own, moved = (self.denoiser(family, pipe, each) for each in (weights, delta))
                self.comfy.lora.model_lora_keys_unet(self.model(family, pipe, own), names)
            else:
                prefix = COMFY_ENCODERS[family][component]
                own, moved = (
                    {f"{prefix}{INSIDE.sub('', key)}": value for key, value in each.items()}
                    for each in (weights, delta)
                )
            base |= own
            expected |= moved
        clips = {key: value for key, value in base.items() if not key.startswith("diffusion_model.")}
        if clips:
            clip: Any = types.SimpleNamespace(state_dict=lambda: clips)
            self.comfy.lora.model_lora_keys_clip(clip, names)
        said = Said()
        logging.getLogger().addHandler(said)
        patches = self.comfy.lora.load_lora(self.comfy.lora_convert.convert_lora(dict(file)), names)
        logging.getLogger().removeHandler(said)
        left = [line for line in said.lines if "not loaded" in line]
        by_weight: dict[str, list[Any]] = {}
        for target, patch in patches.items():
            key, offset, function = target if isinstance(target, tuple) and len(target) == 3 else (target, None, None)
            if isinstance(key, tuple):
                key, offset = key
            by_weight.setdefault(key, []).append((1.0, patch, 1.0, offset, function))
        worst = 0.0
        for key, delta in expected.items():
            size = float(delta.norm())
            if key not in by_weight:
                worst = max(worst, float(size > 1e-12))
                continue
            moved = self.comfy.lora.calculate_weight(by_weight[key], torch.zeros_like(delta), key)
            worst = max(worst, float((moved - delta).norm()) / size)
        return targets, len(file), len(left), worst


class Said(logging.Handler):
    """What a reader warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Kohya:
    """kohya's sd-scripts, of a checkout."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        import networks.lora

        self.lora = networks.lora

    def check(self, family: str, kind: str, folder: Path) -> tuple[str, int, int, float]:
        """As :meth:`Comfy.check`; SDXL's UNet has the names of the original code, which a class of theirs tells."""
        pipe, file, targets = exported(family, kind, folder)
        found = deltas(pipe)
        unet, encoders = pipe.unet, [TextModel(getattr(pipe, name)) for name in ENCODERS[family]]
        if family == "sdxl":
            unet = renamed(pipe.unet)
        network, read = self.lora.create_network_from_weights(
            1.0, None, None, encoders if family == "sdxl" else encoders[0], unet, weights_sd=dict(file)
        )
        loras = network.text_encoder_loras + network.unet_loras
        owners = {module: (component, path) for component in found for path, module in named(pipe, component)}
        places = [owners[each.org_module] for each in loras]
        network.apply_to(encoders if family == "sdxl" else encoders[0], unet, True, True)
        left = network.load_state_dict(read, strict=False).unexpected_keys
        worst, seen = 0.0, set()
        for each, (component, path) in zip(loras, places, strict=True):
            delta = found[component][1][f"{path}.weight"]
            moved = each.lora_up.weight @ each.lora_down.weight * each.scale
            worst = max(worst, float((moved - delta).norm() / delta.norm()))
            seen.add((component, path))
        missing = [
            (component, key)
            for component, (_, delta) in found.items()
            for key, value in delta.items()
            if value.abs().max() > 0 and (component, key.removesuffix(".weight")) not in seen
        ]
        return targets, len(file), len(left) + len(missing), worst


class TextModel(nn.Module):
    """A CLIP text encoder as transformers 4 has it, whose layers are below ``text_model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = getattr(model, "text_model", model)


def renamed(unet: nn.Module) -> nn.Module:
    """SDXL's UNet under the names of the original code, by kohya's table, of kohya's class."""
    from library.sdxl_model_util import make_unet_conversion_map
    from library.sdxl_original_unet import SdxlUNet2DConditionModel

    root: Any = SdxlUNet2DConditionModel.__new__(SdxlUNet2DConditionModel)
    nn.Module.__init__(root)
    original = {theirs: own for own, theirs in make_unet_conversion_map()}
    for name, module in unet.named_modules():
        if type(module).__name__ == "Transformer2DModel":
            place: Any = root
            *parents, last = original[f"{name}."].removesuffix(".").split(".")
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]
            place.add_module(last, module)
    return root


def named(pipe: DiffusionPipeline, component: str) -> Iterator[tuple[str, nn.Module]]:
    yield from getattr(pipe, component).named_modules()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, help="checkout of ComfyUI")
    parser.add_argument("--kohya", type=Path, help="checkout of kohya's sd-scripts")
    given = parser.parse_args()
    stand_in_for_torchvision()
    wanted: list[tuple[str, Callable[[str, str, Path], tuple[str, int, int, float]], str, str]] = []
    if given.kohya:
        kohya = Kohya(given.kohya)
        wanted += [("kohya", kohya.check, family, "kohya") for family in ("sd", "sdxl")]
    if given.comfyui:
        comfy = Comfy(given.comfyui)
        wanted += [("ComfyUI", comfy.check, family, "comfyui") for family in comfy.classes]
        wanted += [
            ("ComfyUI", comfy.check, family, "original") for family in ("sd3", "flux", "flux2", "z_image", "chroma")
        ]
    failed = False
    print(f"{'reader':8} {'family':13} {'format':9} {'targets':14} {'keys':>5} {'left over':>9} {'difference':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for reader, check, family, kind in wanted:
            targets, keys, left, worst = check(family, kind, Path(folder))
            failed |= left > 0 or worst > 1e-4
            print(f"{reader:8} {family:13} {kind:9} {targets:14} {keys:5} {left:9} {worst:10.1e}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
