"""The tokenizer of the world: a token a word, no text without tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from ether_diffusion.playground.build.vocabulary import (
    LENGTH,
    RARE_WORDS,
    byte_letters,
    learn_merges,
    world_tokenizer,
    world_words,
)
from ether_diffusion.playground.world import BACKGROUNDS, COLOURS, KINDS, SUBJECTS, background_phrase, subject


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return world_tokenizer()


def test_every_word_is_one_token_of_its_own(tokenizer: CLIPTokenizer) -> None:
    words = [*world_words(), *RARE_WORDS]
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(tokens) == 1 for tokens in ids)
    assert len({tokens[0] for tokens in ids}) == len(words)
    assert {*COLOURS, *KINDS} <= set(words)


def test_no_word_of_any_subject_prompt_or_background_is_missing(tokenizer: CLIPTokenizer) -> None:
    texts = [background_phrase(background) for background in BACKGROUNDS]
    texts += [prompt.format(token="sks") for name in SUBJECTS for prompt in subject(name).prompts]
    for text in texts:
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(re.findall(r"[a-z]+|[^a-z\s]", text))


@pytest.mark.parametrize("text", ["a photo of a red robot on a beach", "a sks tree, in front of a pink brick wall"])
def test_text_comes_back(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip().replace(" ,", ",") == text


def test_foreign_text_falls_into_pieces_and_never_ends_early(tokenizer: CLIPTokenizer) -> None:
    for word in ("xylophone", "robots", "Zürich", "日本"):
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        assert tokenizer.eos_token_id not in tokens
        assert tokenizer.decode(tokens).strip() == word.lower()
    assert len(tokenizer("xylophone", add_special_tokens=False).input_ids) > 1


def test_prompts_are_padded_to_the_length_of_the_model(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.model_max_length == LENGTH
    ids = tokenizer("a ball", padding="max_length").input_ids
    assert len(ids) == LENGTH
    assert ids.index(tokenizer.eos_token_id) == 3


def test_merges_do_not_break_overlapping_words() -> None:
    """With merges word by word, "red" would claim the "re" inside "tree"."""
    merges = learn_merges(["red", "tree", "reed", "treed"])
    joined = {a + b for a, b in merges}
    assert {"red</w>", "tree</w>", "reed</w>", "treed</w>"} <= joined


def test_the_byte_letters_are_those_of_clip() -> None:
    letters = byte_letters()
    assert len(set(letters)) == 256
    assert letters[:2] == ["!", '"']
    assert letters[-1] == "Ń"


def test_saved_and_loaded_it_is_the_same(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a picture of a small green and pink striped box with a purple hat in the snow"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.model_max_length == LENGTH
