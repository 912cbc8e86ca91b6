"""Supervised finetuning of a language model with ETHER+ in TRL's trainer.

    python examples/trl_sft.py --model Qwen/Qwen3-0.6B --data records.jsonl --output runs/sft

A record is {"prompt": …, "completion": …}; the loss is on completions. Needs ``pip install -e ".[trl]"``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from language_settings import load_pretrained, read_records, run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

import ether_diffusion.peft_tuner as tuner  # registers the type ETHER with PEFT

KINDS: dict[str, type] = {"prompt": str, "completion": str}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or Hub id of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="records as JSON lines")
    parser.add_argument("--output", type=Path, default=Path("runs/sft"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="that of the paper's instruction tuning")
    parser.add_argument("--variant", default="ether_plus", choices=("ether_plus", "ether"))
    parser.add_argument("--n_blocks", type=int, default=4)
    return parser.parse_args()


def make_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, options: argparse.Namespace
) -> SFTTrainer:
    """TRL's trainer of an adapter on the attention of a model; the vectors are fp32."""
    adapter = tuner.EtherPeftConfig(
        variant=options.variant, n_blocks=options.n_blocks, target_modules=TARGETS, task_type="CAUSAL_LM", seed=0
    )
    settings = SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=0.0,  # it would only shorten the vectors, which the forward normalises
        bf16=torch.cuda.is_available(),  # TRL's default is True on every device
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # on a quantised base TRL has cast them to bf16, where small steps are lost
            parameter.data = parameter.data.float()
    return trainer


def main() -> None:
    options = arguments()
    set_seed(0)
    records = read_records(options.data, KINDS)
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, options.model)
    model = load_pretrained(AutoModelForCausalLM.from_pretrained, options.model)
    trainer = make_trainer(model, tokenizer, Dataset.from_list(records), options)
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model(str(options.output))
    trainer.save_state()
    print(f"saved in {options.output}")


if __name__ == "__main__":
    run(main)
