"""Random transforms of growing distance, and the hyperspherical energy of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.arguments import Parser
from ether_diffusion.evaluation.paper.settings import DISTANCES, PERTURBED
from ether_diffusion.first_imports import first_imports
from ether_diffusion.metrics.asked import add_judges, judges_of
from ether_diffusion.ranges import AMOUNT, COUNT
from ether_diffusion.runs.base import Base


def perturbation(arguments: Sequence[str] | None = None) -> None:
    """Draw the base under random transforms, score, and write table and figures.

    Raises:
        SystemExit: the base or a judge cannot be loaded, or the blocks do not fit.
    """
    parser = Parser(
        description="Fig. 3: what random transforms of growing distance do to the base's images, without any training. "
        "ETHER's reflections are always at ‖H - I‖_F = 2 per block, ETHER+'s at most at √2; rotations and "
        "unconstrained blocks go as far as they are sent."
    )
    parser.add_argument("--base", default="playground", help="Hub id, folder or playground (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the base on the Hub")
    parser.add_argument("--variant", help="file variant of the base, such as fp16")
    parser.add_argument("--base_config", help="of a base in a single file: folder with its settings")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--images_per_prompt", type=COUNT.of(int), default=4)
    parser.add_argument("--methods", nargs="+", choices=PERTURBED, default=list(PERTURBED))
    parser.add_argument("--distances", nargs="+", type=AMOUNT.of(float), default=list(DISTANCES), help="per block")
    parser.add_argument("--n_blocks", type=COUNT.of(int), default=4)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=COUNT.of(int), default=8)
    parser.add_argument("--num_inference_steps", type=COUNT.of(int), default=25)
    parser.add_argument("--guidance_scale", type=AMOUNT.of(float), help="default: the base's own")
    add_judges(parser)
    given = parser.parse_args(arguments)
    with first_imports():
        from ether_diffusion.evaluation.paper.perturbation import study_base, write_study
    settings = {name: getattr(given, name) for name in ("batch_size", "num_inference_steps", "guidance_scale")}
    drawn, moved = (given.prompts, given.images_per_prompt), (given.methods, given.distances, given.n_blocks)
    try:
        judges = judges_of(given)
        base = Base(given.base, given.revision, given.variant, given.base_config)
        found = study_base(base, *drawn, judges, *moved, settings)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(write_study(given.output_dir, *found))
    print(f"figures: {given.output_dir / 'perturbation.png'}, {given.output_dir / 'perturbed.png'}")


def hyperspherical_energy(arguments: Sequence[str] | None = None) -> None:
    """Compute the change of the energy in runs, and write table and figure.

    Raises:
        SystemExit: a run or its base cannot be loaded.
    """
    parser = Parser(
        description="Fig. 7: how training changed the hyperspherical energy of every trained layer, by "
        "layer and in all."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of train_dreambooth.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    given = parser.parse_args(arguments)
    with first_imports():
        import torch

        from ether_diffusion.evaluation.paper.energy import study, write_study
    try:
        found = study(given.runs, "cuda" if torch.cuda.is_available() else "cpu")
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print(write_study(given.output_dir, found))
    print(f"figure: {given.output_dir / 'energy.png'}")
