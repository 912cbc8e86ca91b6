"""The control encoder: where it acts, what it needs, how it is saved, and pictures drawn under it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from helpers import shake
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion import AdapterFileError, EtherConfig
from ether_diffusion.control.conditions import colour_map
from ether_diffusion.control.pipeline import StableDiffusionControlPipeline, control_tensor, controlled
from ether_diffusion.core.host import attach
from ether_diffusion.pipelines.control_encoder import ControlEncoder, ControlEncoderConfig
from ether_diffusion.pipelines.control_hook import attach_control, control_of
from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.playground.tiny import tiny_pipeline, tiny_unet

Draw = Callable[..., np.ndarray]


def encoder_for(pipe: DiffusionPipeline, condition: str = "image") -> ControlEncoder:
    """An encoder that has learnt something: its last convolution is no longer zero."""
    encoder = ControlEncoder.of(pipe.unet, pipe.vae_scale_factor, condition)
    shake(encoder, scale=0.1)
    return encoder


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def draw(pipe: DiffusionPipeline, *arguments: Any, seed: int = 0, **settings: Any) -> np.ndarray:
    count = len(settings["prompt"]) if isinstance(settings.get("prompt"), list) else 1
    count *= settings.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    values = {"prompt": "a dog", "num_inference_steps": 2, "guidance_scale": 3.0} | settings
    images: np.ndarray = pipe(*arguments, generator=generators, output_type="np", **values).images
    return images


@pytest.fixture
def control_pipe() -> StableDiffusionControlPipeline:
    """A pipeline with an adapter and its control."""
    pipe = StableDiffusionControlPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    adapter = attach(pipe.unet, EtherConfig("ether_plus", 4, targets="attention+geglu"), "maps")
    shake(adapter, scale=0.3)
    attach_control(pipe.unet, encoder_for(pipe), "maps")
    return pipe


def test_the_encoder_for_sd15_is_the_papers() -> None:
    encoder = ControlEncoder(ControlEncoderConfig(320))
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    widths = [convolutions[0].in_channels]
    for conv in [encoder.conv_in, *encoder.blocks, encoder.conv_out]:
        assert (conv.in_channels, conv.kernel_size) == (widths[-1], (3, 3))
        widths.append(conv.out_channels)
    assert widths == [3, 16, 16, 32, 32, 96, 96, 256, 320]
    assert [conv.stride for conv in convolutions].count((2, 2)) == 3
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 1_086_480
    assert not encoder.conv_out.weight.any()
    assert not encoder.conv_out.bias.any()
    assert encoder(torch.rand(1, 3, 64, 48)).shape == (1, 320, 8, 6)


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_the_encoder_has_the_side_of_the_latents(factor: int) -> None:
    encoder = ControlEncoder.of(tiny_unet(), factor)
    assert encoder.vae_factor == factor
    assert encoder(torch.rand(2, 3, 64, 32)).shape == (2, 32, 64 // factor, 32 // factor)


def test_the_same_seed_makes_the_same_encoder_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, same, other = (ControlEncoder(ControlEncoderConfig(32), seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])


class Summed(nn.Module):
    """The oracle: a first convolution that adds the features itself."""

    def __init__(self, convolution: nn.Conv2d, features: Tensor) -> None:
        super().__init__()
        self.convolution, self.features = convolution, features

    def forward(self, sample: Tensor) -> Tensor:
        output: Tensor = self.convolution(sample) + self.features
        return output


def test_the_features_are_added_after_the_first_convolution_with_gradients(pipe: DiffusionPipeline) -> None:
    unet, encoder = pipe.unet.requires_grad_(False), encoder_for(pipe)
    sample, prompts, condition = torch.randn(2, 4, 32, 32), torch.randn(2, 7, 32), torch.rand(2, 3, 64, 64)
    control = attach_control(unet, encoder, "x")
    with control.given({"x": control.features("x", condition)}):
        unet(sample, 7, prompts).sample.square().sum().backward()
        output = unet(sample, 7, prompts).sample
    gradients = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    control.remove("x")
    unet.conv_in = Summed(unet.conv_in, encoder(condition))
    expected = unet(sample, 7, prompts).sample
    assert torch.equal(output, expected)
    expected.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)
        assert gradients[name].any()


def test_a_control_without_condition_is_an_error_that_says_what_to_do(
    control_pipe: StableDiffusionControlPipeline,
) -> None:
    message = r"control 'maps' has no condition: draw within `with ether.controlled\(pipe, image\):`"
    with pytest.raises(RuntimeError, match=message):
        control_pipe.unet(torch.randn(1, 4, 32, 32), 7, torch.randn(1, 7, 32))
    with pytest.raises(ValueError, match="control_image is missing"):
        control_pipe("a dog")


def test_disabled_the_pipeline_is_the_base_bit_for_bit(
    control_pipe: StableDiffusionControlPipeline, pipe: DiffusionPipeline
) -> None:
    base = draw(pipe)
    with ether.disabled(control_pipe):
        assert np.array_equal(draw(control_pipe, control_image=picture()), base)
        assert not ether.adapters(control_pipe)["maps"].active
    assert not np.array_equal(draw(control_pipe, control_image=picture()), base)
    ether.unload(control_pipe)
    assert control_of(control_pipe.unet) is None
    assert not control_pipe.unet.conv_in._forward_hooks
    assert np.array_equal(draw(pipe), base)


def test_the_pipeline_equals_diffusers_own_within_the_context(control_pipe: StableDiffusionControlPipeline) -> None:
    image = picture()
    drawn = draw(control_pipe, control_image=image, control_strength=0.5)
    plain = ether_pipeline(control_pipe)
    with controlled(plain, image, strength=0.5):
        assert np.array_equal(draw(plain), drawn)
    with controlled(plain, image):
        assert not np.array_equal(draw(plain), drawn)


def ether_pipeline(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Diffusers' own pipeline over the same modules."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    plain = type(tiny_pipeline())(**parts, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    return plain


def test_both_branches_of_guidance_see_the_control(control_pipe: StableDiffusionControlPipeline) -> None:
    """At guidance 1 there is one branch; at guidance g the picture follows g·cond - (g - 1)·uncond, both controlled."""
    seen: list[Tensor] = []
    control_pipe.unet.conv_in.register_forward_hook(lambda module, args, output: seen.append(output))
    draw(control_pipe, control_image=picture(), num_inference_steps=1, guidance_scale=3.0)
    unconditional, conditional = seen[0]
    assert torch.equal(unconditional, conditional)  # the prompt comes later than this layer
    ether.disable(control_pipe)
    draw(control_pipe, control_image=picture(), num_inference_steps=1, guidance_scale=3.0)
    assert not torch.equal(seen[1][0], unconditional)


def test_several_controls_and_pictures_per_prompt_stay_with_their_prompt(
    control_pipe: StableDiffusionControlPipeline,
) -> None:
    prompts, images = ["a dog", "a cat"], [picture(0), picture(1)]
    both = draw(control_pipe, control_image=images, prompt=prompts, num_images_per_prompt=2)
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = draw(control_pipe, control_image=image, prompt=prompt, num_images_per_prompt=2, seed=2 * number)
        np.testing.assert_allclose(both[2 * number : 2 * number + 2], alone, atol=2e-5)


def test_img2img_takes_the_same_control(control_pipe: StableDiffusionControlPipeline) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**ether_pipeline(control_pipe).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    start = picture(5)
    with controlled(pipe, picture(0)):
        one = draw(pipe, image=start, strength=1.0)
    with controlled(pipe, picture(1)):
        other = draw(pipe, image=start, strength=1.0)
    assert not np.array_equal(one, other)


def test_sizes_that_do_not_fit_are_an_error(control_pipe: StableDiffusionControlPipeline) -> None:
    with (
        pytest.raises(ValueError, match=r"has 32 x 64 pixels .height x width., the picture 64 x 64: resize one"),
        controlled(control_pipe, picture().resize((64, 32))),
    ):
        draw(ether_pipeline(control_pipe))
    three = [picture(seed) for seed in range(3)]
    with (
        pytest.raises(ValueError, match="3 control images cannot be shared among a batch of 4: give one for each"),
        controlled(control_pipe, three),
    ):
        draw(ether_pipeline(control_pipe), prompt=["a", "b"])


def test_the_control_image_is_resized_where_a_size_is_given(control_pipe: StableDiffusionControlPipeline) -> None:
    assert draw(control_pipe, control_image=picture(0, 100), height=64, width=32).shape == (1, 64, 32, 3)
    assert draw(control_pipe, control_image=picture(0, 32)).shape == (1, 32, 32, 3)


def test_a_map_of_grey_ids_is_coloured_as_in_training(pipe: DiffusionPipeline) -> None:
    ids = np.random.default_rng(0).integers(0, 17, (64, 64)).astype(np.uint8)
    grey = Image.fromarray(ids)
    assert torch.equal(control_tensor(grey, 2, maps=True), control_tensor(colour_map(ids), 2, maps=True))
    assert not torch.equal(control_tensor(grey, 2), control_tensor(colour_map(ids), 2))
    attach_control(pipe.unet, encoder_for(pipe, "map"), "maps")
    with controlled(pipe, grey):
        drawn = draw(pipe)
    with controlled(pipe, colour_map(ids)):
        assert np.array_equal(draw(pipe), drawn)


def test_one_file_restores_the_adapter_and_the_control(
    control_pipe: StableDiffusionControlPipeline, tmp_path: Path
) -> None:
    drawn = draw(control_pipe, control_image=picture())
    path = ether.save(control_pipe, tmp_path)
    fresh = StableDiffusionControlPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    ether.load(fresh, tmp_path, name="other")
    assert np.array_equal(draw(fresh, control_image=picture()), drawn)
    info = ether.adapters(fresh)["other"]
    assert info.control
    assert info.components == ("unet", "control_encoder")
    assert info.num_parameters == sum(tensor.numel() for tensor in load_file(path).values())
    assert {key.split(".")[0] for key in load_file(path)} == {"unet", "control_encoder"}


def test_a_control_alone_is_a_file_as_well(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    encoder = encoder_for(pipe)
    attach_control(pipe.unet, encoder, "alone")
    ether.save(pipe, tmp_path / "alone.safetensors")
    fresh = tiny_pipeline()
    ether.load(fresh, tmp_path / "alone.safetensors", name="a")
    control = control_of(fresh.unet)
    assert control is not None
    state, loaded = encoder.state_dict(), control.encoders["a"].state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[key], loaded[key]) for key in state)
    assert not any(parameter.requires_grad for parameter in control.encoders["a"].parameters())


def test_set_adapters_chooses_among_controls(control_pipe: StableDiffusionControlPipeline) -> None:
    attach_control(control_pipe.unet, encoder_for(control_pipe), "edges")
    with pytest.raises(ValueError, match="name the control that the image is for, one of: maps, edges"):
        draw(control_pipe, control_image=picture())
    ether.set_adapters(control_pipe, "edges")
    assert {name: info.active for name, info in ether.adapters(control_pipe).items()} == {"maps": False, "edges": True}
    edges = draw(control_pipe, control_image=picture(), control_name="edges")
    ether.set_adapters(control_pipe, ["maps", "edges"], [1.0, 0.0])
    assert not np.array_equal(draw(control_pipe, control_image=picture(), control_name="maps"), edges)
    ether.set_adapters(control_pipe, ["maps", "edges"])
    with controlled(control_pipe, picture(), name="maps"):
        draw(control_pipe, control_image=picture(), control_name="edges")
    ether.unload(control_pipe, "maps")
    assert list(ether.adapters(control_pipe)) == ["edges"]


def test_in_half_precision_the_encoder_stays_in_fp32(control_pipe: StableDiffusionControlPipeline) -> None:
    control_pipe.to(torch.bfloat16)
    draw(control_pipe, control_image=picture())
    control = control_of(control_pipe.unet)
    assert control is not None
    assert {parameter.dtype for parameter in control.encoders["maps"].parameters()} == {torch.float32}


def test_a_control_for_another_unet_or_autoencoder_is_refused_before_anything_is_attached(
    control_pipe: StableDiffusionControlPipeline, tmp_path: Path
) -> None:
    ether.save(control_pipe, tmp_path)
    file = AdapterFile.read(tmp_path)
    wrong = ControlEncoder(ControlEncoderConfig(48, (16, 32, 96)))
    AdapterFile(file.states, file.configs, control=wrong).write(tmp_path)
    fresh = tiny_pipeline()
    with pytest.raises(AdapterFileError) as refused:
        ether.load(fresh, tmp_path)
    assert "control_encoder: it makes 48 channels, the first layer has 32" in str(refused.value)
    assert "control_encoder: made for 4 pixels per feature, the pipeline has 2" in str(refused.value)
    assert not ether.adapters(fresh)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "unknown"])
def test_a_damaged_control_is_named(damage: str, control_pipe: StableDiffusionControlPipeline, tmp_path: Path) -> None:
    path = ether.save(control_pipe, tmp_path)
    metadata = _metadata(path)
    tensors = load_file(path)
    key = "control_encoder.conv_out.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][:3].clone()
    elif damage == "nan":
        tensors[key][0] = torch.nan
    else:
        tensors["control_encoder.conv_last.weight"] = torch.ones(1)
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=r"the control encoder in .* is broken:\n.*conv_(out|last).weight"):
        ether.load(tiny_pipeline(), tmp_path)


def test_a_file_whose_metadata_know_of_no_control_is_refused(
    control_pipe: StableDiffusionControlPipeline, tmp_path: Path
) -> None:
    path = ether.save(control_pipe, tmp_path)
    metadata = {key: value for key, value in _metadata(path).items() if key != "control_encoder"}
    save_file(load_file(path), path, metadata)
    with pytest.raises(AdapterFileError, match="holds the key control_encoder"):
        ether.load(tiny_pipeline(), tmp_path)


def _metadata(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return dict(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"])


def test_no_control_is_loaded(pipe: DiffusionPipeline) -> None:
    with (
        pytest.raises(ValueError, match=r"no control is loaded in this pipeline: ether\.load\(pipe, folder\)"),
        controlled(pipe, picture()),
    ):
        pass


def test_a_name_that_is_taken_or_a_model_without_first_convolution(pipe: DiffusionPipeline) -> None:
    attach_control(pipe.unet, encoder_for(pipe), "x")
    with pytest.raises(ValueError, match="a control 'x' is there already"):
        attach_control(pipe.unet, encoder_for(pipe), "x")
    with pytest.raises(ValueError, match="CLIPTextModel has no first layer"):
        attach_control(pipe.text_encoder, encoder_for(pipe), "x")
    wide = ControlEncoder(ControlEncoderConfig(48, (16, 32)))
    fresh = tiny_pipeline()
    with pytest.raises(ValueError, match="makes 48 channels, the denoiser's first layer has 32"):
        attach_control(fresh.unet, wide, "x")
    assert control_of(fresh.unet) is None
    assert not fresh.unet.conv_in._forward_hooks


def test_an_adapter_loaded_into_a_disabled_pipeline_waits_to_be_enabled(
    control_pipe: StableDiffusionControlPipeline, tmp_path: Path
) -> None:
    ether.save(control_pipe, tmp_path)
    ether.disable(control_pipe)
    ether.load(control_pipe, tmp_path, name="second")
    assert not any(info.active for info in ether.adapters(control_pipe).values())
    ether.enable(control_pipe)
    assert all(info.active for info in ether.adapters(control_pipe).values())


def test_a_control_for_another_base_is_warned_of(
    pipe: DiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attach_control(pipe.unet, encoder_for(pipe), "alone")
    ether.save(pipe, tmp_path)
    ether.load(tiny_pipeline(), tmp_path)
    assert not caplog.records
    other = tiny_pipeline(seed=1)
    ether.load(other, tmp_path)
    assert "was trained on another base: its unet is" in caplog.text


def test_a_control_and_adapters_per_sample_do_not_mix(control_pipe: StableDiffusionControlPipeline) -> None:
    attach(control_pipe.unet, EtherConfig(), "dog")
    with pytest.raises(ValueError, match="'maps' has a control, which acts on a whole batch"):
        ether.set_adapters(control_pipe, per_sample=["dog", "maps"])
    ether.set_adapters(control_pipe, per_sample=["dog"])
    draw(ether_pipeline(control_pipe))
    assert not ether.adapters(control_pipe)["maps"].active


def test_control_images_must_be_one_for_all_or_one_for_each_prompt(
    control_pipe: StableDiffusionControlPipeline,
) -> None:
    two = [picture(0), picture(1)]
    with pytest.raises(ValueError, match="2 control images for 1 prompts: give one for all, or one for each"):
        draw(control_pipe, control_image=two)
    plain = ether_pipeline(control_pipe)
    with (
        pytest.raises(ValueError, match="2 control images cannot be shared among a batch of 8"),
        controlled(plain, two),  # without num_images_per_prompt their order would be another
    ):
        draw(plain, prompt=["a", "b"], num_images_per_prompt=2)


def test_a_file_is_seen_as_training_saw_it(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 17, (64, 64)).astype(np.uint8)
    Image.fromarray(ids).save(tmp_path / "map.png")
    expected = control_tensor(colour_map(ids), 2, maps=True)
    assert torch.equal(control_tensor(tmp_path / "map.png", 2, maps=True), expected)
    assert torch.equal(control_tensor([str(tmp_path / "map.png")], 2, maps=True), expected)
    halves = ids > 8
    bits = control_tensor(Image.fromarray(halves), 2, maps=True)
    assert torch.equal(bits, control_tensor(colour_map(halves.astype(np.uint8)), 2, maps=True))


def test_a_grey_picture_where_a_coloured_map_is_expected_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    ids = (np.arange(64 * 64).reshape(64, 64) % 17).astype(np.uint8)
    control_tensor(colour_map(ids), 2, maps=True)
    greys = np.where(ids > 8, 7, 0)  # classes whose colours are grey by themselves
    control_tensor(colour_map(greys), 2, maps=True)
    assert not caplog.records
    control_tensor(Image.fromarray(ids).convert("RGB"), 2, maps=True)
    assert "this image is grey: if it holds class ids, give its file" in caplog.text


@pytest.mark.parametrize("wrap", [lambda array: array, lambda array: [array]])
def test_an_array_as_control_image_is_named(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"not a ndarray; of an array .* make one with PIL\.Image\.fromarray"):
        control_tensor(wrap(np.zeros((32, 32, 3), np.uint8)), 2)
