"""What a launcher may be configured for and nothing here trains under: the model's weights in shards."""

from __future__ import annotations

from collections.abc import Mapping

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""By which variables ``accelerate launch`` says what shards the model."""


def sharded_by_environment(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """The variable that ``accelerate launch`` has set and what it stands for; None where nothing shards."""
    for variable, name in SHARDED.items():
        if environment.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t"):
            return variable, name
    return None


def sharded_by_config(distributed_type: str) -> str | None:
    """What a ``distributed_type`` of Accelerate's config file stands for; None where it does not shard."""
    kinds = {name.upper().replace("-", "_"): name for name in SHARDED.values()}
    return kinds.get(distributed_type.upper())
