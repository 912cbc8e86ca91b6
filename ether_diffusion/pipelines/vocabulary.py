"""New tokens of a tokenizer: they are added to a copy of its backend, so that taking them away leaves no trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ether_diffusion.private import tokenizer_backend, use_tokenizer_backend

_ATTRIBUTE = "_ether_vocabulary"


@dataclass
class _Added:
    """What was added to a tokenizer: its backend before, and from placeholder tokens to all of their tokens."""

    before: Any
    tokens: dict[str, list[str]] = field(default_factory=dict)


def tokens_of(token: str, vectors: int) -> list[str]:
    """The tokens that a placeholder of so many vectors stands for, as diffusers numbers them: <dog>, <dog>_1, …."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def vocabulary_misfit(tokenizer: Any, token: str, vectors: int) -> str | None:
    """Why a placeholder cannot be added to a tokenizer; None where it can."""
    if tokenizer_backend(tokenizer) is None:
        return f"{type(tokenizer).__name__} takes no new tokens here: it has no backend of the tokenizers library"
    known = tokenizer.get_vocab()
    if taken := [each for each in (*tokens_of(token, vectors), f"{token}_1") if each in known]:
        return f"the token {taken[0]} is in the vocabulary already"
    return None


def add_placeholder(tokenizer: Any, token: str, vectors: int) -> None:
    """Add the tokens of a placeholder; :func:`vocabulary_misfit` must have nothing against it.

    Raises:
        ValueError: the tokenizer does not find the token in a prompt.
    """
    added: _Added = tokenizer.__dict__.setdefault(_ATTRIBUTE, _Added(tokenizer_backend(tokenizer)))
    added.tokens[token] = tokens_of(token, vectors)
    _write(tokenizer, added)
    if not set(ids_of(tokenizer, token)) <= set(tokenizer(" ".join(tokens_of(token, vectors))).input_ids):
        remove_placeholder(tokenizer, token)
        raise ValueError(f"{type(tokenizer).__name__} does not find the token {token} in a prompt")


def remove_placeholder(tokenizer: Any, token: str) -> None:
    """Take a placeholder's tokens away; those of others get the ids that they would have had without it.

    Raises:
        RuntimeError: other tokens were added to the tokenizer since.
    """
    check_removable(tokenizer)
    added: _Added = tokenizer.__dict__[_ATTRIBUTE]
    del added.tokens[token]
    _write(tokenizer, added)
    if not added.tokens:
        del tokenizer.__dict__[_ATTRIBUTE]


def check_removable(tokenizer: Any) -> None:
    """Refuse to take tokens away where this would change the ids of tokens that others added since.

    Raises:
        RuntimeError: there are such tokens.
    """
    added: _Added = tokenizer.__dict__[_ATTRIBUTE]
    ours = {each for tokens in added.tokens.values() for each in tokens}
    before = {each.content for each in added.before.get_added_tokens_decoder().values()}
    if others := sorted(set(tokenizer.added_tokens_encoder) - before - ours):
        raise RuntimeError(
            f"other tokens were added to the tokenizer since, {', '.join(others[:4])}: take them away first, "
            "pipe.unload_textual_inversion"
        )


def ids_of(tokenizer: Any, token: str) -> list[int]:
    """The present ids of a placeholder that was added here."""
    added: _Added = tokenizer.__dict__[_ATTRIBUTE]
    ids: list[int] = tokenizer.convert_tokens_to_ids(added.tokens[token])
    return ids


def _write(tokenizer: Any, added: _Added) -> None:
    """The backend of before, and in a copy of it all that is added."""
    everything = [each for tokens in added.tokens.values() for each in tokens]
    use_tokenizer_backend(tokenizer, added.before, everything)
