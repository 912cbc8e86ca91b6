"""Tune a model of the Llama class to instructions with ETHER, ETHER+, LoRA or in full.

    python examples/instruction.py --config examples/instruction.yaml
    python examples/instruction.py --config examples/instruction.yaml --method ether --count

The adapter acts on q_proj and v_proj: 262,144 trained numbers for ETHER and 1,048,576 for ETHER+ on Llama-2-7B. The
settings are those of the authors' published command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from datasets import load_dataset
from language_settings import (
    InputError,
    LanguageConfig,
    Model,
    Record,
    adapt,
    count_trained,
    load_pretrained,
    on_meta,
    one_line,
    read_records,
    run,
    save,
    training_arguments,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from ether_diffusion.ranges import Range
from ether_diffusion.training.cli import parse_config

HUB_DATA = "tatsu-lab/alpaca"
KINDS: dict[str, type] = {"instruction": str, "input": str, "output": str}
TARGETS = ("q_proj", "v_proj")
LLAMA_2_7B: dict[str, object] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
"""The architecture of ``meta-llama/Llama-2-7b-hf``, for counting without a download."""
IGNORED = -100
"""A label that the loss leaves out."""
Tokens = dict[str, list[int]]


@dataclass(kw_only=True)
class InstructionConfig(LanguageConfig):
    """Settings of a tuning to instructions.

    Attributes:
        dtype: of the frozen base. The vectors of ETHER and the factors of LoRA are fp32 in any case.
        train_on_prompts: count the loss on the words of the prompts as well.
        gradient_checkpointing: compute activations again instead of keeping them.
    """

    RANGES: ClassVar[dict[str, Range]] = LanguageConfig.RANGES

    model: str = "meta-llama/Llama-2-7b-hf"
    output_dir: Path = Path("runs/instruction")
    n_blocks: int = 32
    micro_batch_size: int | None = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    train_on_prompts: bool = False
    gradient_checkpointing: bool = False


def prompt_of(record: Record) -> str:
    """What stands before a response: the request and, if there is one, the text that it is about."""
    about = f"Text: {record['input']}\n" if record["input"] else ""
    return f"Request: {record['instruction']}\n{about}Response:\n"


def tokens_of(record: Record, tokenizer: PreTrainedTokenizerBase, config: InstructionConfig) -> Tokens | None:
    """Ids and labels of a record, at most ``max_length``; None if that leaves nothing to learn.

    The prompt and the response are cut into tokens apart, as they are when the model answers.
    """
    prompt: list[int] = tokenizer(prompt_of(record))["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    response: list[int] = tokenizer(record["output"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *response, tokenizer.eos_token_id][: config.max_length]
    hidden = 0 if config.train_on_prompts else min(len(prompt), len(ids))
    if hidden == len(ids):
        return None
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * hidden + ids[hidden:]}


def read_data(config: InstructionConfig) -> list[Record]:
    """The records, of a file or of the Hub.

    Raises:
        InputError: the file is not as it must be, or the Hub's data cannot be had.
    """
    if config.train_file is not None:
        return read_records(config.train_file, KINDS)
    try:
        return [{key: record[key] for key in KINDS} for record in load_dataset(HUB_DATA, split="train")]
    except OSError as error:
        raise InputError(f"{HUB_DATA} cannot be loaded: {one_line(error)}; give train_file") from error


def examples_of(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, config: InstructionConfig
) -> tuple[list[Tokens], int]:
    """What is trained on, and how many records have no response within ``max_length``.

    Raises:
        InputError: that holds for all of them.
    """
    found = [tokens for record in records if (tokens := tokens_of(record, tokenizer, config))]
    if not found:
        raise InputError(f"no record has a response within max_length {config.max_length}; give a larger one")
    return found, len(records) - len(found)


def count(config: InstructionConfig) -> int:
    """Trained numbers on Llama-2-7B."""
    model = on_meta(lambda: adapted(LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B)), config))
    return sum(count_trained(model))


def adapted(model: PreTrainedModel, config: InstructionConfig) -> Model:
    return adapt(model, config, TARGETS, "CAUSAL_LM")


def finetune(config: InstructionConfig) -> Model:
    """Train, save the adapter and ``results.json``; return the trained model.

    Raises:
        InputError: data, base or settings cannot be used.
    """
    set_seed(config.seed)
    records = read_data(config)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, config.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # it is masked, and never a label
    examples, dropped = examples_of(records, tokenizer, config)
    if dropped:
        print(f"{dropped:,} of {len(records):,} records have no response within {config.max_length} tokens: left out")
    base = load_pretrained(AutoModelForCausalLM.from_pretrained, config.model, dtype=config.dtype)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable()
    model = adapted(base, config)
    trained = sum(count_trained(model))
    print(f"{config.method}: {trained:,} trained numbers, {len(examples):,} records")

    trainer = Trainer(
        model=model,
        args=training_arguments(config),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        save(model, tokenizer, config, {"trained": trained, "left_out": dropped, "log": trainer.state.log_history})
        print(f"saved in {config.output_dir}")
    return model


def main() -> None:
    config = parse_config(InstructionConfig)
    if config.count:
        print(f"{config.method}: {count(config):,} trained numbers")
    else:
        finetune(config)


if __name__ == "__main__":
    run(main)
