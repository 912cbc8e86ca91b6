"""Prompts beyond the length of CLIP: chunks with begin and end tokens of their own, encoded one by one.

The rule of AUTOMATIC1111's web UI with comma_padding_backtrack 0: every chunk has ``model_max_length`` - 2 tokens of
the prompt (75 of CLIP), a chunk without any is the empty prompt, the hidden states of all stand one after another, and
a pooled embedding is the first chunk's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Chunks(NamedTuple):
    """Prompts as an encoder takes them, chunk by chunk, int64.

    Attributes:
        ids: (chunks, prompts, tokens): begin, the prompt's tokens, end, padding.
        mask: the same shape, 0 where there is padding.
    """

    ids: Tensor
    mask: Tensor


def tokens_per_chunk(tokenizer: Any) -> int:
    """Tokens of a prompt in a chunk: all but the begin and the end."""
    return int(tokenizer.model_max_length) - 2


def prompt_tokens(pipe: DiffusionPipeline, tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of prompts, however many, without begin and end; words of textual inversion as all their vectors."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    said = list(prompts) if convert is None else convert(list(prompts), tokenizer)
    found: list[list[int]] = tokenizer(said, add_special_tokens=False, verbose=False).input_ids if said else []
    return found


def chunks_of(tokens: Sequence[Sequence[int]], tokenizer: Any, number: int) -> Chunks:
    """Prompts in ``number`` chunks each; what does not fit is left out, what is missing are empty chunks.

    Args:
        tokens: of :func:`prompt_tokens`.
        tokenizer: that made them.
        number: of chunks.
    """
    size, length = tokens_per_chunk(tokenizer), int(tokenizer.model_max_length)
    ids = torch.full((number, len(tokens), length), int(tokenizer.pad_token_id), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for chunk in range(number):
        for row, own in enumerate(tokens):
            part = [tokenizer.bos_token_id, *own[chunk * size : (chunk + 1) * size], tokenizer.eos_token_id]
            ids[chunk, row, : len(part)] = torch.tensor(part)
            mask[chunk, row, : len(part)] = 1
    return Chunks(ids, mask)


def chunks_needed(tokens: Sequence[Sequence[int]], tokenizer: Any) -> int:
    """Chunks that hold the longest of the prompts; an empty prompt is one."""
    longest = max((len(own) for own in tokens), default=0)
    return max(1, -(-longest // tokens_per_chunk(tokenizer)))
