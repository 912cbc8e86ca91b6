"""The groups in which ``--help`` lists the settings of the training programs, and which of them most people need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Some settings under one heading.

    Attributes:
        common: those that most people need, which the short help shows.
        more: the others.
    """

    common: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def __add__(self, other: Group) -> Group:
        return Group(self.common + other.common, self.more + other.more)

    def __iter__(self) -> Iterator[str]:
        return iter(self.common + self.more)


Groups = Mapping[str, Group]
"""Groups by their headings, in the order of the help."""

COMMON: Groups = {
    "required": Group(("pretrained_model_name_or_path", "output_dir")),
    "data": Group(("resolution",), ("cache_dir",)),
    "model": Group(
        (), ("base_config", "revision", "variant", "training_adapter", "max_sequence_length", "prompt_chunks")
    ),
    "adapter": Group(
        ("method", "n_blocks", "targets"), ("two_sided", "initial_length", "rank", "peft_config", "train_text_encoder")
    ),
    "optimisation": Group(
        ("max_train_steps", "learning_rate", "train_batch_size", "gradient_accumulation_steps", "seed"),
        (
            *("text_encoder_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "lr_step_rules"),
            *("optimizer", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"),
            *("ema_decay", "snr_gamma", "noise_offset", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
            "guidance_scale_training",
        ),
    ),
    "saving": Group(
        ("checkpointing_steps", "resume", "overwrite", "export_lora"),
        ("checkpoints_total_limit", "report_to", "push_to_hub", "hub_private", "hub_model_id"),
    ),
    "validation": Group(
        ("validation_prompt", "validation_steps", "num_validation_images"),
        ("validation_seed", "num_inference_steps", "guidance_scale", "sampler"),
    ),
    "hardware": Group(
        ("mixed_precision", "gradient_checkpointing", "base_quantization", "dry_run"),
        ("allow_tf32", "torch_compile", "dataloader_num_workers"),
    ),
    "messages": Group(("quiet",), ("log_level",)),
}
"""What every training program has."""


def with_own(own: Groups) -> Groups:
    """The common groups with a program's own settings at their ends, and its own groups after them."""
    shared = {heading: group + own.get(heading, Group()) for heading, group in COMMON.items()}
    return shared | {heading: group for heading, group in own.items() if heading not in shared}


DREAMBOOTH: Groups = with_own(
    {
        "required": Group(("instance_data_dir", "instance_prompt")),
        "data": Group(
            ("aspect_ratio_buckets", "random_flip", "with_prior_preservation", "class_prompt"),
            (
                *("subjects_dir", "nested_folders", "caption_column", "caption_prefix", "shuffle_tags", "keep_tags"),
                *("tag_orders", "class_data_dir", "num_class_images", "prior_loss_weight", "sample_batch_size"),
                "center_crop",
            ),
        ),
        "new token": Group(("placeholder_token", "initializer_token"), ("num_vectors", "token_lr", "token_steps")),
        "validation": Group(("dino", "clip"), ("early_stopping", "validation_data_dir")),
    }
)
CONTROL: Groups = with_own(
    {
        "required": Group(("train_data_dir",)),
        "data": Group(
            ("dataset_name", "condition", "random_flip"),
            (
                *("segmenter", "canny_low", "canny_high", "image_column", "conditioning_image_column"),
                *("caption_column", "allow_outside_paths", "proportion_empty_prompts", "center_crop"),
            ),
        ),
        "model": Group(("control",), ("controlnet_model_name_or_path", "train_controlnet")),
        "optimisation": Group((), ("encoder_lr",)),
        "validation": Group((), ("validation_image", "num_validation_pairs")),
    }
)

UNITS: Mapping[str, str] = {
    "resolution": "PIXELS",
    "train_batch_size": "PICTURES",
    "gradient_accumulation_steps": "ROUNDS",
    "max_train_steps": "STEPS",
    "lr_warmup_steps": "STEPS",
    "lr_num_cycles": "CYCLES",
    "checkpointing_steps": "STEPS",
    "checkpoints_total_limit": "CHECKPOINTS",
    "validation_steps": "STEPS",
    "num_validation_images": "PICTURES",
    "num_inference_steps": "STEPS",
    "max_sequence_length": "TOKENS",
    "num_vectors": "VECTORS",
    "token_steps": "STEPS",
    "dataloader_num_workers": "PROCESSES",
    "num_class_images": "PICTURES",
    "sample_batch_size": "PICTURES",
    "keep_tags": "TAGS",
    "tag_orders": "ORDERS",
    "early_stopping": "SCORED_STEPS",
    "num_validation_pairs": "PAIRS",
}
"""What the numbers count; all others have no unit."""
