"""Prompts beyond CLIP's 77 tokens in chunks, held against rules written out here, and against another library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build, clip_tokenizer
from torch import Tensor, nn

from ether_diffusion.families.cut_prompts import cut_remarks
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import FamilySettings

CLIPS = ("sd", "sdxl")
SHORT = "a red dog"


def words(number: int) -> str:
    """So many words, each a token of the tiny tokenizers."""
    return " ".join("abcdefghijklmnopqrstuvwxyz"[at % 26] for at in range(number))


LONG = words(189)
"""Three chunks."""


def family_with(pipe: DiffusionPipeline, chunks: int) -> Family:
    return family_of(pipe, FamilySettings(prompt_chunks=chunks))


def with_other_padding(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Tokenizers that pad with a token other than the end, as those of SD 2 and of SDXL's second encoder."""
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(pipe, name):
            getattr(pipe, name).pad_token = "!"
    return pipe


def framed(tokenizer: Any, prompt: str, chunks: int) -> list[list[int]]:
    """Chunks by their description: one token after another, a new chunk where one is full."""
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: list[list[int]] = [[]]
    for token in tokenizer(prompt).input_ids[1:-1]:
        if len(rows[-1]) == 75:
            rows.append([])
        rows[-1].append(token)
    rows += [[] for _ in range(chunks - len(rows))]
    return [[begin, *row, end, *[pad] * (75 - len(row))] for row in rows[:chunks]]


def hidden(encoder: nn.Module, ids: list[int], layer: int) -> Tensor:
    """The states of a layer for one row of tokens, the last one with the final norm."""
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    states: Tensor = output.last_hidden_state[0] if layer == -1 else output.hidden_states[layer][0]
    return states


def expected(pipe: DiffusionPipeline, prompt: str, chunks: int) -> dict[str, Tensor]:
    """prompt_embeds, and of SDXL pooled_prompt_embeds, by the rule of the web UI, row by row."""
    rows = framed(pipe.tokenizer, prompt, chunks)
    if not hasattr(pipe, "tokenizer_2"):
        return {"prompt_embeds": torch.cat([hidden(pipe.text_encoder, row, -1) for row in rows])}
    second = framed(pipe.tokenizer_2, prompt, chunks)
    one = torch.cat([hidden(pipe.text_encoder, row, -2) for row in rows])
    two = torch.cat([hidden(pipe.text_encoder_2, row, -2) for row in second])
    at_end = hidden(pipe.text_encoder_2, second[0], -1)[second[0].index(pipe.tokenizer_2.eos_token_id)]
    return {
        "prompt_embeds": torch.cat([one, two], -1),
        "pooled_prompt_embeds": pipe.text_encoder_2.text_projection(at_end),
    }


@pytest.mark.parametrize("padding", ["end", "!"])
@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_each_chunk_is_encoded_by_itself_between_begin_and_end(name: str, chunks: int, padding: str) -> None:
    pipe = build(name) if padding == "end" else with_other_padding(build(name))
    family = family_with(pipe, chunks)
    for prompt in (LONG, SHORT, "", words(75), words(76)):
        found = family.encode_prompt(prompt)
        if name == "sdxl" and not prompt:  # what guidance leads away from is zeros there
            assert not any(value.any() for value in found.values())
            continue
        torch.testing.assert_close(found, expected(pipe, prompt, chunks), atol=1e-6, rtol=1e-6)
        assert found["prompt_embeds"].shape[0] == 77 * chunks


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_one_chunk_is_what_the_pipeline_encodes(name: str) -> None:
    """The rule itself, with one chunk, where nothing is cut: so a second chunk is all that is added."""
    pipe = with_other_padding(build(name))
    one, two = family_with(pipe, 1), family_with(pipe, 2)
    for prompt in (SHORT, words(75)):
        own = one.encode_prompt(prompt)
        torch.testing.assert_close(own, expected(pipe, prompt, 1), atol=1e-6, rtol=1e-6)
        more = two.encode_prompt(prompt)
        torch.testing.assert_close(more.pop("prompt_embeds")[:77], own.pop("prompt_embeds"), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(more, own, atol=1e-6, rtol=1e-6)  # the pooled one is the first chunk's


@torch.no_grad()
def test_an_encoder_that_masks_padding_masks_it_in_every_chunk() -> None:
    pipe = build("sd")
    plain = family_with(pipe, 2).encode_prompt(words(80))["prompt_embeds"]
    pipe.text_encoder.config.use_attention_mask = True
    masked = family_with(pipe, 2).encode_prompt(words(80))["prompt_embeds"]
    first = family_with(pipe, 1).encode_prompt(words(75))["prompt_embeds"]
    second = family_with(pipe, 1).encode_prompt(words(80).removeprefix(words(75)).strip())["prompt_embeds"]
    torch.testing.assert_close(masked, torch.cat([first, second]), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(masked, plain, atol=1e-4)


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_a_word_of_textual_inversion_is_all_its_vectors(name: str) -> None:
    """diffusers names them <dog>, <dog>_1, …; they count, and may lie on both sides of a border."""
    pipe = build(name)
    for encoder, tokenizer in family_of(pipe).tokenizers.items():
        tokenizer.add_tokens(["<dog>", "<dog>_1", "<dog>_2"])
        getattr(pipe, encoder).resize_token_embeddings(len(tokenizer))
    family = family_with(pipe, 2)
    found = family.encode_prompt(f"{words(74)} <dog> a")
    torch.testing.assert_close(found, expected(pipe, f"{words(74)} <dog> <dog>_1 <dog>_2 a", 2), atol=1e-6, rtol=1e-6)
    assert family.chunks_needed([f"{words(72)} <dog>"]) == 1
    assert family.chunks_needed([f"{words(73)} <dog>"]) == 2
    assert set(family_with(pipe, 1).cut(f"{words(73)} <dog>").values()) == {"<dog>_2"}


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_a_prompts_chunks_do_not_depend_on_its_neighbours(name: str) -> None:
    family = family_with(build(name), 3)
    prompts = [SHORT, LONG, ""]
    together = family.encode_prompts(prompts)
    alone = family.batch_prompts([family.encode_prompt(prompt) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CLIPS)
def test_gradients_reach_the_text_encoder_through_every_chunk(name: str) -> None:
    pipe = build(name)
    family = family_with(pipe, 2)
    weight = pipe.text_encoder.get_input_embeddings().weight
    (first, second) = pipe.tokenizer(["a", "z"], add_special_tokens=False).input_ids
    embeds = family.encode_prompts([" ".join(["a"] * 75 + ["z"])])["prompt_embeds"]
    embeds[:, 77:].square().sum().backward(retain_graph=True)
    assert weight.grad is not None
    assert weight.grad[second].any()
    assert not weight.grad[first].any()
    embeds[:, :77].square().sum().backward()
    assert weight.grad[first].any()


@pytest.mark.parametrize("name", CLIPS)
def test_as_many_chunks_are_needed_as_the_longest_prompt_has(name: str) -> None:
    family = family_with(build(name), 1)
    needed = [family.chunks_needed([SHORT, words(length)]) for length in (0, 1, 75, 76, 150, 151)]
    assert needed == [1, 1, 1, 2, 2, 3]
    assert family.chunks_needed([]) == 1


def test_of_two_tokenizers_the_one_that_needs_more_counts() -> None:
    pipe = build("sdxl")
    pipe.tokenizer_2 = clip_tokenizer()
    pipe.tokenizer_2.add_tokens(["longword"])
    prompt = " ".join(["longword"] * 40)
    assert family_with(pipe, 1).chunks_needed([prompt]) == -(-40 * 8 // 75)


@pytest.mark.parametrize("name", CLIPS)
def test_what_no_chunk_holds_is_told_and_counts_for_nothing(name: str) -> None:
    for chunks in (1, 2):
        family = family_with(build(name), chunks)
        held, number = words(75 * chunks), len(family.text_encoders)
        assert list(family.cut(LONG).values()) == [LONG.removeprefix(held).strip()] * number
        assert family.cut(held) == {}
        assert family.prompt_key(LONG) == family.prompt_key(held)
        assert family.prompt_key(LONG) != family.prompt_key(words(75 * chunks - 1))


def test_a_remark_names_the_first_prompts_that_are_cut_and_counts_the_rest() -> None:
    family = family_with(build("sdxl"), 1)
    prompts = [f"{words(75)} {last}" for last in "vwxyz"]
    one, two = cut_remarks(family, [*prompts, SHORT, *prompts])
    assert one.startswith("text_encoder sees only the beginning of 5 of 6 prompts: ")
    assert two.startswith("text_encoder_2 sees only the beginning of 5 of 6 prompts: ")
    assert one.count("it does not see") == 3
    assert f'of "{prompts[2]}" it does not see "x"; …' in one
    assert cut_remarks(family_with(build("sdxl"), 2), prompts) == []


def test_stored_encodings_of_another_number_of_chunks_are_others() -> None:
    pipe = build("sd")
    keys = {str(family_with(pipe, chunks).prompt_key(SHORT)) for chunks in (1, 2, 3)}
    assert len(keys) == 3


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_a_prompt_is_drawn_as_it_is_encoded(name: str, chunks: int) -> None:
    """Whether it is encoded before, one by one, or in drawing; both branches of guidance have as many chunks."""
    pipe = build(name)
    family = family_with(pipe, chunks)
    prompts = [SHORT, LONG]
    asked = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}
    dice = lambda: [torch.Generator().manual_seed(seed) for seed in (0, 1)]  # noqa: E731
    drawn = pipe(**family.drawing(prompts, 2.0), **asked, generator=dice()).images
    encoded = family.batch_for_drawing([family.encode_for_drawing([prompt]) for prompt in prompts])
    assert {value.shape[1] for key, value in encoded.items() if "pooled" not in key} == {77 * chunks}
    torch.testing.assert_close(
        pipe(**family.drawing(prompts, 2.0, encoded), **asked, generator=dice()).images, drawn, atol=1e-5, rtol=1e-5
    )
    by_hand = {
        key: torch.stack([expected(pipe, each, chunks)[key] for each in prompts]) for key in expected(pipe, "", 1)
    }
    blank = {key: torch.stack([value] * 2) for key, value in expected(pipe, "", chunks).items()}
    if name == "sdxl":
        blank = {key: torch.zeros_like(value) for key, value in blank.items()}
    by_hand |= {f"negative_{key}": value for key, value in blank.items()}
    again = pipe(**by_hand, guidance_scale=2.0, **asked, generator=dice()).images
    torch.testing.assert_close(again, drawn, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_blank_prompts_have_the_shapes_of_chunks(name: str) -> None:
    family = family_with(build(name), 3)
    blank, long = family.blank_prompts(2), family.encode_prompts([LONG] * 2)
    assert {key: value.shape for key, value in blank.items()} == {key: value.shape for key, value in long.items()}


@pytest.mark.parametrize("name", ["sd3", "flux", "hidream"])
def test_what_an_encoder_of_several_does_not_see_is_told_by_its_name(name: str) -> None:
    """CLIP sees 77 tokens, or of HiDream's long one 218 at most; the others as many as the setting says."""
    for asked in (100, 300):
        family = family_of(build(name), FamilySettings(max_sequence_length=asked))
        prompt = words(400)
        rest = family.cut(prompt)
        assert set(rest) == set(family.text_encoders)
        clip = min(asked, 218) if name == "hidream" else 77
        last = "text_encoder_2" if name == "flux" else "text_encoder_3"
        assert rest["text_encoder"] == prompt.removeprefix(words(clip - 2)).strip()
        seen = prompt.removesuffix(rest[last]).strip()
        assert last not in family.cut(seen)
        assert last in family.cut(f"{seen} a")
        assert family.cut(words(40)) == {}


@pytest.mark.parametrize("name", ["sd3", "flux", "hidream"])
@torch.no_grad()
def test_beside_clip_the_other_encoders_see_long_prompts_whole(name: str) -> None:
    """What is said after CLIP's last token reaches the denoiser through T5 (and Llama); the pooled one is CLIP's."""
    family = family_of(build(name), FamilySettings(max_sequence_length=300))
    start = words(140 if name != "hidream" else 110)
    one, other = (family.encode_prompt(f"{start} {last}") for last in "xy")
    assert set(family.cut(f"{start} x")) <= {"text_encoder", "text_encoder_2"}
    embeds = [key for key in one if "pooled" not in key]
    assert all(not torch.allclose(one[key], other[key], atol=1e-4) for key in embeds)
    if name != "hidream":  # whose CLIP sees 218
        assert torch.equal(one["pooled_prompt_embeds"], other["pooled_prompt_embeds"])


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_compel_encodes_the_same(name: str) -> None:
    """Another library's chunks of fixed length; compel splits at the ends of sentences unless it is told not to."""
    compel = pytest.importorskip("compel")
    from compel.embeddings_provider import SplitLongTextMode

    pipe, xl = build(name), name == "sdxl"
    kinds = compel.ReturnedEmbeddingsType
    other = compel.Compel(
        tokenizer=[pipe.tokenizer, pipe.tokenizer_2] if xl else pipe.tokenizer,
        text_encoder=[pipe.text_encoder, pipe.text_encoder_2] if xl else pipe.text_encoder,
        returned_embeddings_type=(
            kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if xl else kinds.LAST_HIDDEN_STATES_NORMALIZED
        ),
        requires_pooled=[False, True] if xl else False,
        truncate_long_prompts=False,
        split_long_text_mode=SplitLongTextMode.BRUTAL,
    )
    found = family_with(pipe, 3).encode_for_drawing([LONG], [SHORT])
    theirs = [other([prompt]) if xl else (other([prompt]),) for prompt in (LONG, SHORT, "")]
    said, away, empty = (each[0] for each in theirs)
    assert [each.shape[1] for each in (said, away, empty)] == [3 * 77, 77, 77]
    torch.testing.assert_close(found["prompt_embeds"], said, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        found["negative_prompt_embeds"], torch.cat([away, empty, empty], 1), atol=1e-6, rtol=1e-6
    )
    if xl:
        torch.testing.assert_close(found["pooled_prompt_embeds"], theirs[0][1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found["negative_pooled_prompt_embeds"], theirs[1][1], atol=1e-6, rtol=1e-6)
    else:
        padded = other.pad_conditioning_tensors_to_same_length([said, away])[1]
        torch.testing.assert_close(found["negative_prompt_embeds"], padded, atol=1e-6, rtol=1e-6)
