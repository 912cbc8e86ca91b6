"""New tokens beside an exported LoRA, which has no place for embeddings: each has a file, and its header names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ether_diffusion.pipelines.file import AdapterFileError, embeds_beside
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds, read_embeds
from ether_diffusion.pipelines.schema import EMBEDS, ORIGIN, SchemaError, read_header
from ether_diffusion.placeholder import check_placeholder
from ether_diffusion.reading import matches, shown


def told_of_token(embeds: LearnedEmbeds) -> dict[str, object]:
    """What the header of a LoRA says of the token of one of its adapters."""
    return {EMBEDS: {"placeholder_token": embeds.token, "hash": embeds.hash}}


def embeds_paths(lora: Path, tokens: Sequence[str]) -> dict[str, Path]:
    """Where the embeddings of a LoRA's tokens are, by token.

    Of a single token as beside an adapter file: ``dog.learned_embeds.safetensors`` of ``dog.safetensors``. Of several
    each has its token in the name: ``both.dog.learned_embeds.safetensors``.
    """
    if len(tokens) == 1:
        return {tokens[0]: embeds_beside(lora)}
    return {token: embeds_beside(lora.with_name(f"{lora.stem}.{token[1:-1]}.safetensors")) for token in tokens}


def write_tokens(lora: Path, tokens: Mapping[str, LearnedEmbeds]) -> list[Path]:
    """Write the embeddings of tokens beside a LoRA; a file that has the same ones stays.

    Args:
        lora: its path.
        tokens: what belongs to it, by token.

    Returns:
        The files.

    Raises:
        FileExistsError: a file with other embeddings is there; nothing is written.
    """
    paths = embeds_paths(lora, list(tokens))
    new = {token: path for token, path in paths.items() if not _has(path, tokens[token])}
    for token, path in new.items():
        tokens[token].write(path)
    return list(paths.values())


def check_tokens(lora: Path, tokens: Mapping[str, LearnedEmbeds]) -> None:
    """See that :func:`write_tokens` would write.

    Raises:
        FileExistsError: a file with other embeddings is there.
    """
    for token, path in embeds_paths(lora, list(tokens)).items():
        _has(path, tokens[token])


def _has(path: Path, embeds: LearnedEmbeds) -> bool:
    """Whether a file has these embeddings.

    Raises:
        FileExistsError: it has others.
    """
    if not path.exists():
        return False
    try:
        same = read_embeds(path).hash == embeds.hash
    except SchemaError:
        same = False
    if not same:
        raise FileExistsError(
            f"{path} is there already, where the embeddings of {embeds.token} belong: name another file, or remove it"
        )
    return True


def read_tokens(lora: Path) -> list[LearnedEmbeds]:
    """The tokens of a LoRA that ``ether.export_lora`` wrote; none of other files.

    Raises:
        AdapterFileError: the embeddings of a token are not beside it, damaged, or others.
        OSError: a file cannot be read.
    """
    header, _ = read_header(lora)
    try:
        adapters = json.loads(header.get("__metadata__", {}).get(ORIGIN, "{}")).get("adapters", {}).values()
        told = [each[EMBEDS] for each in adapters if EMBEDS in each]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    if not all(matches(each, dict[str, str]) and {"placeholder_token", "hash"} <= each.keys() for each in told):
        raise AdapterFileError(f"{lora} has broken metadata: its new tokens are {shown(told)}")
    tokens = [each["placeholder_token"] for each in told]
    try:
        for token in tokens:  # they are parts of file names
            check_placeholder(token)
    except ValueError as error:
        raise AdapterFileError(f"{lora} has broken metadata: {error}") from error
    paths = embeds_paths(lora, tokens)
    return [_read(lora, paths[each["placeholder_token"]], each) for each in told]


def _read(lora: Path, path: Path, told: Mapping[str, str]) -> LearnedEmbeds:
    token = told["placeholder_token"]
    if not path.is_file():
        raise AdapterFileError(
            f"{lora} was made of an adapter with the new token {shown(token)}, whose embeddings are not beside it: put "
            f"{path.name} there, from the folder that it was exported to"
        )
    try:
        embeds = read_embeds(path)
    except SchemaError as error:
        raise AdapterFileError(f"{path} {error}") from error
    if (embeds.token, embeds.hash) != (token, told["hash"]):
        raise AdapterFileError(
            f"{path} has other embeddings than those of {lora.name}: take both files from one export"
        )
    return embeds
