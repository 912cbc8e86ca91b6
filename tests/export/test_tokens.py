"""The embeddings of new tokens beside an exported LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ether_diffusion.export.tokens import check_tokens, embeds_paths, read_tokens, told_of_token, write_tokens
from ether_diffusion.pipelines.file import AdapterFileError
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.schema import ORIGIN


def embeds(token: str, value: float = 1.0) -> LearnedEmbeds:
    return LearnedEmbeds(token, {"text_encoder": torch.full((2, 4), value)}, {"text_encoder": token})


def lora(path: Path, *tokens: LearnedEmbeds) -> Path:
    adapters = {str(number): told_of_token(each) for number, each in enumerate(tokens)} | {"plain": {"sha256": "0"}}
    header = {ORIGIN: json.dumps({"adapters": adapters})}
    save_file({"unet.a.lora_A.weight": torch.ones(1, 2)}, path, metadata=header)
    return path


def test_one_token_lies_beside_as_beside_an_adapter(tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors", embeds("<dog>"))
    assert write_tokens(path, {"<dog>": embeds("<dog>")}) == [tmp_path / "dog.learned_embeds.safetensors"]
    (found,) = read_tokens(path)
    assert (found.token, found.hash) == ("<dog>", embeds("<dog>").hash)


def test_of_several_each_has_its_token_in_the_name(tmp_path: Path) -> None:
    both = {token: embeds(token) for token in ("<dog>", "<cat>")}
    path = lora(tmp_path / "both.safetensors", *both.values())
    written = write_tokens(path, both)
    assert [each.name for each in written] == [f"both.{name}.learned_embeds.safetensors" for name in ("dog", "cat")]
    assert [each.token for each in read_tokens(path)] == ["<dog>", "<cat>"]


def test_the_same_embeddings_may_be_there_and_others_are_kept(tmp_path: Path) -> None:
    path, mine = tmp_path / "dog.safetensors", {"<dog>": embeds("<dog>")}
    (file,) = write_tokens(path, mine)
    before = file.stat().st_mtime_ns
    assert write_tokens(path, mine) == [file]
    assert file.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="where the embeddings of <dog> belong"):
        check_tokens(path, {"<dog>": embeds("<dog>", 2.0)})
    file.write_bytes(b"no header")
    with pytest.raises(FileExistsError, match="name another file, or remove it"):
        write_tokens(path, mine)
    assert file.read_bytes() == b"no header"


def test_missing_damaged_and_other_embeddings_are_told(tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors", embeds("<dog>"))
    with pytest.raises(AdapterFileError, match=r"put dog\.learned_embeds\.safetensors there"):
        read_tokens(path)
    (file,) = embeds_paths(path, ["<dog>"]).values()
    file.write_bytes(b"no header")
    with pytest.raises(AdapterFileError, match=r"dog\.learned_embeds\.safetensors"):
        read_tokens(path)
    embeds("<dog>", 2.0).write(file)
    with pytest.raises(AdapterFileError, match="take both files from one export"):
        read_tokens(path)


@pytest.mark.parametrize(
    "origin",
    [None, "no json", "[]", '{"adapters": []}', '{"adapters": {"a": {"sha256": "0"}}}', '{"adapters": {"a": 1}}'],
)
def test_a_lora_without_tokens_has_none(tmp_path: Path, origin: str | None) -> None:
    path = tmp_path / "other.safetensors"
    metadata = None if origin is None else {ORIGIN: origin}
    save_file({"unet.a.lora_A.weight": torch.ones(1, 2)}, path, metadata=metadata)
    assert read_tokens(path) == []


@pytest.mark.parametrize("told", ['"<dog>"', '{"placeholder_token": "<dog>"}', '{"placeholder_token": 1, "hash": "0"}'])
def test_a_broken_header_is_told(tmp_path: Path, told: str) -> None:
    path = tmp_path / "other.safetensors"
    header = {ORIGIN: f'{{"adapters": {{"a": {{"learned_embeds": {told}}}}}}}'}
    save_file({"unet.a.lora_A.weight": torch.ones(1, 2)}, path, metadata=header)
    with pytest.raises(AdapterFileError, match="broken metadata"):
        read_tokens(path)


def test_a_token_that_names_another_folder_is_refused(tmp_path: Path) -> None:
    path = lora(tmp_path / "dog.safetensors", embeds("<dog>"), embeds("</../../x>"))
    with pytest.raises(AdapterFileError, match="must be small letters"):
        read_tokens(path)
