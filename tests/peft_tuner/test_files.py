"""Our adapter file and PEFT's folder, both ways: the same bits, the same output."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build as build_family
from helpers import shake, unet_inputs
from peft_tuner.models import KINDS, small, tuned
from peft_tuner.test_diffusers import ATTENTION, build, run
from safetensors import safe_open

import ether_diffusion as ether
from ether_diffusion.core.host import host_of
from ether_diffusion.core.state import StateMismatchError
from ether_diffusion.peft_tuner import EtherPeftConfig, from_peft, load, save, to_peft
from ether_diffusion.pipelines.file import FILE_NAME, AdapterFile
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.new_tokens import add_new_token

KIND = pytest.mark.parametrize("kind", KINDS)


def adapter_config(kind: str) -> ether.EtherConfig:
    settings = KINDS[kind]
    two_sided = bool(settings.get("two_sided", True))
    return ether.EtherConfig(str(settings["variant"]), int(str(settings["n_blocks"])), two_sided, seed=4)


def saved(pipe: DiffusionPipeline, folder: Path, config: ether.EtherConfig, component: str = "unet") -> Path:
    shake(ether.attach(getattr(pipe, component), config, "default"))
    ether.save(pipe, folder)
    return folder


def content(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors of a file, whose order in it is safetensors' own affair."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


@KIND
def test_a_file_to_peft_and_back_is_the_same_bit_for_bit(pipe: DiffusionPipeline, kind: str, tmp_path: Path) -> None:
    source = saved(pipe, tmp_path / "ours", adapter_config(kind))
    places = to_peft(source, tmp_path / "peft")
    assert places == {"unet": tmp_path / "peft"}
    back = from_peft(places, tmp_path / "back")
    assert content(back) == content(source / FILE_NAME)


@KIND
def test_peft_draws_from_the_folder_as_load_does_from_the_file(
    pipe: DiffusionPipeline, kind: str, tmp_path: Path
) -> None:
    source = saved(pipe, tmp_path / "ours", adapter_config(kind))
    expected = run(pipe.unet)
    ether.unload(pipe, "default")
    to_peft(source, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(pipe.unet, tmp_path / "peft").eval()
    with torch.no_grad():
        assert torch.equal(model(**unet_inputs()).sample, expected)


@KIND
def test_what_peft_has_saved_is_loaded_by_ether(pipe: DiffusionPipeline, kind: str, tmp_path: Path) -> None:
    settings = EtherPeftConfig(target_modules=ATTENTION, init_weights=False, **KINDS[kind])  # type: ignore[arg-type]
    pipe.unet.requires_grad_(False)
    model = peft.get_peft_model(pipe.unet, settings).eval()
    model.save_pretrained(tmp_path / "peft")
    expected = run(model.base_model.model)
    pipe.unet = model.unload()
    path = from_peft({"unet": tmp_path / "peft"}, tmp_path / "ours")
    ether.load(pipe, path, name="dog")
    assert torch.equal(run(pipe.unet), expected)
    host = host_of(pipe.unet)
    assert host is not None
    assert host.adapters["dog"].config.n_blocks == settings.n_blocks


def test_components_get_a_folder_each_and_canonical_paths_fit_nested_text_encoders(
    pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    shake(ether.attach(pipe.text_encoder, adapter_config("ether_plus"), "default"))
    saved(pipe, tmp_path / "ours", adapter_config("ether"))
    places = to_peft(tmp_path / "ours", tmp_path / "peft")
    assert set(places) == {"unet", "text_encoder"}
    back = from_peft(places, tmp_path / "back")
    assert content(back) == content(tmp_path / "ours" / FILE_NAME)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
        ether.unload(pipe, "default")
        model = peft.PeftModel.from_pretrained(pipe.text_encoder, places["text_encoder"]).eval()
        assert torch.equal(model(ids).last_hidden_state, expected)


@pytest.mark.parametrize("targets", ["attention", "attention+mlp"])
def test_parts_of_fused_linears_travel(targets: str, tmp_path: Path) -> None:
    pipe = build_family("flux2")
    pipe.transformer.requires_grad_(False)
    source = saved(pipe, tmp_path / "ours", ether.EtherConfig("ether_plus", targets=targets), "transformer")
    states = AdapterFile.read(source).states["transformer"]
    assert any(key.endswith("u_out.q") for key in states)
    assert any(key.endswith("u_out.mlp") for key in states) == (targets == "attention+mlp")
    adapter = next(iter(host_of(pipe.transformer).adapters.values()))  # type: ignore[union-attr]
    places = to_peft(source, tmp_path / "peft")
    ether.unload(pipe, "default")
    model = peft.PeftModel.from_pretrained(pipe.transformer, places["transformer"])
    found = {
        key.removeprefix("base_model.model.").replace(".ether_methods.default", ""): value
        for key, value in model.state_dict().items()
        if ".ether_methods." in key
    }
    assert found.keys() == adapter.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in adapter.state_dict().items())
    assert content(from_peft(places, tmp_path / "back")) == content(source / FILE_NAME)


def test_what_a_folder_cannot_hold_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    source = saved(pipe, tmp_path / "ours", ether.EtherConfig("naive"))
    with pytest.raises(ValueError, match=r"unet of .* is of naive; the tuner has ether, ether_plus, anchored, "):
        to_peft(source, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    with pytest.raises(FileNotFoundError):
        to_peft(tmp_path / "nothing", tmp_path / "peft")


def trained_by_peft(folder: Path, **settings: object) -> Path:
    model = build()
    found = peft.get_peft_model(model, EtherPeftConfig(target_modules=["to_q"], **settings))  # type: ignore[arg-type]
    found.save_pretrained(folder)
    return folder


def test_a_new_token_that_stays_behind_is_told(
    pipe: DiffusionPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shake(ether.attach(pipe.unet, ether.EtherConfig(), "dog"))
    add_new_token(pipe, "dog", LearnedEmbeds("<dog>", {"text_encoder": torch.ones(1, 32)}, {"text_encoder": "<dog>"}))
    ether.save(pipe, tmp_path / "file", name="dog")
    to_peft(tmp_path / "file", tmp_path / "peft")
    assert "the new token <dog> is not in the PEFT folder: its embeddings are in learned_embeds" in caplog.text


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds .*conv_out.*, which is no vector of ETHER"):
        from_peft({"unet": trained_by_peft(tmp_path / "a", modules_to_save=["conv_out"])}, tmp_path / "x")
    lora = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["to_q"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is of the type 'LORA', not ETHER"):
        from_peft({"unet": tmp_path / "lora"}, tmp_path / "x")
    with pytest.raises(ValueError, match="unknown component 'net'"):
        from_peft({"net": tmp_path / "a"}, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        from_peft({"unet": tmp_path}, tmp_path / "x")
    folder = trained_by_peft(tmp_path / "b")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="files that must be unpickled are not read"):
        from_peft({"unet": folder}, tmp_path / "x")
    folder = trained_by_peft(tmp_path / "c")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        from_peft({"unet": folder}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_blocks": 2}, "with n_blocks=2"), ({"variant": "ether"}, r"its settings need \['u'\]")],
)
def test_settings_that_do_not_belong_to_the_vectors_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = trained_by_peft(tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        from_peft({"unet": folder}, tmp_path / "x")


@KIND
def test_an_adapter_of_a_diffusers_model_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    unet, again = build(), build()
    unet.add_adapter(EtherPeftConfig(target_modules=ATTENTION, init_weights=False, **KINDS[kind]), "dog")  # type: ignore[arg-type]
    save(unet, tmp_path, "dog")
    load(again, tmp_path, "cat")
    assert torch.equal(run(again), run(unet))
    assert again.active_adapters() == ["cat"]
    model = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(run(model.base_model.model), run(unet))
    ours = from_peft({"unet": tmp_path}, tmp_path / "ours")
    assert AdapterFile.read(ours).configs["unet"].method == KINDS[kind]["variant"]


def test_a_folder_that_does_not_fit_leaves_the_model_without_the_adapter(tmp_path: Path) -> None:
    unet, again = build(), build()
    unet.add_adapter(EtherPeftConfig(target_modules=["to_q"]), "dog")
    save(unet, tmp_path, "dog")
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"target_modules": ["to_k"]}))
    with pytest.raises(StateMismatchError, match=r"missing key: .*to_k"):
        load(again, tmp_path, "dog")
    assert again.peft_config == {}
    assert torch.equal(run(again), run(build()))
    with pytest.raises(ValueError, match="UNet2DConditionModel has no ETHER adapter 'dog'"):
        save(again, tmp_path / "x", "dog")


def test_an_adapter_that_is_there_is_not_loaded_over(tmp_path: Path) -> None:
    model = tuned("ether_plus")
    save(model.base_model.model, tmp_path, "default")
    with pytest.raises(ValueError, match=r"this is a PeftModel: call model\.load_adapter"):
        load(model, tmp_path, "other")
    plain = small()
    load(plain, tmp_path, "dog")
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    with pytest.raises(ValueError, match="an adapter 'dog' is there already: delete it first"):
        load(plain, tmp_path, "dog")
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_no_folders_make_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder is given: name one for each component"):
        from_peft({}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_card_of_another_adapter_stays_as_it_is(tmp_path: Path) -> None:
    lora = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["first"]))
    lora.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    save(tuned("ether_plus").base_model.model, tmp_path / "mine", "default")
    assert (tmp_path / "README.md").read_text() == before
    assert "ether_diffusion.peft_tuner" in (tmp_path / "mine" / "README.md").read_text()
