"""Two processes over gloo train what one process trains with twice the batch, on flow families too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families.tiny import FLOW
from training.helpers import QUIET, draw_photo, relative_change, trained

TRIED = tuple(FLOW) if os.environ.get("ETHER_ALL_FAMILIES") else ("qwen_image",)
"""In the suite the one whose prompts are padded within a batch; all with ``ETHER_ALL_FAMILIES=1``."""
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PROGRAM = Path(__file__).resolve().parents[2] / "train_dreambooth.py"


@pytest.mark.parametrize("family", TRIED)
def test_two_processes_equal_one_with_twice_the_batch(
    family: str, train: Callable[..., Path], base: Callable[[str], Path], tmp_path: Path
) -> None:
    """To rounding; Adam's ε keeps it from blowing up the rounding of gradients near zero."""
    photos = tmp_path / "photos"
    for index, caption in enumerate(("a qwe dog", "a photo of qwe dog on a beach", "qwe")):
        draw_photo(photos / f"{index}.png", index, (96, 64))
        (photos / f"{index}.txt").write_text(caption)
    changes: dict[str, Any] = {
        "instance_data_dir": photos,
        "max_train_steps": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
    }
    one = train(family, "one", train_batch_size=2, **changes)
    settings = QUIET | changes | {"pretrained_model_name_or_path": base(family), "output_dir": tmp_path / "two"}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*LAUNCH, str(PROGRAM), *(f"--{name}={value}" for name, value in settings.items())]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert relative_change(trained(tmp_path / "two", 2), trained(one, 2)) < 1e-5
