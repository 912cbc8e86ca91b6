"""Presets in every family: what each names, and that every projection is the dense fp64 one, gradients included."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline
from families.tiny import build
from helpers import dense_weight, relative_error, replace_weights, shake, vectors_of
from safetensors import safe_open
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion import Adapter, AdapterFileError, EtherConfig, attach
from ether_diffusion.core.adapter import check_blocks
from ether_diffusion.core.targets import PRESETS, Target, find_targets, root_of
from ether_diffusion.pipelines.file import AdapterFile

CLIP = {"attention": r"self_attn\.(q|k|v|out)_proj", "mlp": r"mlp\.fc[12]"}
T5 = {"attention": r"SelfAttention\.[qkvo]", "mlp": r"DenseReluDense\.w(i|o)"}
QWEN = {"attention": r"layers\.\d+\.self_attn\.[qkvo]_proj", "mlp": r"layers\.\d+\.mlp\.(gate|up|down)_proj"}
OWN, PROMPT = r"(to_[qkv]|to_out\.0)", r"(add_[qkv]_proj|to_add_out)"
NET = r"net\.(0\.proj|2)"
UNET = {"self": rf"attn1\.{OWN}", "cross": rf"attn2\.{OWN}", "mlp": rf"ff\.{NET}"}
NAMES: dict[tuple[str, str], dict[str, str]] = {
    ("sd", "unet"): UNET,
    ("sd", "text_encoder"): CLIP,
    ("sdxl", "unet"): UNET,
    ("sdxl", "text_encoder_2"): CLIP,
    ("sd3", "transformer"): {
        "self": rf"transformer_blocks\.\d\.attn\.{OWN}",
        "cross": rf"transformer_blocks\.\d\.attn\.{PROMPT}",
        "mlp": rf"ff(_context)?\.{NET}",
    },
    ("sd3", "text_encoder_2"): CLIP,
    ("sd3", "text_encoder_3"): T5,
    ("flux", "transformer"): {
        "self": rf"\d\.attn\.{OWN}|single_transformer_blocks\.\d\.proj_out",
        "cross": rf"attn\.{PROMPT}",
        "mlp": rf"ff(_context)?\.{NET}|single_transformer_blocks\.\d\.proj_(mlp|out)",
    },
    ("flux", "text_encoder_2"): T5,
    ("flux2", "transformer"): {
        "self": rf"attn\.{OWN}|single_transformer_blocks\.\d\.attn\.to_(qkv_mlp_proj|out)",
        "cross": rf"attn\.{PROMPT}",
        "mlp": r"ff(_context)?\.linear_(in|out)|single_transformer_blocks\.\d\.attn\.to_(qkv_mlp_proj|out)",
    },
    ("flux2", "text_encoder"): {**QWEN, "beside": "lm_head"},
    ("qwen_image", "transformer"): {
        "self": rf"attn\.{OWN}",
        "cross": rf"attn\.{PROMPT}",
        "mlp": rf"(img|txt)_mlp\.{NET}",
    },
    ("qwen_image", "text_encoder"): {
        "attention": rf"language_model\.{QWEN['attention']}",
        "mlp": rf"language_model\.{QWEN['mlp']}",
        "beside": r"lm_head|model\.visual\..*",
    },
    ("z_image", "transformer"): {
        "self": rf"(?<!context_refiner\.\d\.)(?<!context_refiner\.\d\d\.)attention\.{OWN}",
        "cross": rf"context_refiner\.\d+\.attention\.{OWN}",
        "mlp": r"feed_forward\.w[123]",
    },
    ("z_image", "text_encoder"): QWEN,
}
"""Patterns of the ends of paths, written apart from the package; ``beside``: what no prompt passes."""
EVERYWHERE = pytest.mark.parametrize(("family", "component"), NAMES)
TOUCHED = ("attention", "attention+mlp", "all", "self", "cross")


@cache
def pipeline(family: str) -> DiffusionPipeline:
    return build(family)


def paths_of(model: nn.Module, pattern: str) -> set[str]:
    """The Linears whose paths end as the pattern says."""
    root = root_of(model)
    end = re.compile(rf"(^|.*\.)({pattern})$")
    return {path for path, module in root.named_modules() if isinstance(module, nn.Linear) and end.match(path)}


def expected(family: str, component: str, preset: str) -> set[str]:
    names, model = NAMES[family, component], getattr(pipeline(family), component)
    attention = names.get("attention") or f"{names['self']}|{names['cross']}"
    patterns = {
        "attention": attention,
        "attention+mlp": f"{attention}|{names['mlp']}",
        "self": names.get("self", attention),
        "cross": names.get("cross", "nothing"),
    }
    if preset == "all":
        return paths_of(model, ".*") - paths_of(model, names.get("beside", "nothing"))
    return paths_of(model, patterns[preset])


@EVERYWHERE
@pytest.mark.parametrize("preset", TOUCHED)
def test_a_preset_names_these_linears(family: str, component: str, preset: str) -> None:
    model = getattr(pipeline(family), component)
    wanted = expected(family, component, preset)
    if wanted:
        found = [target.path for target in find_targets(model, preset)]
        assert len(found) == len(set(found))
        assert set(found) == wanted
    else:
        with pytest.raises(ValueError, match=f'has no cross-attention for targets="{preset}": the presets that find'):
            find_targets(model, preset)


def test_only_text_encoders_have_no_cross_attention() -> None:
    without = [where for where in NAMES if not expected(*where, "cross")]
    assert without == [where for where in NAMES if "text_encoder" in where[1]]


@pytest.mark.parametrize(("family", "component"), [where for where in NAMES if where[1] != "unet"])
def test_a_preset_for_geglu_finds_none_here_and_says_what_to_use(family: str, component: str) -> None:
    with pytest.raises(ValueError, match=r'no GEGLU for targets="attention\+geglu": .* are attention, attention\+mlp'):
        find_targets(getattr(pipeline(family), component), "attention+geglu")


@EVERYWHERE
def test_older_names_are_the_same_presets(family: str, component: str) -> None:
    model = getattr(pipeline(family), component)
    assert find_targets(model, "self_attention") == find_targets(model, "self")
    if expected(family, component, "cross"):
        assert find_targets(model, "cross_attention") == find_targets(model, "cross")


FUSED = {
    ("flux", "attention"): {"proj_out": ([("attention", 0, 32)], [("", 0, 32)])},
    ("flux", "attention+mlp"): {"proj_out": ([("attention", 0, 32), ("mlp", 32, 128)], [("", 0, 32)])},
    ("flux2", "attention"): {
        "attn.to_qkv_mlp_proj": ([("", 0, 32)], [("q", 0, 32), ("k", 32, 32), ("v", 64, 32)]),
        "attn.to_out": ([("attention", 0, 32)], [("", 0, 32)]),
    },
    ("flux2", "all"): {
        "attn.to_qkv_mlp_proj": ([("", 0, 32)], [("q", 0, 32), ("k", 32, 32), ("v", 64, 32), ("mlp", 96, 192)]),
        "attn.to_out": ([("attention", 0, 32), ("mlp", 32, 96)], [("", 0, 32)]),
    },
}


@pytest.mark.parametrize(("family", "preset"), FUSED)
def test_parts_lie_where_the_blocks_take_them_apart(family: str, preset: str) -> None:
    model = pipeline(family).transformer
    found = {target.path: target for target in find_targets(model, preset)}
    for name, (inputs, outputs) in FUSED[family, preset].items():
        target = found.pop(f"single_transformer_blocks.0.{name}")
        assert ([*target.inputs.parts], [*target.outputs.parts]) == (inputs, outputs)
        packed = getattr(target.module, "_tp_packed_col_blocks", None)  # what diffusers itself says of the sides
        if packed is not None and preset == "all":
            q, k, v, *mlp = packed
            assert [part.width for part in target.outputs.parts] == [q, k, v, sum(mlp)]
        if (packed := getattr(target.module, "_tp_packed_row_blocks", None)) and preset != "attention":
            assert [part.width for part in target.inputs.parts] == packed
    assert all(part.name == "" for target in found.values() for part in (*target.inputs.parts, *target.outputs.parts))


class Captured:
    """Inputs and answers of one Linear."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[Tensor] = []
        self.handle = module.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))


def test_the_attention_part_is_what_attention_gives() -> None:
    """Of the input of ``proj_out`` and ``to_out``, that part is the answer of the attention, to the last bit."""
    for family, path in (("flux", "proj_out"), ("flux2", "attn.to_out")):
        pipe = build(family)
        block = pipe.transformer.single_transformer_blocks[0]
        seen, given = [], Captured(block.get_submodule(path))
        if family == "flux":
            block.attn.register_forward_hook(lambda *args, into=seen: into.append(args[2]))
        else:
            block.attn.mlp_act_fn.register_forward_hook(lambda *args, into=seen: into.append(args[2]))
        draw(pipe)
        (target,) = [
            each
            for each in find_targets(pipe.transformer, "all")
            if each.path.endswith(f"0.{path}") and "single" in each.path
        ]
        attention, mlp = target.inputs.parts
        part = attention if family == "flux" else mlp
        assert torch.equal(given.inputs[0].narrow(-1, part.start, part.width), seen[0])


def blocks_for(targets: list[Target], method: str) -> int:
    """The most blocks of 4, 2 and 1 that divide all parts; tiny models have odd widths."""
    for n_blocks in (4, 2):
        try:
            check_blocks(targets, EtherConfig(method, n_blocks))
        except ValueError:
            continue
        return n_blocks
    return 1


METHODS = [("ether_plus", TOUCHED), ("ether", ("attention", "all")), ("naive", ("all",))]


@pytest.mark.parametrize(("method", "presets"), METHODS, ids=[method for method, _ in METHODS])
@EVERYWHERE
def test_every_projection_is_the_dense_one(family: str, component: str, method: str, presets: tuple[str, ...]) -> None:
    model = build(family).components[component].requires_grad_(False).double()
    for preset in presets:
        if not expected(family, component, preset):
            continue
        targets = find_targets(model, preset)
        adapter = attach(model, EtherConfig(method, blocks_for(targets, method), targets=preset)).double()
        shake(adapter)
        for target in targets[:60]:  # the language model of FLUX.2 has 28 layers of one kind
            for tokens in (3, target.out_features):
                parity(adapter, target, tokens)
        adapter.detach()


def parity(adapter: Adapter, target: Target, tokens: int) -> None:
    """Answer, and gradients of the input and of every vector."""
    own = vectors_of(adapter, target.path)
    assert own
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, target.in_features, generator=generator, dtype=torch.float64)
    grad = torch.randn(tokens, target.out_features, generator=generator, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    copies = {key: value.detach().clone().requires_grad_() for key, value in own.items()}
    found = target.module(mine)
    weight, bias = target.module.weight, target.module.bias
    assert isinstance(weight, Tensor)
    reference = F.linear(theirs, dense_weight(weight, copies), bias)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(found, [mine, *own.values()], grad)
    references = torch.autograd.grad(reference, [theirs, *copies.values()], grad)
    for value, exact in zip((found, *gradients), (reference, *references), strict=True):
        assert relative_error(value, exact) < 1e-10, target.path


def draw(pipe: DiffusionPipeline) -> Tensor:
    return pipe(
        prompt=["a red dog"],
        height=32,
        width=32,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


def shaken(pipe: DiffusionPipeline, preset: str, method: str = "ether_plus", scale: float = 0.1) -> Adapter:
    """An adapter of the denoiser that moves the picture, and not out of all bounds."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    targets = find_targets(denoiser, preset)
    adapter = attach(denoiser, EtherConfig(method, blocks_for(targets, method), targets=preset), "dog")
    shake(adapter, scale=scale)
    return adapter


@pytest.mark.parametrize("family", ["sd", "sd3", "flux", "flux2", "qwen_image", "z_image"])
@pytest.mark.parametrize("preset", ["attention", "all"])
def test_pictures_are_those_of_the_dense_weights_fused_and_unfused(family: str, preset: str) -> None:
    pipe, twin = build(family), build(family)
    name = "unet" if family == "sd" else "transformer"
    before, base = {k: v.clone() for k, v in getattr(pipe, name).state_dict().items()}, draw(pipe)
    adapter = shaken(pipe, preset)
    replace_weights(getattr(twin, name), {adapter: 1.0})
    moved, exact = draw(pipe), draw(twin)
    assert relative_error(base, exact) > 1e-3
    assert relative_error(moved, exact) < 1e-4
    ether.fuse(pipe)
    assert relative_error(draw(pipe), exact) < 1e-4
    ether.unfuse(pipe)
    assert all(torch.equal(value, before[key]) for key, value in getattr(pipe, name).state_dict().items())
    assert torch.equal(draw(pipe), moved)
    ether.unload(pipe)
    assert torch.equal(draw(pipe), base)


def contents(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and numbers of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118 no mapping


VERSIONS = {"sd": "1", "sd3": "1", "flux": "2", "flux2": "2", "qwen_image": "1", "z_image": "1"}


@pytest.mark.parametrize("preset", TOUCHED)
@pytest.mark.parametrize("family", VERSIONS)
def test_an_adapter_comes_back_from_its_file(family: str, preset: str, tmp_path: Path) -> None:
    pipe = pipeline(family)
    component = "unet" if family == "sd" else "transformer"
    adapter = shaken(pipe, preset)
    path = ether.save(pipe, tmp_path)
    ether.unload(pipe)
    version = "1" if preset == "cross" else VERSIONS[family]
    metadata, vectors = contents(path)
    assert metadata["format_version"] == version
    assert vectors == {f"{component}.{key}": value.tolist() for key, value in adapter.state_dict().items()}
    ether.load(pipe, tmp_path, "again")
    again = tmp_path / "again"
    ether.save(pipe, again)
    ether.unload(pipe)
    assert contents(again / path.name) == contents(path)


def test_text_encoders_of_every_kind_come_back_from_a_file(tmp_path: Path) -> None:
    for family, component in (("sd3", "text_encoder_3"), ("flux2", "text_encoder"), ("sd3", "text_encoder_2")):
        pipe = pipeline(family)
        shake(adapter := attach(getattr(pipe, component), EtherConfig(n_blocks=2), "dog"))
        path = ether.save(pipe, tmp_path / family / component)
        ether.unload(pipe)
        assert contents(path)[0]["format_version"] == "1"
        ether.load(pipe, path)
        ether.save(pipe, tmp_path / "again")
        ether.unload(pipe)
        again = AdapterFile.read(tmp_path / "again").states[component]
        assert all(torch.equal(again[key], value) for key, value in adapter.state_dict().items())


OLD = {
    # what 0.1 found under a preset: no proj_out, to_out undivided, no o_proj, attention alone where there is no GEGLU
    ("flux", "transformer", "attention"): rf"\d\.attn\.({OWN}|{PROMPT})",
    ("flux", "transformer", "self_attention"): rf"\d\.attn\.({OWN}|{PROMPT})",
    ("flux2", "transformer", "attention"): rf"attn\.({OWN}|{PROMPT}|to_out)",
    ("sd3", "transformer", "self_attention"): rf"attn\.({OWN}|{PROMPT})",
    ("sd3", "transformer", "attention+geglu"): rf"attn\.({OWN}|{PROMPT})",
    ("sd", "text_encoder", "attention+geglu"): CLIP["attention"],
    ("z_image", "text_encoder", "attention"): r"self_attn\.[qkv]_proj",
    ("flux2", "transformer", "patterns"): r"to_qkv_mlp_proj",
}


def file_of_0_1(model: nn.Module, component: str, preset: str, pattern: str) -> AdapterFile:
    """ETHER vectors for whole Linears, as 0.1 wrote them."""
    root = root_of(model)
    config = EtherConfig("ether", 2, targets=("to_qkv_mlp_proj",) if preset == "patterns" else preset)
    state = {}
    for path in sorted(paths_of(model, pattern)):
        linear = root.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        state[f"{path}.u"] = torch.randn(2, linear.in_features // 2)
    return AdapterFile({component: state}, {component: config})


@pytest.mark.parametrize(("family", "component", "preset"), OLD)
def test_files_of_0_1_load_with_the_meaning_that_they_had(
    family: str, component: str, preset: str, tmp_path: Path
) -> None:
    pipe = pipeline(family)
    model = getattr(pipe, component)
    file = file_of_0_1(model, component, preset, OLD[family, component, preset])
    path = file.write(tmp_path)
    ether.load(pipe, path)
    try:
        again = ether.save(pipe, tmp_path / "again")
        assert AdapterFile.read(again).states[component].keys() == file.states[component].keys()
        assert contents(again)[0]["format_version"] == "1"
    finally:
        ether.unload(pipe)
    whole = file.states[component]
    for key in whole:
        file.states[component] = {other: value for other, value in whole.items() if other != key}
        with pytest.raises(AdapterFileError) as refused:
            ether.load(pipe, file.write(tmp_path))
        problems = str(refused.value).splitlines()[1:]
        assert problems == [f"  missing key: {component}.{key}"] or (
            preset == "attention+geglu" and "has no GEGLU" in problems[0]
        )


def drop_part(state: dict[str, Tensor]) -> None:
    del state["single_transformer_blocks.0.attn.to_out.u.attention"]


def whole_side(state: dict[str, Tensor]) -> None:
    state["single_transformer_blocks.0.attn.to_out.u"] = torch.ones(4, 32)


def other_part(state: dict[str, Tensor]) -> None:
    state["single_transformer_blocks.0.attn.to_out.u.mlp"] = torch.ones(4, 24)


def reshape(state: dict[str, Tensor]) -> None:
    state["single_transformer_blocks.0.attn.to_out.u.attention"] = torch.ones(4, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_part, r"missing key: transformer\.single_transformer_blocks\.0\.attn\.to_out\.u\.attention"),
        (whole_side, r"unknown key: transformer\.single_transformer_blocks\.0\.attn\.to_out\.u$"),
        (other_part, r"unknown key: transformer\.single_transformer_blocks\.0\.attn\.to_out\.u\.mlp"),
        (reshape, r"wrong shape: .*attn\.to_out\.u\.attention is \(4, 9\), the model needs \(4, 8\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    pipe = pipeline("flux2")
    adapter = shaken(pipe, "attention", "ether")
    state = adapter.state_dict()
    adapter.detach()
    change(state)
    path = AdapterFile({"transformer": state}, {"transformer": adapter.config}).write(tmp_path)
    with pytest.raises(AdapterFileError, match=re.compile(message, re.MULTILINE)):
        ether.load(pipe, path)


def test_every_attention_and_feed_forward_of_a_further_transformer_is_found() -> None:
    """Models made after FLUX.1 have the same single blocks, though their classes are others'."""
    chroma = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    found = {target.path: target for target in find_targets(chroma, "attention")}
    parts = found["single_transformer_blocks.0.proj_out"].inputs.parts
    assert [(part.name, part.width) for part in parts] == [("attention", 32)]


def test_gemma_is_found_like_llama() -> None:
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = transformers.Gemma2Model(config)
    assert {target.path for target in find_targets(model, "attention+mlp")} == paths_of(model, "|".join(QWEN.values()))


def test_all_presets_are_tested_here() -> None:
    assert {*TOUCHED, "attention+geglu", "attention+geglu_input", "self_attention", "cross_attention"} == set(PRESETS)
