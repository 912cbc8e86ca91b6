"""The benchmark and the studies that train: their settings, from a recipe and the command line, and what they print."""

from __future__ import annotations

from collections.abc import Sequence

from ether_diffusion.evaluation.controls.settings import ControlStudyConfig
from ether_diffusion.evaluation.mixing.settings import MixingConfig
from ether_diffusion.evaluation.paper.settings import BlocksConfig, EnergyConfig, RatesConfig
from ether_diffusion.evaluation.subjects.settings import BenchmarkConfig, ChoosingConfig
from ether_diffusion.first_imports import first_imports
from ether_diffusion.logs import show_study_logs
from ether_diffusion.training.cli import parse_config

OTHERS = "other processes have jobs left; the last one to finish"


def bench(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and score: this process's share of the jobs, then the summary of all that are done.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    show_study_logs()
    config = parse_config(BenchmarkConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.subjects.benchmark import run_benchmark
    run_benchmark(config)


def learning_rates(arguments: Sequence[str] | None = None) -> None:
    """The benchmark, unless it is done, and the study of its results over the learning rate.

    Raises:
        SystemExit: a setting is impossible, jobs failed, or there is nothing to compare.
    """
    show_study_logs()
    config = parse_config(RatesConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.paper.learning_rates import rate_tables
        from ether_diffusion.evaluation.subjects.benchmark import run_benchmark
    if not run_benchmark(config):
        print(f"{OTHERS} makes the figure")
        return
    try:
        for table in rate_tables(config):
            print(table)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"figure: {config.output_dir / 'learning_rates.png'}")


def block_count(arguments: Sequence[str] | None = None) -> None:
    """The benchmark, unless it is done, then the costs, and the study of both over the number of blocks.

    Raises:
        SystemExit: an arm is none of this library's methods, a setting is impossible, or jobs failed.
    """
    show_study_logs()
    config = parse_config(BlocksConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.paper.blocks import study_blocks
        from ether_diffusion.evaluation.subjects.benchmark import run_benchmark
    if not run_benchmark(config):
        print(f"{OTHERS} measures the costs")
        return
    print(study_blocks(config))
    print(f"figure: {config.output_dir / 'blocks.png'}")


def chosen_step(arguments: Sequence[str] | None = None) -> None:
    """Train, draw the last and the chosen step, score; then the planned comparisons.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    show_study_logs()
    config = parse_config(ChoosingConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.runner import run_study
        from ether_diffusion.evaluation.subjects.choosing import ChoosingBench
    run_study(lambda device: ChoosingBench.load(config, device), config.shard)


def energy_intervention(arguments: Sequence[str] | None = None) -> None:
    """Train, draw as learnt and changed, score; then the planned comparisons.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    show_study_logs()
    config = parse_config(EnergyConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.paper.intervention import EnergyBench
        from ether_diffusion.evaluation.runner import run_study
    run_study(lambda device: EnergyBench.load(config, device), config.shard)


def two_adapters(arguments: Sequence[str] | None = None) -> None:
    """Train each subject of the pairs, draw both in one picture, score; then the planned comparisons.

    Raises:
        SystemExit: a setting is impossible, or jobs failed.
    """
    show_study_logs()
    config = parse_config(MixingConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.mixing.study import Mixing
        from ether_diffusion.evaluation.runner import run_study
    run_study(lambda device: Mixing.load(config, device), config.shard)


def controls(arguments: Sequence[str] | None = None) -> None:
    """Train control, draw and score on the way: this process's share of the jobs, then table and figure of all.

    Raises:
        SystemExit: a setting is impossible, a judge is missing, a signal came, or jobs failed.
    """
    show_study_logs()
    config = parse_config(ControlStudyConfig, arguments)
    with first_imports():
        from ether_diffusion.evaluation.controls.study import ControlStudy
        from ether_diffusion.evaluation.runner import run_study
    run_study(lambda device: ControlStudy(config, device), config.shard)
