"""Placeholder tokens in real pipelines: as diffusers' own loader gives them, and gone without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from helpers import shake
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ether_diffusion as ether
from ether_diffusion import AdapterFileError, EtherConfig
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds, read_embeds
from ether_diffusion.pipelines.new_tokens import add_new_token, new_tokens, token_misfits
from ether_diffusion.pipelines.schema import SchemaError
from ether_diffusion.playground.tiny import tiny_pipeline

TOKEN, PROMPT = "<dog>", "a photo of a <dog> dog"
SD = {"text_encoder": TOKEN}
XL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


FILES = ("ether_weights.safetensors", "learned_embeds.safetensors")


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def embeds(keys: dict[str, str], vectors: int = 2, token: str = TOKEN, seed: int = 3) -> LearnedEmbeds:
    generator = torch.Generator().manual_seed(seed)
    return LearnedEmbeds(token, {name: torch.randn(vectors, 32, generator=generator) for name in keys}, keys)


def saved(folder: Path, xl: bool = False, vectors: int = 2, token: str = TOKEN, seed: int = 3) -> Path:
    """A run folder's two files: an adapter with a token."""
    pipe = tiny_pipeline(xl)
    shake(ether.attach(pipe.unet, EtherConfig(), "trained"), seed=seed)
    keys = XL if xl else {"text_encoder": token}
    add_new_token(pipe, "trained", embeds(keys, vectors, token, seed))
    ether.save(pipe, folder, "trained")
    return folder


def state(pipe: DiffusionPipeline) -> dict[str, Any]:
    """All that must be as before when a token has gone."""
    encoders = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None)]
    return {
        "weights": [{key: value.clone() for key, value in each.state_dict().items()} for each in encoders],
        "modules": [[id(module) for module in each.modules()] for each in encoders],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for each in encoders for m in each.modules()],
        "vocabulary": (pipe.tokenizer.get_vocab(), len(pipe.tokenizer), dict(pipe.tokenizer.added_tokens_encoder)),
        "attributes": (set(pipe.tokenizer.__dict__), id(pipe.tokenizer._tokenizer)),
        "own": [set(each.__dict__) for each in encoders],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = zip(one.pop("weights"), other.pop("weights"), strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in weights) and (
        one == other
    )


@torch.no_grad()
def encoded(pipe: DiffusionPipeline, prompt: str = PROMPT) -> list[Tensor]:
    found = pipe.encode_prompt(prompt, "cpu", 1, False) if not hasattr(pipe, "text_encoder_2") else None
    found = found or pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return [each for each in found if each is not None]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_loads_the_file_of_sd_from_the_folder(tmp_path: Path, vectors: int) -> None:
    saved(tmp_path, vectors=vectors)
    stock, pipe = tiny_pipeline(), tiny_pipeline()
    stock.load_textual_inversion(str(tmp_path))
    ether.load(pipe, tmp_path)
    assert equal(encoded(pipe), encoded(stock))
    assert not equal(encoded(pipe), encoded(tiny_pipeline()))
    assert equal(encoded(pipe, "a dog"), encoded(tiny_pipeline(), "a dog"))


def test_diffusers_loads_the_file_of_sdxl_by_its_keys(tmp_path: Path) -> None:
    saved(tmp_path, xl=True)
    stock, pipe = tiny_pipeline(True), tiny_pipeline(True)
    stock.tokenizer_2 = tiny_pipeline().tokenizer  # diffusers adds a token to a shared tokenizer once
    rows = load_file(tmp_path / "learned_embeds.safetensors")
    assert sorted(rows) == ["clip_g", "clip_l"]
    stock.load_textual_inversion({TOKEN: rows["clip_l"]})
    stock.load_textual_inversion(
        {TOKEN: rows["clip_g"]}, text_encoder=stock.text_encoder_2, tokenizer=stock.tokenizer_2
    )
    ether.load(pipe, tmp_path)
    assert equal(encoded(pipe), encoded(stock))


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_unload_leaves_no_trace(tmp_path: Path, xl: bool) -> None:
    pipe = tiny_pipeline(xl)
    before = state(pipe)
    ether.load(pipe, saved(tmp_path, xl), "dog")
    assert ether.adapters(pipe)["dog"].placeholder_token == TOKEN
    ether.unload(pipe, "dog")
    assert same(state(pipe), before)
    ether.load(pipe, tmp_path, "again")
    assert ether.adapters(pipe)["again"].placeholder_token == TOKEN


def test_tokens_of_two_adapters_leave_in_any_order(tmp_path: Path) -> None:
    pipe, alone = tiny_pipeline(), tiny_pipeline()
    before = state(pipe)
    ether.load(pipe, saved(tmp_path / "dog"), "dog")
    ether.load(pipe, saved(tmp_path / "cat", token="<cat>", seed=5), "cat")
    ether.load(alone, tmp_path / "cat", "cat")
    prompt = "a <cat> cat"
    assert equal(encoded(pipe, prompt), encoded(alone, prompt))
    ether.unload(pipe, "dog")
    assert equal(encoded(pipe, prompt), encoded(alone, prompt))
    assert equal(encoded(pipe), encoded(tiny_pipeline()))
    ether.unload(pipe, "cat")
    assert same(state(pipe), before)


def test_save_gives_the_same_files_and_any_name_has_its_own(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    ether.load(pipe, saved(tmp_path / "dog"), "dog")
    ether.save(pipe, tmp_path / "again")
    for name in FILES:
        (one, told), (other, same_told) = content(tmp_path / "dog" / name), content(tmp_path / "again" / name)
        assert told == same_told
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    path = ether.save(pipe, tmp_path / "loras" / "rex.safetensors")
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "rex.learned_embeds.safetensors",
        "rex.safetensors",
    ]
    other = tiny_pipeline()
    ether.load(other, path)
    assert equal(encoded(other), encoded(pipe))
    with safe_open(path, "pt") as file:
        assert file.metadata()["format_version"] == "3"  # which versions before would load without the token


def test_a_pipeline_made_of_the_same_parts_knows_the_token(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    before = state(pipe)
    ether.load(pipe, saved(tmp_path))
    assert equal(encoded(other), encoded(pipe))
    ether.unload(other)
    assert same(state(pipe), before)


def test_the_token_stays_while_the_adapter_is_off(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    ether.load(pipe, saved(tmp_path))
    there = encoded(pipe)
    with ether.disabled(pipe):
        assert equal(encoded(pipe), there)


def test_another_dtype(tmp_path: Path) -> None:
    stock, pipe = tiny_pipeline(), tiny_pipeline()
    for each in (stock, pipe):
        each.text_encoder.to(torch.bfloat16)
    saved(tmp_path)
    stock.load_textual_inversion(str(tmp_path))
    ether.load(pipe, tmp_path)
    assert equal(encoded(pipe), encoded(stock))
    assert new_tokens(pipe)["default"].rows["text_encoder"].dtype == torch.float32


def test_offloaded_text_encoder(tmp_path: Path) -> None:
    pipe, offloaded = tiny_pipeline(), tiny_pipeline()
    ether.load(pipe, saved(tmp_path))
    cpu_offload(offloaded.text_encoder, torch.device("cpu"))
    assert offloaded.text_encoder.get_input_embeddings().weight.is_meta
    ether.load(offloaded, tmp_path)
    assert equal(encoded(offloaded), encoded(pipe))


def refused(pipe: DiffusionPipeline, source: Path, match: str, error: type[Exception] = AdapterFileError) -> None:
    before = state(pipe)
    with pytest.raises(error, match=match):
        ether.load(pipe, source, "refused")
    assert same(state(pipe), before)
    assert "refused" not in ether.adapters(pipe)


def test_a_known_token_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    ether.load(pipe, saved(tmp_path / "one"), "one")
    refused(pipe, saved(tmp_path / "two", seed=4), "the adapter 'one' has the token <dog>, too: unload it")
    pipe = tiny_pipeline()
    pipe.load_textual_inversion(str(tmp_path / "one"))
    refused(pipe, tmp_path / "one", "the token <dog> is in the vocabulary already")


def test_a_missing_or_exchanged_file_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    saved(tmp_path / "two", seed=4)
    file = tmp_path / "one" / "learned_embeds.safetensors"
    shutil.copy(tmp_path / "two" / file.name, file)
    refused(tiny_pipeline(), tmp_path / "one", "is not the file that ether_weights.safetensors was saved with")
    file.unlink()
    refused(tiny_pipeline(), tmp_path / "one", "new token <dog>, whose embeddings are not beside", FileNotFoundError)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, xl=True)
    refused(tiny_pipeline(), tmp_path, "SDXL|does not fit")
    pipe = tiny_pipeline()
    wide = {"text_encoder": torch.zeros(1, 33)}
    assert token_misfits(pipe, TOKEN, wide) == ["<dog> has embeddings of 33 numbers for text_encoder, which needs 32"]
    assert "no text_encoder_2" in token_misfits(pipe, TOKEN, {"text_encoder_2": torch.zeros(1, 32)})[0]


@pytest.mark.parametrize("token", ["dog", "<Dog>", "<do g>", "<>", "<" + 80 * "d" + ">", "<|endoftext|>"])
def test_what_cannot_be_a_placeholder_is_refused(token: str) -> None:
    assert "must be small letters" in token_misfits(tiny_pipeline(), token, {"text_encoder": torch.zeros(1, 32)})[0]


def test_unloading_is_refused_while_later_tokens_of_others_are_there(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    ether.load(pipe, saved(tmp_path), "dog")
    there = encoded(pipe)
    pipe.load_textual_inversion({"<cat>": torch.ones(1, 32)})
    assert equal(encoded(pipe), there)
    with pytest.raises(RuntimeError, match="other tokens were added to the tokenizer since, <cat>"):
        ether.unload(pipe, "dog")
    assert ether.adapters(pipe)["dog"].active
    assert equal(encoded(pipe), there)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / "learned_embeds.safetensors"
    rows, good = load_file(file)[TOKEN], {"format_version": "1", "placeholder_token": TOKEN}
    named = good | {"components": json.dumps({"text_encoder": TOKEN})}
    cases: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        ({TOKEN: rows}, {}, "was not written by this library"),
        ({TOKEN: rows}, good, "there is no components"),
        ({TOKEN: rows}, named | {"placeholder_token": "dog"}, "must be small letters"),
        ({"x": rows}, named, "components is a dict, and the tensors are"),
        ({TOKEN: rows[0]}, named, "as many vectors in each"),
        ({TOKEN: rows.int()}, named, "no floating numbers"),
        ({TOKEN: rows * torch.nan}, named, "NaN or infinity"),
    ]
    for tensors, metadata, match in cases:
        save_file(tensors, file, metadata)
        with pytest.raises(SchemaError, match=match):
            read_embeds(file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(SchemaError, match="damaged or cut off"):
        read_embeds(file)


def test_rows_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    ether.load(pipe, saved(tmp_path), "dog")
    before = [(tmp_path / name).read_bytes() for name in FILES]
    with torch.no_grad():
        new_tokens(pipe)["dog"].rows["text_encoder"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="embeddings of <dog> hold NaN or infinity"):
        ether.save(pipe, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in FILES] == before
