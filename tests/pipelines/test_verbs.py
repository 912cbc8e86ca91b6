"""The verbs on real pipelines: images with and without the adapter, all or nothing, errors that say what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from helpers import relative_error, replace_weights, shake
from PIL import Image
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion import AdapterFileError, EtherConfig
from ether_diffusion.core.host import attach_made, host_of
from ether_diffusion.core.targets import Target
from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.playground.tiny import tiny_controlnet, tiny_pipeline

COMPONENTS = ("unet", "text_encoder")


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text2img() -> tuple[DiffusionPipeline, dict[str, Any]]:
    return quiet(tiny_pipeline()), {}


def img2img() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(tiny_pipeline())
    return quiet(pipe), {"image": Image.new("RGB", (64, 64), "teal"), "strength": 1.0}


def inpaint() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionInpaintPipeline.from_pipe(tiny_pipeline())
    image, mask = Image.new("RGB", (64, 64), "teal"), Image.new("L", (64, 64), 255)
    return quiet(pipe), {"image": image, "mask_image": mask, "height": 64, "width": 64}


def controlled() -> tuple[DiffusionPipeline, dict[str, Any]]:
    base = tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        controlnet = tiny_controlnet()
    shake(controlnet, scale=0.03)  # away from its zero convolutions
    pipe = StableDiffusionControlNetPipeline(**base.components, controlnet=controlnet, requires_safety_checker=False)
    return quiet(pipe), {"image": Image.new("RGB", (64, 64), "teal")}


def xl() -> tuple[DiffusionPipeline, dict[str, Any]]:
    return quiet(tiny_pipeline(xl=True)), {}


def xl_img2img() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionXLImg2ImgPipeline.from_pipe(tiny_pipeline(xl=True))
    return quiet(pipe), {"image": Image.new("RGB", (64, 64), "teal"), "strength": 1.0}


PIPELINES = {
    "StableDiffusionPipeline": (text2img, ("unet", "text_encoder")),
    "Img2Img": (img2img, ("unet", "text_encoder")),
    "Inpaint": (inpaint, ("unet", "text_encoder")),
    "ControlNet": (controlled, ("unet", "controlnet")),
    "XL": (xl, ("unet", "text_encoder", "text_encoder_2")),
    "XL Img2Img": (xl_img2img, ("unet",)),
}


def picture(pipe: DiffusionPipeline, **inputs: Any) -> Tensor:
    """Two steps of one image in [0, 1] from a fixed seed."""
    output = pipe(
        "a dog",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **inputs,
    )
    return output.images


def write_adapter(
    pipe: DiffusionPipeline,
    path: Path,
    components: tuple[str, ...] = COMPONENTS,
    config: EtherConfig | None = None,
    seed: int = 1,
) -> Path:
    """Save an adapter that does something, and take it off again."""
    found = [ether.attach(getattr(pipe, component), config, "saved") for component in components]
    for adapter in found:
        shake(adapter, seed)
    file = ether.save(pipe, path, "saved")
    ether.unload(pipe, "saved")
    return file


def weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for key, value in module.state_dict().items()
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def same_file(first: Path, second: Path) -> bool:
    """Equal vectors and equal metadata; safetensors writes the entries of the metadata in a random order."""
    a, b = AdapterFile.read(first), AdapterFile.read(second)
    return (a.configs, a.base_model, a.base_hash) == (b.configs, b.base_model, b.base_hash) and all(
        same(a.states[component], b.states[component]) for component in a.states
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_every_verb_on_every_pipeline(name: str, tmp_path: Path) -> None:
    build, components = PIPELINES[name]
    pipe, inputs = build()
    base, base_weights = picture(pipe, **inputs), weights(pipe)
    write_adapter(pipe, tmp_path, components)
    assert torch.equal(picture(pipe, **inputs), base)

    ether.load(pipe, tmp_path, name="dog")
    info = ether.adapters(pipe)["dog"]
    assert set(info.components) == set(components)
    assert (info.active, info.strength, info.fused) == (True, 1.0, False)
    assert same(weights(pipe), base_weights)
    adapted = picture(pipe, **inputs)
    assert (adapted - base).abs().max() > 0.01

    with ether.disabled(pipe):
        assert not ether.adapters(pipe)["dog"].active
        assert torch.equal(picture(pipe, **inputs), base)
    ether.disable(pipe)
    assert torch.equal(picture(pipe, **inputs), base)
    ether.enable(pipe)
    assert torch.equal(picture(pipe, **inputs), adapted)

    ether.fuse(pipe)
    assert ether.adapters(pipe)["dog"].fused
    changed = weights(pipe)
    assert {key.split(".")[0] for key in changed if not torch.equal(changed[key], base_weights[key])} == set(components)
    assert (picture(pipe, **inputs) - adapted).abs().max() < 1e-4
    ether.unfuse(pipe)
    assert same(weights(pipe), base_weights)
    assert torch.equal(picture(pipe, **inputs), adapted)

    assert same_file(ether.save(pipe, tmp_path / "again", "dog"), tmp_path)

    ether.unload(pipe, "dog")
    assert ether.adapters(pipe) == {}
    assert torch.equal(picture(pipe, **inputs), base)
    assert same(weights(pipe), base_weights)
    assert all(host_of(getattr(pipe, component)) is None for component in components)


def test_adapters_follow_the_components_into_another_pipeline(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    write_adapter(pipe, tmp_path)
    ether.load(pipe, tmp_path, name="dog")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert ether.adapters(other) == ether.adapters(pipe)
    ether.unload(other)
    assert ether.adapters(pipe) == {}


def test_a_pipeline_saved_with_an_adapter_on_is_the_base(
    pipe: DiffusionPipeline, base_folder: Path, tmp_path: Path
) -> None:
    shake(ether.attach(pipe.unet))
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert same(weights(again), weights(StableDiffusionPipeline.from_pretrained(base_folder)))


def two_adapters(pipe: DiffusionPipeline, folder: Path) -> None:
    """ "dog" (two-sided, UNet and text encoder) and "style" (ETHER, UNet alone)."""
    write_adapter(pipe, folder / "dog")
    write_adapter(pipe, folder / "style", ("unet",), EtherConfig("ether", n_blocks=2, targets="cross_attention"), 2)
    ether.load(pipe, folder / "dog", name="dog")
    ether.load(pipe, folder / "style", name="style", strength=0.6)


@pytest.mark.parametrize(
    ("names", "strengths", "expected"),
    [
        ("dog", 1.0, {"dog": 1.0}),
        (["style"], 0.5, {"style": 0.5}),
        (["dog", "style"], [1.0, 0.6], {"dog": 1.0, "style": 0.6}),
        (["style", "dog"], 0.5, {"dog": 0.5, "style": 0.5}),
        (["dog", "style"], [0.0, -1.0], {"style": -1.0}),
        ([], [], {}),
    ],
)
def test_set_adapters_equals_the_dense_sum(
    pipe: DiffusionPipeline, tmp_path: Path, names: Any, strengths: Any, expected: dict[str, float]
) -> None:
    two_adapters(pipe, tmp_path)
    ether.set_adapters(pipe, names, strengths)
    infos = ether.adapters(pipe)
    assert {name: info.strength for name, info in infos.items() if info.active} == expected
    dense = quiet(tiny_pipeline())
    for component in COMPONENTS:
        found = host_of(getattr(pipe, component)).adapters  # type: ignore[union-attr]
        replace_weights(getattr(dense, component), {found[name]: s for name, s in expected.items() if name in found})
    assert relative_error(picture(pipe), picture(dense)) < 1e-3
    assert bool((picture(pipe) - picture(quiet(tiny_pipeline()))).abs().max() > 0.003) == bool(expected)


def test_loading_adds_to_what_is_active(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    two_adapters(pipe, tmp_path)
    infos = ether.adapters(pipe)
    assert {name: (info.strength, info.components) for name, info in infos.items()} == {
        "dog": (1.0, ("unet", "text_encoder")),
        "style": (0.6, ("unet",)),
    }
    assert infos["style"].configs["unet"].targets == "cross_attention"
    # q and out of four cross attentions are 64 wide, k and v 32
    assert infos["style"].num_parameters == 4 * (2 * 64 + 2 * 32)


def test_unloading_one_leaves_the_other(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    two_adapters(pipe, tmp_path)
    ether.set_adapters(pipe, "dog")
    alone = picture(pipe)
    ether.set_adapters(pipe, ["dog", "style"])
    assert not torch.equal(picture(pipe), alone)
    ether.unload(pipe, "style")
    assert list(ether.adapters(pipe)) == ["dog"]
    assert torch.equal(picture(pipe), alone)
    ether.unload(pipe)
    assert torch.equal(picture(pipe), picture(quiet(tiny_pipeline())))


def test_only_the_active_adapters_count_as_fused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    two_adapters(pipe, tmp_path)
    ether.set_adapters(pipe, "style")
    ether.fuse(pipe)
    assert {name: info.fused for name, info in ether.adapters(pipe).items()} == {"dog": False, "style": True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: ether.set_adapters(p, "cat"), "no adapter 'cat' is loaded; there are: dog, style"),
        (lambda p: ether.set_adapters(p, ["dog", "dog"]), "an adapter is named twice"),
        (lambda p: ether.set_adapters(p, ["dog", "style"], [1.0]), "2 adapters but 1 strengths"),
        (lambda p: ether.set_adapters(p, ["dog", "style"], [1.0, float("nan")]), "that of 'style' is nan"),
        (lambda p: ether.unload(p, "cat"), "no adapter 'cat' is loaded"),
        (lambda p: ether.save(p, "nowhere"), "name the adapter to save, one of: dog, style"),
        (lambda p: ether.save(p, "nowhere", "cat"), "no adapter 'cat' is loaded"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(
    pipe: DiffusionPipeline, tmp_path: Path, call: Callable[[DiffusionPipeline], Any], message: str
) -> None:
    two_adapters(pipe, tmp_path)
    before = ether.adapters(pipe)
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert ether.adapters(pipe) == before


def test_nothing_to_do_is_an_error_only_where_it_surprises(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no active adapter to fuse"):
        ether.fuse(pipe)
    with pytest.raises(ValueError, match="name the adapter to save, one of: none is loaded"):
        ether.save(pipe, tmp_path)
    write_adapter(pipe, tmp_path)
    ether.load(pipe, tmp_path, strength=0.0)
    with pytest.raises(ValueError, match="there is no active adapter to fuse"):
        ether.fuse(pipe)
    assert not ether.adapters(pipe)["default"].active


def split_adapters(pipe: DiffusionPipeline, folder: Path) -> None:
    """ "words" sits on the text encoder alone and gets fused; "picture" on the UNet alone stays as it is."""
    write_adapter(pipe, folder / "words", ("text_encoder",))
    write_adapter(pipe, folder / "picture", ("unet",))
    write_adapter(pipe, folder / "new", ("unet",))
    ether.load(pipe, folder / "picture", name="picture")
    ether.load(pipe, folder / "words", name="words")
    ether.set_adapters(pipe, "words")
    ether.fuse(pipe)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, f: ether.load(p, f / "new", name="new"),
        lambda p, f: ether.load(p, f / "new", name="new", strength=0.5),
        lambda p, f: ether.set_adapters(p, "picture"),
        lambda p, f: ether.disable(p),
        lambda p, f: ether.disabled(p).__enter__(),
        lambda p, f: ether.unload(p),
        lambda p, f: ether.unload(p, "words"),
        lambda p, f: ether.unload(p, "picture"),
        lambda p, f: ether.fuse(p),
    ],
    ids=["load", "load at strength", "set", "disable", "disabled", "unload all", "unload", "unload other", "fuse"],
)
def test_while_one_component_is_fused_nothing_changes_in_any(
    pipe: DiffusionPipeline, tmp_path: Path, call: Callable[[DiffusionPipeline, Path], Any]
) -> None:
    split_adapters(pipe, tmp_path)
    before, image = ether.adapters(pipe), picture(pipe)
    with pytest.raises(RuntimeError, match="call unfuse"):
        call(pipe, tmp_path)
    assert ether.adapters(pipe) == before
    assert torch.equal(picture(pipe), image)
    ether.unfuse(pipe)
    ether.unload(pipe)
    assert torch.equal(picture(pipe), picture(quiet(tiny_pipeline())))


@pytest.mark.parametrize("other", ["unet", "text_encoder"])
def test_a_name_is_taken_whichever_component_has_it(pipe: DiffusionPipeline, tmp_path: Path, other: str) -> None:
    write_adapter(pipe, tmp_path, ("unet",))
    ether.attach(getattr(pipe, other), name="dog")
    before = ether.adapters(pipe)
    with pytest.raises(ValueError, match="an adapter 'dog' is loaded already: unload it, or pass another name"):
        ether.load(pipe, tmp_path, name="dog")
    assert ether.adapters(pipe) == before


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_loads_nothing(pipe: DiffusionPipeline, tmp_path: Path, strength: float) -> None:
    write_adapter(pipe, tmp_path)
    with pytest.raises(ValueError, match="the strength of 'dog' must be a finite number"):
        ether.load(pipe, tmp_path, name="dog", strength=strength)
    assert ether.adapters(pipe) == {}


def test_a_failing_second_component_takes_the_first_off_again(
    pipe: DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(pipe, tmp_path)
    image, calls = picture(pipe), []

    def second_fails(module: nn.Module, adapter: ether.Adapter, targets: list[Target]) -> ether.Adapter:
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        return attach_made(module, adapter, targets)

    monkeypatch.setattr("ether_diffusion.pipelines.verbs.attach_made", second_fails)
    with pytest.raises(MemoryError):
        ether.load(pipe, tmp_path)
    assert len(calls) == 2
    assert ether.adapters(pipe) == {}
    assert torch.equal(picture(pipe), image)


def test_one_misfit_component_keeps_the_others_off(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    other = tiny_pipeline(xl=True)
    write_adapter(other, tmp_path, ("text_encoder", "text_encoder_2"))
    with pytest.raises(AdapterFileError, match="the pipeline has no text_encoder_2"):
        ether.load(pipe, tmp_path)  # text_encoder alone would fit
    assert ether.adapters(pipe) == {}


def test_fused_qkv_projections_refuse_loading_and_leave_nothing(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    write_adapter(pipe, tmp_path, ("text_encoder", "unet"))
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="call unfuse_qkv_projections"):
        ether.load(pipe, tmp_path)
    assert ether.adapters(pipe) == {}
    pipe.unet.unfuse_qkv_projections()
    ether.load(pipe, tmp_path)
    assert ether.adapters(pipe)["default"].active


def test_what_is_loaded_while_disabled_stays_off_in_every_component(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    write_adapter(pipe, tmp_path / "a", ("unet",))
    write_adapter(pipe, tmp_path / "b", ("unet", "text_encoder"))
    base = picture(pipe)
    ether.load(pipe, tmp_path / "a", name="a")
    ether.disable(pipe)
    ether.load(pipe, tmp_path / "b", name="b")
    assert torch.equal(picture(pipe), base)
    assert not any(info.active for info in ether.adapters(pipe).values())
    ether.enable(pipe)
    assert all(info.active for info in ether.adapters(pipe).values())
    assert not torch.equal(picture(pipe), base)


def test_disabled_restores_what_was_there_even_after_an_error(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    two_adapters(pipe, tmp_path)
    before = ether.adapters(pipe)
    with pytest.raises(KeyError), ether.disabled(pipe):
        raise KeyError
    assert ether.adapters(pipe) == before
    ether.disable(pipe)
    with ether.disabled(pipe):
        pass
    assert not any(info.active for info in ether.adapters(pipe).values())


def test_another_base_of_the_same_architecture_warns_and_names_both(
    pipe: DiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_pipeline(seed=1)
    other.register_to_config(_name_or_path="bases/other")
    pipe.register_to_config(_name_or_path="bases/this")
    write_adapter(other, tmp_path)
    with caplog.at_level(logging.WARNING):
        ether.load(pipe, tmp_path)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ether_diffusion")]
    assert len(messages) == 2  # UNet and text encoder
    for component, message in zip(COMPONENTS, messages, strict=True):
        for part in ("bases/other", "bases/this", component, base_hash(getattr(other, component)) or "?"):
            assert part in message
    assert ether.adapters(pipe)["default"].active


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_does_not_warn(
    base_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    write_adapter(StableDiffusionPipeline.from_pretrained(base_folder), tmp_path)
    pipe = quiet(StableDiffusionPipeline.from_pretrained(base_folder, torch_dtype=dtype))
    base = picture(pipe)
    with caplog.at_level(logging.WARNING):
        ether.load(pipe, tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("ether_diffusion")]
    assert (picture(pipe) - base).abs().max() > 0.01
    host = host_of(pipe.unet)
    assert host is not None
    assert all(parameter.dtype == torch.float32 for parameter in host.adapters["default"].parameters())


def test_fused_pipelines_save_the_hash_of_the_base(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    two_adapters(pipe, tmp_path)
    plain = ether.save(pipe, tmp_path / "plain", "dog")
    ether.fuse(pipe)
    assert same_file(ether.save(pipe, tmp_path / "fused", "dog"), plain)


def test_xl_pipelines_load_from_disk_and_keep_their_adapter(xl_folder: Path, tmp_path: Path) -> None:
    pipe = quiet(StableDiffusionXLPipeline.from_pretrained(xl_folder))
    write_adapter(pipe, tmp_path, ("unet", "text_encoder", "text_encoder_2"))
    ether.load(pipe, tmp_path)
    adapted = picture(pipe)
    again = quiet(StableDiffusionXLPipeline.from_pretrained(xl_folder))
    ether.load(again, tmp_path)
    assert torch.equal(picture(again), adapted)
