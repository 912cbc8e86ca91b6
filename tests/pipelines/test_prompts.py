"""The public verb that encodes prompts for a pipeline in chunks."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build

import ether_diffusion as ether
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import FamilySettings

LONG = " ".join("abcdefghij" * 9)
"""Two chunks of the tiny bases' tokens."""
CLIPS = pytest.mark.parametrize("name", ["sd", "sdxl"])


@CLIPS
@torch.no_grad()
def test_prompts_are_encoded_as_in_training(name: str) -> None:
    pipe = build(name)
    for chunks in (1, 2, 3):
        family = family_of(pipe, FamilySettings(prompt_chunks=chunks))
        found = ether.encode_prompts(pipe, ["a dog", "a cat on a mat"], chunks=chunks)
        expected = family.encode_prompts(["a dog", "a cat on a mat"])
        assert torch.equal(found["prompt_embeds"], expected["prompt_embeds"])
        assert torch.equal(found["negative_prompt_embeds"], family.encode_prompts(["", ""])["prompt_embeds"])
        if name == "sdxl":
            assert torch.equal(found["pooled_prompt_embeds"], expected["pooled_prompt_embeds"])
            assert not found["negative_pooled_prompt_embeds"].any()


@CLIPS
def test_without_a_number_as_many_chunks_as_the_longest_needs(name: str) -> None:
    pipe = build(name)
    assert ether.encode_prompts(pipe, "a dog")["prompt_embeds"].shape[:2] == (1, 77)
    assert ether.encode_prompts(pipe, ["a dog", LONG])["prompt_embeds"].shape[:2] == (2, 154)
    found = ether.encode_prompts(pipe, ["a dog", "a cat"], LONG)
    assert found["prompt_embeds"].shape == found["negative_prompt_embeds"].shape
    assert found["prompt_embeds"].shape[:2] == (2, 154)


@CLIPS
@torch.no_grad()
def test_with_one_chunk_it_is_the_pipelines_own(name: str) -> None:
    pipe = build(name)
    asked = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    for away in (None, "blurred"):
        expected = pipe("a dog", negative_prompt=away, **asked, generator=torch.Generator().manual_seed(0)).images
        given = ether.encode_prompts(pipe, "a dog", away)
        found = pipe(**given, **asked, generator=torch.Generator().manual_seed(0)).images
        assert torch.equal(found, expected)


@CLIPS
@torch.no_grad()
def test_an_empty_negative_prompt_that_is_given_is_encoded(name: str) -> None:
    """As the pipelines do it: SDXL has zeros only where none is given."""
    pipe = build(name)
    given = ether.encode_prompts(pipe, "a dog", "", chunks=2)
    one = ether.encode_prompts(pipe, "a dog", "", chunks=1)
    assert given["negative_prompt_embeds"].any()
    torch.testing.assert_close(
        given["negative_prompt_embeds"], one["negative_prompt_embeds"].repeat(1, 2, 1), atol=1e-6, rtol=1e-6
    )


def test_an_adapter_of_the_text_encoder_acts_on_every_chunk() -> None:
    pipe = build("sd")
    before = ether.encode_prompts(pipe, LONG)["prompt_embeds"]
    adapter = ether.attach(pipe.text_encoder, ether.EtherConfig(seed=1))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    after = ether.encode_prompts(pipe, LONG)["prompt_embeds"]
    assert not torch.allclose(after[:, :77], before[:, :77], atol=1e-3)
    assert not torch.allclose(after[:, 77:], before[:, 77:], atol=1e-3)


def test_what_is_cut_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = build("sd")
    ether.encode_prompts(pipe, LONG, chunks=1)
    assert 'it does not see "f g h i j a b c d e f g h i j"' in caplog.text
    caplog.clear()
    ether.encode_prompts(pipe, LONG)
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompts", "away", "chunks", "message"),
    [
        ([], None, None, "there is no prompt"),
        (["a", "b"], ["c"], None, "2 prompts and 1 negative prompts"),
        ("a", None, 0, "prompt_chunks must be from 1 to 64, not 0"),
        ("a", None, 65, "prompt_chunks must be from 1 to 64, not 65"),
    ],
)
def test_what_cannot_be_encoded(
    prompts: str | list[str], away: list[str] | None, chunks: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ether.encode_prompts(build("sd"), prompts, away, chunks=chunks)


@CLIPS
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_other_pipelines_over_the_same_base_take_them_as_well(name: str, kind: str) -> None:
    pipe = build(name)
    expected = ether.encode_prompts(pipe, LONG, "a cat")
    found = getattr(diffusers, f"StableDiffusion{'XL' if name == 'sdxl' else ''}{kind}Pipeline")
    settings = {} if name == "sdxl" else {"requires_safety_checker": False}
    other = found(**pipe.components, **settings)
    torch.testing.assert_close(ether.encode_prompts(other, LONG, "a cat"), expected)
    short = ether.encode_prompts(other, "a dog", chunks=1)
    torch.testing.assert_close(short, ether.encode_prompts(pipe, "a dog", chunks=1))


def test_families_that_take_long_prompts_themselves_say_so() -> None:
    with pytest.raises(
        ValueError, match=r"FLUX\.1 takes long ones by itself: give its pipeline prompt= and max_sequence_length="
    ):
        ether.encode_prompts(build("flux"), "a dog")


def test_an_offloaded_text_encoder_is_given_its_input_where_it_computes() -> None:
    """The weights of a sequentially offloaded encoder are on no device between its calls."""
    from accelerate import cpu_offload

    pipe: DiffusionPipeline = build("sdxl")
    expected = ether.encode_prompts(pipe, LONG)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        cpu_offload(encoder, torch.device("cpu"))
    assert next(pipe.text_encoder.parameters()).device.type == "meta"
    torch.testing.assert_close(ether.encode_prompts(pipe, LONG), expected)
