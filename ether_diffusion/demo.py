"""The main job from end to end on a laptop: draw a subject, learn it, load the result, score it.

``python -m ether_diffusion.demo FOLDER`` needs neither the Hub nor a GPU: the base and its judges are the playground's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ether_diffusion import playground
from ether_diffusion.metrics.judges import load_judges
from ether_diffusion.playground.same_image import same_image
from ether_diffusion.playground.world import write_subject
from ether_diffusion.runs.scores import score_run

SUBJECT = "striped-robot"
CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def train(folder: Path, config: Path) -> Path:
    """Run ``accelerate launch train_dreambooth.py`` on the drawn subject; return the run folder."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--num_cpu_threads_per_process", str(os.cpu_count()), str(root / "train_dreambooth.py")]
    command += ["--config", str(config), "--instance_data_dir", str(folder / "subject")]
    command += ["--output_dir", str(folder / "run"), "--overwrite"]
    subprocess.run(command, check=True)
    return folder / "run"


def main() -> None:
    """Run the demo in the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=CONFIG)
    arguments = parser.parse_args()
    write_subject(SUBJECT, arguments.folder / "subject")
    run = train(arguments.folder, arguments.config)
    scores = score_run(run, load_judges(playground.NAME, playground.NAME))
    for metric, row in scores.items():
        print(f"{metric:26} base {row['base']:.3f}, finetuned {row['finetuned']:.3f}")
    same = same_image(playground.BASE, run)
    print(f"loaded into a fresh pipeline, the same sample bit for bit: {'yes' if same else 'NO'}")
    print(f"report: {(run / 'report.html').resolve()}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
