from __future__ import annotations

import hashlib

import pytest
import torch

from ether_diffusion.data.randomness import generator


def draw(seed: int, *key: int | str) -> list[int]:
    return torch.randint(2**31, (4,), generator=generator(seed, *key)).tolist()


def test_same_key_gives_the_same_draws_whatever_was_drawn_before() -> None:
    expected = draw(7, "noise", 3)
    torch.rand(100)
    draw(7, "noise", 2)
    assert draw(7, "noise", 3) == expected


def test_stream_is_that_of_the_documented_hash() -> None:
    seed = int.from_bytes(hashlib.sha256(b'[7, "noise", 3]').digest()[:4], "little")
    expected = torch.randint(2**31, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert draw(7, "noise", 3) == expected


def test_different_keys_give_different_draws() -> None:
    keys: list[tuple[int, *tuple[int | str, ...]]] = [
        (0,),
        (1,),
        (0, 0),
        (0, "0"),
        (0, 1, 2),
        (0, 12),
        (0, "1", "2"),
        (0, "12"),
    ]
    streams = {tuple(draw(*key)) for key in keys}
    assert len(streams) == len(keys)


def test_counters_give_independent_uniforms() -> None:
    values = torch.stack([torch.rand(2, generator=generator(0, "u", counter)) for counter in range(4000)])
    # 4 standard errors of the mean of 4000 uniforms, and of the correlation of neighbours
    assert (values.mean(0) - 0.5).abs().max() < 4 * (1 / 12 / 4000) ** 0.5
    assert torch.corrcoef(torch.stack([values[:-1, 0], values[1:, 0]]))[0, 1].abs() < 4 / 4000**0.5


def test_key_that_is_neither_number_nor_text_is_refused() -> None:
    with pytest.raises(TypeError):
        generator(0, object())  # type: ignore[arg-type]
