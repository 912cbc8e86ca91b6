"""The verbs of ``ether``: one table. A new verb is one entry in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """A verb that runs a program.

    Attributes:
        name: the word on the command line.
        help: what it does, in one line.
        target: "module:function" of the program; it takes the rest of the command line. The module is imported when
            the verb is used.
        settings: "module:class" of its config, where it has one: its settings can be completed in a shell.
    """

    name: str
    help: str
    target: str
    settings: str | None = None


@dataclass(frozen=True)
class Group:
    """A verb with verbs below it.

    Attributes:
        name: the word on the command line.
        help: what it is for, in one line.
        sections: the verbs below it, by the heading under which its help lists them.
    """

    name: str
    help: str
    sections: Mapping[str, tuple[Program | Group, ...]]

    @property
    def verbs(self) -> dict[str, Program | Group]:
        """The verbs below it by name."""
        return {verb.name: verb for verbs in self.sections.values() for verb in verbs}


STUDY = Group(
    "study",
    "studies of methods, controls and scores",
    {
        "Many trainings": (
            Program(
                "lr_robustness",
                "quality against the learning rate",
                "ether_diffusion.cli.programs.studies:learning_rates",
                "ether_diffusion.evaluation.paper.settings:RatesConfig",
            ),
            Program(
                "block_count",
                "quality, time and memory against the number of blocks",
                "ether_diffusion.cli.programs.studies:block_count",
                "ether_diffusion.evaluation.paper.settings:BlocksConfig",
            ),
            Program(
                "chosen_step",
                "the step that each training chose beside its last one",
                "ether_diffusion.cli.programs.studies:chosen_step",
                "ether_diffusion.evaluation.subjects.settings:ChoosingConfig",
            ),
            Program(
                "energy_intervention",
                "Naive made to keep the hyperspherical energy",
                "ether_diffusion.cli.programs.studies:energy_intervention",
                "ether_diffusion.evaluation.paper.settings:EnergyConfig",
            ),
            Program(
                "two_adapters",
                "two subjects in one picture, by adapters that were trained apart",
                "ether_diffusion.cli.programs.studies:two_adapters",
                "ether_diffusion.evaluation.mixing.settings:MixingConfig",
            ),
            Program(
                "control_study",
                "control accuracy of several methods, scored while they train",
                "ether_diffusion.cli.programs.studies:controls",
                "ether_diffusion.evaluation.controls.settings:ControlStudyConfig",
            ),
        ),
        "Committed rows": (
            Program(
                "table",
                "all scores and settings of a benchmark in one small file",
                "ether_diffusion.cli.programs.rows:table",
            ),
            Program(
                "reproduce",
                "run rows of such a file again and say whether they agree",
                "ether_diffusion.cli.programs.rows:reproduce",
            ),
        ),
        "Pictures of a study": (
            Program(
                "sheet", "one picture of a benchmark to show around", "ether_diffusion.cli.programs.pictures:sheet"
            ),
        ),
        "Weights": (
            Program(
                "perturbation",
                "random transforms of growing distance",
                "ether_diffusion.cli.programs.weights:perturbation",
            ),
            Program(
                "hyperspherical_energy",
                "change of the hyperspherical energy in runs",
                "ether_diffusion.cli.programs.weights:hyperspherical_energy",
            ),
        ),
        "Pictures that exist": (
            Program(
                "subject_fidelity",
                "score pictures of a subject against its photos",
                "ether_diffusion.cli.programs.pictures:subject_fidelity",
            ),
            Program(
                "control_accuracy",
                "score pictures against maps, edges, depth or a face",
                "ether_diffusion.cli.programs.control_accuracy:main",
            ),
        ),
        "Statistics": (
            Program(
                "coverage",
                "how often intervals over few subjects hold the truth",
                "ether_diffusion.cli.programs.coverage:main",
            ),
        ),
    },
)

CONFIG = Group(
    "config",
    "the recipes of the package, which --config takes by name",
    {
        "Recipes": (
            Program("list", "names, bases and what each recipe is for", "ether_diffusion.cli.configs:list_main"),
            Program("show", "print a recipe", "ether_diffusion.cli.configs:show_main"),
            Program("copy", "copy a recipe to a file of your own", "ether_diffusion.cli.configs:copy_main"),
        ),
    },
)

ETHER = Group(
    "ether",
    "Finetune diffusion models with hyperplane reflections.",
    {
        "Training": (
            Program(
                "train",
                "teach a base a subject from a few photos",
                "ether_diffusion.training.launch:dreambooth",
                "ether_diffusion.training.dreambooth_config:DreamBoothConfig",
            ),
            Program(
                "control",
                "teach a base to follow maps, edges, depth",
                "ether_diffusion.training.launch:control",
                "ether_diffusion.training.control_config:ControlConfig",
            ),
        ),
        "Pictures": (
            Program(
                "sample",
                "draw with what a run learnt, at several strengths",
                "ether_diffusion.cli.programs.sample:main",
            ),
        ),
        "Evaluation": (
            Program(
                "bench",
                "train, draw and score many subjects with many methods",
                "ether_diffusion.cli.programs.studies:bench",
                "ether_diffusion.evaluation.subjects.settings:BenchmarkConfig",
            ),
            STUDY,
            Program(
                "compare",
                "runs, LoRA files and strengths side by side on one page",
                "ether_diffusion.cli.programs.compare:main",
            ),
            Program(
                "votes",
                "which column readers of such a page chose blind",
                "ether_diffusion.cli.programs.votes:main",
            ),
            Program("report", "one offline page of many runs", "ether_diffusion.cli.programs.report:main"),
        ),
        "Elsewhere": (
            Program(
                "export", "an adapter as an exact LoRA file for other tools", "ether_diffusion.cli.programs.export:main"
            ),
        ),
        "First steps": (
            Program(
                "demo", "learn a drawn subject on a small base and score it", "ether_diffusion.cli.programs.demo:main"
            ),
            Program(
                "doctor",
                "what is installed, what can be trained, what is amiss",
                "ether_diffusion.cli.programs.doctor:main",
            ),
            CONFIG,
            Program("completion", "a script for the completion of a shell", "ether_diffusion.cli.completion:main"),
        ),
    },
)
"""The command itself."""
