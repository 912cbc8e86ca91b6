"""An adapter of a pipeline goes to the Hub as a folder whose card's code runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import shake
from PIL import Image
from safetensors import safe_open

import ether_diffusion as ether
from ether_diffusion import playground
from ether_diffusion.core.host import host_of
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.new_tokens import add_new_token
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.runs import hub

Uploads = list[tuple[Path, dict[str, Any]]]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Uploads:
    """What was uploaded: a copy of the folder, and how; the Hub takes everything."""
    kept: Uploads = []

    def create_repo(repo_id: str, **settings: Any) -> SimpleNamespace:
        kept.append((Path(), {"repo_id": repo_id, **settings}))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(folder_path: Path, **settings: Any) -> str:
        kept.append((Path(shutil.copytree(folder_path, tmp_path / settings["repo_id"])), settings))
        return f"https://huggingface.co/{settings['repo_id']}/commit/1"

    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    return kept


def code_of(card: str) -> str:
    return card.split("\n```python\n")[1].split("\n```\n")[0]


def test_the_code_of_the_card_draws_with_the_adapter(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = playground.load()
    shake(ether.attach(pipe.unet, ether.EtherConfig("ether_plus"), "dog"))
    address = ether.push_to_hub(pipe, "me/dog", prompt='a "qwe" dog', private=True, token="hf_x")
    assert address == "https://huggingface.co/me/dog/commit/1"
    assert uploads[0][1] == {"repo_id": "me/dog", "private": True, "token": "hf_x", "exist_ok": True}
    folder, settings = uploads[1]
    assert (settings["token"], settings["commit_message"]) == ("hf_x", "Add ETHER weights")
    assert {path.name for path in folder.iterdir()} == {"ether_weights.safetensors", "README.md"}
    with safe_open(folder / "ether_weights.safetensors", "pt") as file:
        assert file.metadata()["base_model"] == "playground"
    monkeypatch.chdir(tmp_path)  # where me/dog is a folder, as it is a repository on the Hub
    scope: dict[str, Any] = {}
    exec(code_of((folder / "README.md").read_text()), scope)
    assert isinstance(scope["image"], Image.Image)
    (loaded,) = host_of(scope["pipe"].unet).adapters.values()  # type: ignore[union-attr]
    (mine,) = host_of(pipe.unet).adapters.values()  # type: ignore[union-attr]
    assert all((value == mine.state_dict()[key]).all() for key, value in loaded.state_dict().items())


def test_a_new_token_goes_with_its_adapter(uploads: Uploads) -> None:
    pipe = tiny_pipeline()
    shake(ether.attach(pipe.unet, ether.EtherConfig(), "dog"))
    add_new_token(pipe, "dog", LearnedEmbeds("<dog>", {"text_encoder": torch.ones(1, 32)}, {"text_encoder": "<dog>"}))
    ether.push_to_hub(pipe, "me/dog")
    folder = uploads[1][0]
    card = (folder / "README.md").read_text()
    assert r"\<dog\> in a prompt is a new token" in card
    assert "nothing but their unit vectors and the embeddings of a new token." in card
    ether.load(other := tiny_pipeline(), folder)
    assert ether.adapters(other)["default"].placeholder_token == "<dog>"


def test_the_header_says_what_it_belongs_to(uploads: Uploads) -> None:
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path="owner/sd15")
    ether.attach(pipe.unet, ether.EtherConfig("ether"), "dog")
    ether.push_to_hub(pipe, "me/dog", "dog", prompt="a qwe dog")
    card = (uploads[1][0] / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "base_model": "owner/sd15",
        "base_model_relation": "adapter",
        "library_name": "ether-diffusion",
        "tags": ["ether", "text-to-image", "diffusers", "diffusers-training", "stable-diffusion"],
        "instance_prompt": "a qwe dog",
    }
    assert 'DiffusionPipeline.from_pretrained("owner/sd15")' in code_of(card)
    assert "[owner/sd15](https://huggingface.co/owner/sd15)" in card


def test_no_path_of_this_machine_is_uploaded(uploads: Uploads, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path=str(tmp_path / "secret" / "base"))
    ether.attach(pipe.unet, ether.EtherConfig("ether"), "dog")
    ether.push_to_hub(pipe, "me/dog")
    for path in uploads[1][0].iterdir():
        assert b"secret" not in path.read_bytes()
    assert 'from_pretrained("path/to/base")' in code_of((uploads[1][0] / "README.md").read_text())


def test_an_exact_lora_goes_with_it(uploads: Uploads) -> None:
    pytest.importorskip("peft")
    pipe = tiny_pipeline()
    shake(ether.attach(pipe.unet, ether.EtherConfig("ether"), "dog"))
    ether.push_to_hub(pipe, "me/dog", lora_format="kohya", prompt="a qwe dog")
    folder = uploads[1][0]
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "a qwe dog"
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118
    card = (folder / "README.md").read_text()
    assert "lora" in yaml.safe_load(card.split("---")[1])["tags"]
    assert 'pipe.load_lora_weights("me/dog")' in card
    stock = tiny_pipeline()
    stock.load_lora_weights(str(folder))


def test_nothing_is_uploaded_that_cannot_be_written(uploads: Uploads) -> None:
    pipe = tiny_pipeline()
    ether.attach(pipe.unet, ether.EtherConfig("naive"), "dog")
    with pytest.raises(ether.ExportError, match="full rank"):
        ether.push_to_hub(pipe, "me/dog", lora_format="kohya")
    with pytest.raises(ValueError, match="no adapter 'cat'"):
        ether.push_to_hub(pipe, "me/dog", "cat")
    assert uploads == []


@pytest.mark.parametrize("method", ["ether", "naive", "anchored", "ether_plus_free"])
def test_what_the_card_says_of_a_method_is_true_of_it(method: str) -> None:
    pipe = tiny_pipeline()
    ether.attach(pipe.unet, ether.EtherConfig(method), "dog")
    card = hub.adapter_card(pipe, "me/dog", "dog", None, None)
    assert ("trains nothing but their unit vectors. It has" in card) == (method == "ether")
    assert ("the paper does not have it" in card) == (method in ("anchored", "ether_plus_free"))


def test_a_title_is_no_markup(uploads: Uploads) -> None:
    pipe = tiny_pipeline()
    ether.attach(pipe.unet, ether.EtherConfig("ether"), "dog")
    card = hub.adapter_card(pipe, "me/<script>", "dog", "```\n{{ x }}", None)
    assert "<script>" not in card.split("```python")[0]
    assert sum(line.startswith("```") for line in card.splitlines()) == 2
