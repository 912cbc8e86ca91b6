"""The scores against sums written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ether_diffusion.metrics.fidelity import (
    check_token,
    drift,
    pair_similarity,
    prompt_similarity,
    similarity_among,
    without_token,
)


def unit(rows: int, seed: int) -> Tensor:
    values = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values / values.norm(dim=-1, keepdim=True)


def cosine(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def test_all_pairs_are_compared() -> None:
    generated, references = unit(4, 1), unit(3, 2)
    found = pair_similarity(generated, references)
    for i, a in enumerate(generated):
        for j, b in enumerate(references):
            assert found[i, j].item() == pytest.approx(cosine(a, b), abs=1e-12)


def test_references_are_not_compared_with_themselves() -> None:
    references = unit(3, 3)
    pairs = [cosine(references[i], references[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert similarity_among(references) == pytest.approx(sum(pairs) / 3, abs=1e-12)
    with pytest.raises(ValueError, match="one image"):
        similarity_among(references[:1])


def test_prompts_are_compared_with_their_own_images() -> None:
    images, prompts = unit(4, 4), unit(4, 5)
    own = [cosine(a, b) for a, b in zip(images, prompts, strict=True)]
    assert prompt_similarity(images, prompts).tolist() == pytest.approx(own, abs=1e-12)


def test_drift_is_half_of_one_minus_the_cosine() -> None:
    images, base = unit(4, 6), unit(4, 7)
    moved = [(1 - cosine(a, b)) / 2 for a, b in zip(images, base, strict=True)]
    assert drift(images, base).tolist() == pytest.approx(moved, abs=1e-12)
    assert drift(images, images).tolist() == pytest.approx([0] * 4, abs=1e-12)
    assert drift(images, -images).tolist() == pytest.approx([1] * 4, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "bare"),
    [
        ("a photo of a qwe dog", "a photo of a dog"),
        ("qwe dog, qweens", "dog, qweens"),
        ("qwe, a dog", ", a dog"),
        ("a qwe's dog", "a 's dog"),
        ("a dog", "a dog"),
    ],
)
def test_only_the_whole_token_is_taken_out(prompt: str, bare: str) -> None:
    assert without_token(prompt, "qwe") == bare


def test_a_token_that_no_prompt_has_is_refused() -> None:
    prompts = ["a qwe dog", "a qwe's dog in snow", "a dog"]
    check_token("qwe", prompts)
    for wrong in ("sks", "qw", "qweens"):
        with pytest.raises(ValueError, match=f"no prompt has the word '{wrong}'"):
            check_token(wrong, prompts)
