"""A placeholder token in every family that can learn one: what diffusers' own loader gives, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import FLOW, build
from safetensors.torch import load_file
from torch import Tensor
from training.helpers import trained

import ether_diffusion as ether
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import FAMILIES, family_of
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.new_tokens import add_new_token, remove_new_token

TOKEN, PROMPTS, VECTORS = "<dog>", ["a <dog> dog", "a red dog"], 2
ABLE = [name for name, family in FAMILIES.items() if family.TOKEN_KEYS]


def rows_for(family: Family) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    widths = {name: family.text_encoders[name].get_input_embeddings().embedding_dim for name in family.TOKEN_KEYS}
    return {name: torch.randn(VECTORS, width, generator=random) for name, width in widths.items()}


def tokenizer(pipe: DiffusionPipeline, encoder: str) -> Any:
    return getattr(pipe, encoder.replace("text_encoder", "tokenizer"))


def dense(name: str, rows: dict[str, Tensor]) -> tuple[Family, dict[str, Tensor]]:
    """The same token by ``load_textual_inversion``, and the whole tables, which are trained by autograd."""
    pipe = build(name)
    if "tokenizer_2" in pipe.components and pipe.tokenizer_2 is pipe.tokenizer:
        pipe.tokenizer_2 = build(name).tokenizer  # diffusers adds a token to a shared tokenizer once
    tables = {}
    for encoder, own in rows.items():
        module = getattr(pipe, encoder)
        pipe.load_textual_inversion({TOKEN: own}, text_encoder=module, tokenizer=tokenizer(pipe, encoder))
        tables[encoder] = module.get_input_embeddings().weight
    for module in family_of(pipe).text_encoders.values():
        module.requires_grad_(False)
    return family_of(pipe), {encoder: table.requires_grad_(True) for encoder, table in tables.items()}


def weighted(encoded: dict[str, Any]) -> Tensor:
    random = torch.Generator().manual_seed(1)
    numbers = [each for each in encoded.values() if each is not None and each.requires_grad]
    return torch.stack([(each * torch.randn(each.shape, generator=random)).sum() for each in numbers]).sum()


def test_some_families_can() -> None:
    assert ABLE == ["sd", "sdxl", "flux", "chroma"]
    assert set(FLOW) - set(ABLE), "and others cannot"


@pytest.mark.parametrize("name", ABLE)
def test_encodings_and_gradients_are_those_of_dense_tables(name: str) -> None:
    pipe = build(name)
    family = family_of(pipe)
    for module in family.text_encoders.values():
        module.requires_grad_(False)
    before = {key: value.clone() for each in family.text_encoders.values() for key, value in each.state_dict().items()}
    plain = family.encode_prompts(PROMPTS)
    rows = rows_for(family)
    new = add_new_token(pipe, "x", LearnedEmbeds(TOKEN, rows, {key: key for key in rows}))
    other, tables = dense(name, rows)

    ours, theirs = family.encode_prompts(PROMPTS), other.encode_prompts(PROMPTS)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(ours[key][0], plain[key][0]) for key in plain)

    weighted(ours).backward()
    weighted(theirs).backward()
    for encoder, each in new.items():
        expected = tables[encoder].grad
        assert expected is not None
        assert each.rows.grad is not None
        at = list(each.ids)
        scale = float(expected[at].abs().max())
        assert scale > 0
        torch.testing.assert_close(each.rows.grad, expected[at], rtol=1e-4, atol=1e-5 * scale)
    after = {key: value for each in family.text_encoders.values() for key, value in each.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    remove_new_token(pipe, "x")
    again = family.encode_prompts(PROMPTS)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", ABLE)
def test_a_prompt_that_is_cut_is_told_with_all_vectors_of_the_token(name: str) -> None:
    pipe = build(name)
    family = family_of(pipe)
    rows = rows_for(family)
    add_new_token(pipe, "x", LearnedEmbeds(TOKEN, rows, {key: key for key in rows}))
    assert family.said("a <dog> dog") == "a <dog> <dog>_1 dog"
    assert family.said("a dog") == "a dog"


@pytest.mark.parametrize("name", ABLE)
def test_a_token_is_trained_loaded_and_drawn(
    name: str, train: Callable[..., Path], base: Callable[[str], Path]
) -> None:
    settings: dict[str, Any] = {"placeholder_token": TOKEN, "num_vectors": VECTORS, "token_lr": 0.1}
    run = train(name, instance_prompt=PROMPTS[0], max_train_steps=2, checkpointing_steps=1, **settings)
    first, second = (trained(run, step) for step in (1, 2))
    rows = [key for key in second if key.startswith("tokens.")]
    assert len(rows) == len(FAMILIES[name].TOKEN_KEYS)
    assert all(not torch.equal(first[key], second[key]) for key in rows)
    written = load_file(run / "learned_embeds.safetensors")
    keys = {encoder: own or TOKEN for encoder, own in FAMILIES[name].TOKEN_KEYS.items()}
    assert all(torch.equal(written[own], second[f"tokens.{encoder}.rows"]) for encoder, own in keys.items())
    pipe = DiffusionPipeline.from_pretrained(base(name))
    before = family_of(pipe).encode_prompts(PROMPTS)
    ether.load(pipe, run)
    after = family_of(pipe).encode_prompts(PROMPTS)
    key = next(iter(before))
    assert not torch.equal(after[key][0], before[key][0])
    torch.testing.assert_close(after[key][1], before[key][1], rtol=0, atol=1e-6)
