"""An adapter that acts in training and not in drawing: a LoRA, or one of this library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from families.tiny import build
from safetensors import safe_open
from training.helpers import PROMPT, provenance, same_tensors, samples, trained

import ether_diffusion as ether
from ether_diffusion.families.registry import family_of
from ether_diffusion.pipelines.file import AdapterFileError
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.checksums import sha256
from ether_diffusion.runs.drawing import load_pipeline
from ether_diffusion.training import control
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

Train = Callable[..., Path]
FAMILIES = ("z_image", "flux", "sd")
KINDS = ("LoRA", "ETHER")


def write_lora(family: str, path: Path, component: str | None = None) -> Path:
    """A LoRA with large weights on the attention of the denoiser, or of another component, in diffusers' format."""
    pipe = build(family)
    component = component or family_of(pipe).DENOISER
    module = getattr(pipe, component)
    targets = ["to_q", "to_v"] if component in ("transformer", "unet") else ["q_proj", "v_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), module, "a")
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(module, adapter_name="a"))
    pipe.save_lora_weights(path, **{f"{component}_lora_layers": layers})
    return path / "pytorch_lora_weights.safetensors"


def write_ether(family: str, path: Path, component: str | None = None) -> Path:
    """An adapter of this library, far from the identity."""
    pipe = build(family)
    ether.attach(getattr(pipe, component or family_of(pipe).DENOISER), ether.EtherConfig("ether", seed=3))
    return ether.save(pipe, path)


WRITE: dict[str, Callable[..., Path]] = {"LoRA": write_lora, "ETHER": write_ether}


def first_loss(run: Path) -> float:
    """The loss on the fixed pictures before the first step."""
    return float(json.loads((run / "validation.jsonl").read_text().splitlines()[0])["loss"])


def header(run: Path) -> dict[str, str]:
    with safe_open(run / "ether_weights.safetensors", "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_in_training_and_not_in_drawing(
    family: str, kind: str, train: Train, base: Callable[[str], Path], tmp_path: Path
) -> None:
    file = WRITE[kind](family, tmp_path / "beside")
    drawn = {"num_validation_images": 1, "num_inference_steps": 3, "learning_rate": 0.1}
    without = train(family, "without", **drawn)
    run = train(family, training_adapter=file, **drawn)
    # the base draws what it draws; the loss is that of both; what is learnt is another
    first = "step-000000/00.png"
    assert np.array_equal(samples(run)[first], samples(without)[first])
    assert first_loss(run) != first_loss(without)
    assert not same_tensors(trained(run, 3), trained(without, 3))
    assert provenance(run)["training_adapter"] == sha256(file)
    # the result holds what was trained, and nothing of the training adapter
    assert header(run) == header(without)
    pipe = load_pipeline(Base(str(base(family))))
    ether.load(pipe, run)
    draw = family_of(pipe).drawing([PROMPT], 7.5 if family == "sd" else family_of(pipe).GUIDANCE)
    generator = [torch.Generator().manual_seed(0)]
    image = pipe(height=32, width=32, num_inference_steps=3, generator=generator, **draw).images[0]
    assert np.abs(np.asarray(image).astype(int) - samples(run)["step-000003/00.png"]).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_base_with_the_adapter_loaded(kind: str, train: Train, tmp_path: Path) -> None:
    """Nothing learnt yet: ETHER+ starts as the identity, so only the training adapter acts."""
    file = WRITE[kind]("z_image", tmp_path / "beside")
    run = train("z_image", training_adapter=file, method="ether_plus")
    pipe: DiffusionPipeline = build("z_image")
    if kind == "LoRA":
        pipe.load_lora_weights(str(file))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    else:
        ether.load(pipe, file)
        ether.fuse(pipe)
        state = pipe.transformer.state_dict()
        pipe = build("z_image")
        pipe.transformer.load_state_dict(state)
    pipe.save_pretrained(tmp_path / "merged")
    merged = train("z_image", "merged run", pretrained_model_name_or_path=str(tmp_path / "merged"), method="ether_plus")
    assert first_loss(run) == pytest.approx(first_loss(merged), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, train: Train, tmp_path: Path) -> None:
    file = WRITE[kind]("z_image", tmp_path / "beside")
    settings = {"training_adapter": file, "checkpointing_steps": 2}
    whole = train("z_image", "whole", max_train_steps=4, **settings)
    train("z_image", max_train_steps=2, **settings)
    run = train("z_image", max_train_steps=4, resume="latest", **settings)
    assert same_tensors(trained(run, 4), trained(whole, 4))


def test_another_file_under_its_name_is_told_when_resuming(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_ether("z_image", tmp_path / "beside")
    train("z_image", max_train_steps=2, checkpointing_steps=2, training_adapter=file)
    pipe = build("z_image")
    ether.attach(pipe.transformer, ether.EtherConfig("ether", seed=4))
    ether.save(pipe, file)
    train("z_image", max_train_steps=4, resume="latest", training_adapter=file)
    assert "another training_adapter" in caplog.text


def test_subjects_side_by_side_share_a_lora(train: Train, photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        for number, photo in enumerate(sorted(photos.iterdir())):
            if number % 2 == (name == "two"):
                (tmp_path / "subjects" / name / photo.name).write_bytes(photo.read_bytes())
    several = {
        "instance_data_dir": Path(),
        "subjects_dir": tmp_path / "subjects",
        "instance_prompt": "a photo of {subject}",
    }
    file = write_lora("z_image", tmp_path / "beside")
    together = train("z_image", "all", training_adapter=file, **several)
    alone = train(
        "z_image",
        training_adapter=file,
        instance_data_dir=tmp_path / "subjects" / "one",
        instance_prompt="a photo of one",
    )
    assert first_loss(together / "one") == pytest.approx(first_loss(alone), rel=1e-5)
    own = write_ether("z_image", tmp_path / "own")
    with pytest.raises(ValueError, match=r"training_adapter: with subjects_dir .* give a LoRA"):
        train("z_image", "refused", training_adapter=own, **several)


@pytest.mark.parametrize("quantization", ["fp8-storage", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_acts_beside_a_quantised_base(kind: str, quantization: str, train: Train, tmp_path: Path) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    file = WRITE[kind]("z_image", tmp_path / "beside")
    settings = {"base_quantization": quantization, "max_train_steps": 12, "validation_steps": 12}
    without = train("z_image", "without", **settings)
    run = train("z_image", training_adapter=file, **settings)
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] != pytest.approx(first_loss(without), rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_what_cannot_be_one_is_told(settings: Callable[..., DreamBoothConfig], train: Train, tmp_path: Path) -> None:
    def refused(message: str, kind: Any = ValueError, family: str = "sd", **changes: Any) -> None:
        with pytest.raises(kind, match=message):
            train(family, "refused", **changes)

    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.safetensors").write_bytes(b"no weights")
    refused("neither a .safetensors file nor a folder", FileNotFoundError, training_adapter=tmp_path / "nothing")
    refused("neither a .safetensors file nor a folder", FileNotFoundError, training_adapter=tmp_path / "empty")
    refused("cannot be read as safetensors", training_adapter=tmp_path / "photo.safetensors")
    refused("not beside method=lora", training_adapter=tmp_path, method="lora")
    for write in (write_lora, write_ether):
        file = write("sd", tmp_path / write.__name__, "text_encoder")
        refused("may act on the denoiser only|acts on text_encoder", training_adapter=file)
    refused("diffusers cannot load|acts on no layer", training_adapter=write_lora("flux", tmp_path / "flux"))
    refused("has no transformer", AdapterFileError, training_adapter=write_ether("flux", tmp_path / "own flux"))


def test_a_distilled_base_is_not_warned_of_beside_one(
    train: Train, base: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turbo = tmp_path / "z-image-turbo"
    build("z_image").save_pretrained(turbo)
    train("z_image", pretrained_model_name_or_path=str(turbo))
    assert "--training_adapter FILE" in caplog.text
    caplog.clear()
    file = write_lora("z_image", tmp_path / "beside")
    train("z_image", "second", pretrained_model_name_or_path=str(turbo), training_adapter=file)
    assert "was distilled" not in caplog.text


def test_a_new_controlnet_cannot_be_made_of_layers_in_a_lora(base: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_lora("sd", tmp_path / "beside")
    config = ControlConfig(
        pretrained_model_name_or_path=str(base("sd")),
        output_dir=tmp_path / "run",
        train_data_dir="playground",
        control="controlnet",
        resolution=64,
        training_adapter=file,
    )
    with pytest.raises(ValueError, match="training_adapter: a new ControlNet is a copy"):
        control.run(config)
