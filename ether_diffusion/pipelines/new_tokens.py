"""Placeholder tokens in a pipeline: a tokenizer that knows them, and text encoders with rows of their own for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ether_diffusion.core.new_rows import NewRows, tables_of
from ether_diffusion.core.targets import root_of, unwrapped
from ether_diffusion.families.parts import TEXT_ENCODERS
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.vocabulary import (
    add_placeholder,
    check_removable,
    ids_of,
    remove_placeholder,
    vocabulary_misfit,
)
from ether_diffusion.placeholder import check_placeholder
from ether_diffusion.private import hooks_changed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ATTRIBUTE = "_ether_new_tokens"


@dataclass(frozen=True)
class _Entry:
    """A placeholder token in one text encoder."""

    token: str
    key: str
    rows: NewRows


def token_misfits(pipe: DiffusionPipeline, token: str, rows: Mapping[str, Tensor]) -> list[str]:
    """What keeps a placeholder token from being added, one line per problem.

    Args:
        pipe: any pipeline with the text encoders.
        token: as it stands in prompts.
        rows: by text encoder, (vectors, features).
    """
    try:
        check_placeholder(token)
    except ValueError as error:
        return [str(error)]
    problems = []
    for component, own in rows.items():
        encoder, tokenizer = getattr(pipe, component, None), tokenizer_of(pipe, component)
        if encoder is None or tokenizer is None:
            problems.append(f"the pipeline has no {component}, or no tokenizer of it, which {token} has embeddings for")
            continue
        try:
            width = tables_of(unwrapped(encoder))[0].embedding_dim
        except ValueError as error:
            problems.append(str(error))
            continue
        if width != own.shape[-1]:
            problems.append(f"{token} has embeddings of {own.shape[-1]} numbers for {component}, which needs {width}")
        if why := vocabulary_misfit(tokenizer, token, len(own)):
            problems.append(f"{_other(pipe, token) or why}: unload it, or choose another token")
        if len(own) > 1 and not hasattr(pipe, "maybe_convert_prompt"):
            problems.append(f"{type(pipe).__name__} cannot draw with {token}, which has {len(own)} vectors")
    return list(dict.fromkeys(problems))


def _other(pipe: DiffusionPipeline, token: str) -> str | None:
    """Which adapter has brought a token."""
    names = [name for name, embeds in new_tokens(pipe).items() if embeds.token == token]
    return f"the adapter {names[0]!r} has the token {token}, too" if names else None


def tokenizer_of(pipe: DiffusionPipeline, component: str) -> Any:
    """The tokenizer of a text encoder, None where the pipeline has none; of a processor its tokenizer."""
    found = getattr(pipe, component.replace("text_encoder", "tokenizer"), None)
    return getattr(found, "tokenizer", found)


def add_new_token(pipe: DiffusionPipeline, name: str, embeds: LearnedEmbeds) -> dict[str, NewRows]:
    """Let the pipeline know a placeholder token, against which :func:`token_misfits` has nothing.

    Args:
        pipe: the pipeline.
        name: of the adapter that it belongs to.
        embeds: where its embeddings start from.

    Returns:
        By text encoder the rows, which may be trained.

    Raises:
        ValueError: a tokenizer does not find the token in a prompt; the pipeline is as before.
    """
    tokenizers = {id(each): each for component in embeds.rows if (each := tokenizer_of(pipe, component))}
    added: list[Any] = []
    try:
        for tokenizer in tokenizers.values():
            add_placeholder(tokenizer, embeds.token, embeds.vectors)
            added.append(tokenizer)
    except BaseException:
        for tokenizer in added:
            remove_placeholder(tokenizer, embeds.token)
        raise
    found = {}
    for component, rows in embeds.rows.items():
        encoder = unwrapped(getattr(pipe, component))
        new = found[component] = NewRows(rows)
        if (device := tables_of(encoder)[0].weight.device).type != "meta":  # offloaded weights are
            new.to(device)
        new.ids = tuple(ids_of(tokenizer_of(pipe, component), embeds.token))
        new.attach(encoder)
        entry = _Entry(embeds.token, embeds.keys[component], new)
        root_of(encoder).__dict__.setdefault(_ATTRIBUTE, {})[name] = entry
        hooks_changed(encoder)
    return found


def remove_new_token(pipe: DiffusionPipeline, name: str) -> None:
    """Take the placeholder token of an adapter away, where it has one.

    Raises:
        RuntimeError: other tokens were added to a tokenizer since; the pipeline is as before.
    """
    entries = _entries(pipe)
    own = [component for component in entries if name in entries[component]]
    tokenizers = {id(each): each for component in own if (each := tokenizer_of(pipe, component))}
    for tokenizer in tokenizers.values():
        check_removable(tokenizer)
    for tokenizer in tokenizers.values():
        remove_placeholder(tokenizer, entries[own[0]][name].token)
    for component in own:
        encoder, left = unwrapped(getattr(pipe, component)), entries[component]
        left.pop(name).rows.detach()
        for entry in left.values():  # whose ids follow on
            entry.rows.ids = tuple(ids_of(tokenizer_of(pipe, component), entry.token))
        if not left:
            del root_of(encoder).__dict__[_ATTRIBUTE]
        hooks_changed(encoder)


def new_tokens(pipe: DiffusionPipeline) -> dict[str, LearnedEmbeds]:
    """The placeholder tokens that a pipeline knows, by the adapter that they belong to, with their present rows."""
    entries = _entries(pipe)
    found = {}
    for name in dict.fromkeys(name for own in entries.values() for name in own):
        own = {component: each[name] for component, each in entries.items() if name in each}
        rows = {component: entry.rows.rows for component, entry in own.items()}
        token = next(iter(own.values())).token
        found[name] = LearnedEmbeds(token, rows, {component: entry.key for component, entry in own.items()})
    return found


def _entries(pipe: DiffusionPipeline) -> dict[str, dict[str, _Entry]]:
    """By text encoder and adapter."""
    modules = {component: getattr(pipe, component, None) for component in TEXT_ENCODERS}
    found = {
        component: root_of(module).__dict__.get(_ATTRIBUTE)
        for component, module in modules.items()
        if isinstance(module, nn.Module)
    }
    return {component: entries for component, entries in found.items() if entries}
