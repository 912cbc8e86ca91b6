"""A placeholder token that is trained beside the adapter: textual inversion (arXiv 2208.01618) and pivotal tuning.

The token's embeddings learn together with the adapter, as in pivotal tuning (arXiv 2106.05744), which learns the pivot
first; with ``token_steps`` they stay where they are from that step on, and the adapter learns around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.core.new_rows import tables_of
from ether_diffusion.data.randomness import generator
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import FAMILIES
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.new_tokens import add_new_token, token_misfits
from ether_diffusion.training.sections import TOKENS, NewTokenSection
from ether_diffusion.training.trainables import ADAPTER_NAME, Trainable


def make_token(family: Family, section: NewTokenSection) -> list[Trainable]:
    """Let the family's pipeline know the placeholder token, whose rows are trained, one trainable a text encoder.

    Raises:
        ValueError: the family's text encoders can learn no token, the token is known already, or what it starts from is
            not in the vocabulary or has more tokens than the placeholder has vectors.
    """
    token = section.placeholder_token
    if token is None:
        return []
    if not family.TOKEN_KEYS:
        able = ", ".join(each.TITLE for each in FAMILIES.values() if each.TOKEN_KEYS)
        raise ValueError(
            f"placeholder_token: {family.TITLE} can learn no new token here, only {able} can: leave it out"
        )
    encoders, tokenizers = family.text_encoders, family.tokenizers
    rows = {name: _start(name, encoders[name], tokenizers[name], section) for name in family.TOKEN_KEYS}
    if problems := token_misfits(family.pipe, token, rows):
        raise ValueError(f"placeholder_token: {problems[0]}")
    keys = {name: key or token for name, key in family.TOKEN_KEYS.items()}
    new = add_new_token(family.pipe, ADAPTER_NAME, LearnedEmbeds(token, rows, keys))
    return [Trainable(f"{TOKENS}{name}", each, None, last_step=section.token_steps) for name, each in new.items()]


def _start(component: str, encoder: nn.Module, tokenizer: Any, section: NewTokenSection) -> Tensor:
    """Where the rows start from, (vectors, features) fp32: embeddings of known tokens in turn, or normal noise.

    The noise has the deviation of the whole table, and depends on the seed and the text encoder alone.
    """
    table = tables_of(encoder)[0].weight.detach().float()
    if section.initializer_token is None:
        random = generator(section.seed, "placeholder", component)
        return table.std().cpu() * torch.randn(section.num_vectors, table.shape[1], generator=random)
    ids = list(tokenizer(section.initializer_token, add_special_tokens=False).input_ids)
    if not ids or len(ids) > section.num_vectors:
        raise ValueError(
            f"initializer_token {section.initializer_token!r} is {len(ids)} tokens of the {component}, and the "
            f"placeholder has {section.num_vectors} vectors: choose another word, or num_vectors={max(1, len(ids))}"
        )
    turns = [ids[number % len(ids)] for number in range(section.num_vectors)]
    return table[turns].cpu()
