"""The examples as modules, and tiny models of their classes with a tokenizer of whole words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[2]
SENTENCE = "a the film was is good bad very not so . : what colour has sky grass snow Request Text Response"
WORDS = (*SENTENCE.split(), "blue", "green", "white", "say", "it")
Writer = Callable[[str, list[dict[str, object]]], Path]


@pytest.fixture(autouse=True)
def _path_and_rng(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT / "examples")
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Write records as JSON lines."""

    def lines(name: str, records: list[dict[str, object]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return lines


def save_tokenizer(folder: Path) -> int:
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>", model_max_length=64
    )
    fast.save_pretrained(folder)
    return len(words)


@pytest.fixture
def deberta_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "deberta"
    words = save_tokenizer(folder)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, type_vocab_size=0, pooler_hidden_size=32, position_biased_input=False,
        relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], initializer_range=0.2,
    )  # fmt: skip
    DebertaV2Model(config).save_pretrained(folder)  # as the real one, without a head
    return folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    words = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
