"""A base in one file is the base of the folder, bit for bit; what it is not is refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build
from single_files import original, same_weights, settings_alone, write, z_image_names
from torch import Tensor, nn

import ether_diffusion as ether
from ether_diffusion.pipelines.file import AdapterFile, is_hub_id
from ether_diffusion.pipelines.single_file import SingleFileError, is_single_file, load_single_file
from ether_diffusion.playground.tiny import tiny_pipeline, tiny_text_encoder, tiny_unet

NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def from_folder(folder: Path, dtype: Any = torch.float32, **more: Any) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder, dtype=dtype, **more)


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path) -> Path:
    """A folder with the settings of the tiny Stable Diffusion, and no weights."""
    folder = settings_alone(base_folder, tmp_path / "settings")
    assert list(base_folder.rglob("*.safetensors"))
    assert not list(folder.rglob("*.safetensors"))
    return folder


@pytest.fixture
def state(base_folder: Path) -> dict[str, Tensor]:
    return original(from_folder(base_folder, **NO_CHECKER))


@pytest.mark.parametrize("open_clip", [False, True], ids=["version 1", "version 2"])
def test_stable_diffusion_is_that_of_the_folder(
    open_clip: bool, base_folder: Path, settings: Path, tmp_path: Path
) -> None:
    folder = from_folder(base_folder, **NO_CHECKER)
    file = write(original(folder, open_clip), tmp_path / "model.safetensors")
    assert same_weights(load_single_file(file, settings), folder)


def test_the_weights_of_another_seed_are_not_the_same(settings: Path, tmp_path: Path, base_folder: Path) -> None:
    file = write(original(tiny_pipeline(seed=1)), tmp_path / "model.safetensors")
    assert not same_weights(load_single_file(file, settings), from_folder(base_folder, **NO_CHECKER))


def test_every_part_has_the_dtype_that_is_asked_for(
    base_folder: Path, settings: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    file = write(half, tmp_path / "model.safetensors")
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    from_folder(base_folder, torch.float16, **NO_CHECKER).save_pretrained(tmp_path / "half")
    assert same_weights(load_single_file(file, settings, dtypes), from_folder(tmp_path / "half", dtypes, **NO_CHECKER))


def test_sdxl_is_that_of_the_folder(tmp_path: Path) -> None:
    """Its encoders have different widths, by which diffusers tells them apart in a file."""
    pipe = tiny_pipeline(xl=True)
    second = tiny_text_encoder(pipe.tokenizer, projection=True).config
    second.hidden_size = 48
    pipe.register_modules(
        text_encoder_2=type(pipe.text_encoder_2)(second), unet=tiny_unet(xl=True, cross_attention_dim=80)
    )
    pipe.save_pretrained(tmp_path / "folder")
    file = write(original(pipe), tmp_path / "model.safetensors")
    settings = settings_alone(tmp_path / "folder", tmp_path / "settings")
    assert same_weights(load_single_file(file, settings), from_folder(tmp_path / "folder"))


def test_of_a_unet_alone_the_rest_is_the_folders(base_folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    file = write(unet, tmp_path / "unet.safetensors")
    settings = settings_alone(base_folder, tmp_path / "settings", keep=("vae", "text_encoder"))
    assert same_weights(load_single_file(file, settings), from_folder(base_folder, **NO_CHECKER))


@pytest.mark.parametrize(
    ("family", "names"), [("z_image", z_image_names), ("flux", nn.Module.state_dict)], ids=["z_image", "flux"]
)
def test_a_transformer_alone_stands_beside_the_rest_of_the_folder(
    family: str, names: Callable[[nn.Module], dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That of Z-Image with the names of its authors, that of FLUX with diffusers' own."""
    folder = tmp_path / "folder"
    build(family).save_pretrained(folder)
    changed = from_folder(folder)
    with torch.no_grad():
        for parameter in changed.transformer.parameters():
            parameter.add_(0.5)
    file = write(names(changed.transformer), tmp_path / "model.safetensors")
    settings = settings_alone(folder, tmp_path / "settings", keep=("vae", "text_encoder", "text_encoder_2"))
    caplog.clear()
    found = load_single_file(file, settings)
    assert same_weights(found, changed)
    assert not same_weights(found, from_folder(folder))
    assert not [record for record in caplog.records if record.name.startswith("ether_diffusion")]


def test_a_file_without_autoencoder_takes_the_folders(
    base_folder: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    file = write(_without(state, "first_stage_model."), tmp_path / "model.safetensors")
    settings = settings_alone(base_folder, tmp_path / "settings", keep=("vae",))
    assert same_weights(load_single_file(file, settings), from_folder(base_folder, **NO_CHECKER))


def test_a_transformer_with_more_blocks_than_the_folder_says_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = build("z_image")
    pipe.save_pretrained(tmp_path / "folder")
    state = z_image_names(pipe.transformer)
    more = {key.replace("layers.1.", "layers.2."): value for key, value in state.items() if "layers.1." in key}
    file = write(state | more, tmp_path / "model.safetensors")
    load_single_file(file, tmp_path / "folder")
    assert "some of it is left out; take a folder of the file's own architecture" in caplog.text


def test_an_adapter_knows_its_base_in_either_form(
    base_folder: Path, settings: Path, state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``ether.load`` compares the weights' identity: what was saved on the folder loads on the file, without a word."""
    pipe = from_folder(base_folder, **NO_CHECKER)
    pipe.unet.requires_grad_(False)
    ether.attach(pipe.unet, ether.EtherConfig(), name="dog")
    ether.save(pipe, tmp_path / "dog")
    file = write(state, tmp_path / "model.safetensors")
    single = load_single_file(file, settings)
    caplog.clear()
    ether.load(single, tmp_path / "dog", name="dog")
    assert not [record for record in caplog.records if record.name.startswith("ether_diffusion")]
    ether.save(single, tmp_path / "again")
    assert AdapterFile.read(tmp_path / "again").base_model == "model.safetensors"
    other = load_single_file(write(original(tiny_pipeline(seed=1)), tmp_path / "other.safetensors"), settings)
    ether.load(other, tmp_path / "again", name="dog")
    assert "its unet is model.safetensors" in caplog.text
    assert "other.safetensors" in caplog.text


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_files_that_would_be_unpickled_are_refused(name: str, settings: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"anything")
    assert is_single_file(str(tmp_path / name))
    with pytest.raises(SingleFileError, match=rf"{name} is no .safetensors file: .* would be run"):
        load_single_file(tmp_path / name, settings)


def test_a_damaged_file_and_one_that_is_not_there_are_named(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"anything at all")
    with pytest.raises(SingleFileError, match=r"model.safetensors is damaged or cut off"):
        load_single_file(tmp_path / "model.safetensors", settings)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone.safetensors"):
        load_single_file(tmp_path / "gone.safetensors", settings)


def test_a_folder_without_settings_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    file = write(state, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"is no diffusers folder: it has no model_index.json"):
        load_single_file(file, tmp_path)


def _without(state: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(beginning)}


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("model.diffusion_model.out.2", "describes: weights are missing in it"),
        ("model.diffusion_model.", "describes: Failed to load UNet2DConditionModel"),
        ("first_stage_model.decoder.conv_in", "describes: weights are missing in it"),
        ("first_stage_model.", r"neither model.safetensors nor .*settings has weights of the vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.", "of the text_encoder it has no encoder.layers.0"),
        ("cond_stage_model.", "settings/text_encoder"),
    ],
)
def test_weights_that_neither_file_nor_folder_has_are_missed(
    missing: str, said: str, state: dict[str, Tensor], settings: Path, tmp_path: Path
) -> None:
    file = write(_without(state, missing), tmp_path / "model.safetensors")
    with pytest.raises(SingleFileError, match=said):
        load_single_file(file, settings)


def test_a_unet_that_has_more_than_the_folder_says_is_refused(
    state: dict[str, Tensor], settings: Path, tmp_path: Path
) -> None:
    extra = {"model.diffusion_model.input_blocks.9.0.in_layers.0.weight": torch.ones(3)}
    file = write(state | extra, tmp_path / "model.safetensors")
    with pytest.raises(SingleFileError, match="take a folder of the file's own architecture"):
        load_single_file(file, settings)


def test_a_file_of_another_architecture_is_refused(state: dict[str, Tensor], xl_folder: Path, tmp_path: Path) -> None:
    file = write(state, tmp_path / "model.safetensors")
    with pytest.raises(SingleFileError, match=r"is not what .*tiny-sdxl describes: it has no .*label_emb"):
        load_single_file(file, xl_folder)


def test_quantised_weights_and_other_noise_are_refused(
    state: dict[str, Tensor], settings: Path, tmp_path: Path
) -> None:
    scaled = {"model.diffusion_model.out.2.scale_weight": torch.ones(1)}
    with pytest.raises(SingleFileError, match=r"quantised weights .*--base_quantization"):
        load_single_file(write(state | scaled, tmp_path / "scaled.safetensors"), settings)
    with pytest.raises(SingleFileError, match="trained on the noise of EDM"):
        load_single_file(write(state | {"edm_mean": torch.ones(4)}, tmp_path / "edm.safetensors"), settings)


def test_a_prediction_that_is_not_the_schedulers_is_refused(
    state: dict[str, Tensor], settings: Path, tmp_path: Path
) -> None:
    """By the key that trainers of SDXL leave in the file, or by the header's modelspec."""
    marked = write(state | {"v_pred": torch.ones(0)}, tmp_path / "marked.safetensors")
    said = write(state, tmp_path / "said.safetensors", **{"modelspec.prediction_type": "v"})
    plain = write(state, tmp_path / "plain.safetensors", **{"modelspec.prediction_type": "epsilon"})
    for file in (marked, said):
        with pytest.raises(SingleFileError, match=r'says epsilon: .*"prediction_type": "v_prediction"'):
            load_single_file(file, settings)
    assert load_single_file(plain, settings)
    scheduler = settings / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    for file in (marked, said):
        assert load_single_file(file, settings).scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(SingleFileError, match="says that it predicts epsilon"):
        load_single_file(plain, settings)


def test_a_family_without_files_of_that_kind_is_refused(tmp_path: Path) -> None:
    build("pixart_sigma").save_pretrained(tmp_path / "folder")
    file = write({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SingleFileError, match="reads no single files of PixArt-Σ: take a diffusers folder"):
        load_single_file(file, tmp_path / "folder")


def test_names_of_files_are_no_ids_of_the_hub() -> None:
    assert is_single_file("models/gone.safetensors")
    assert not is_single_file("owner/model")
    assert not is_hub_id("models/gone.safetensors")
