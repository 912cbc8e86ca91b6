"""What each method of a benchmark costs: trained numbers, bytes of its file, and a training step's time and memory.

The step is measured by ``benchmarks/step.py --arms CONFIG --json FILE``, on the benchmark's own arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from ether_diffusion.evaluation.subjects.settings import ANCHORS
from ether_diffusion.evaluation.subjects.summary import REAL, Row
from ether_diffusion.page.text import number
from ether_diffusion.playground import GUIDANCE
from ether_diffusion.reading import read_json

FROZEN = "frozen"
"""The row of the step without any method."""
EMBEDDED = tuple(GUIDANCE)
"""Bases whose name is that of the model that is measured."""


class StepsError(ValueError):
    """A file of steps that does not belong to a benchmark; the message says why."""


class StepRow(TypedDict):
    """A method's step: ``ratio`` to the frozen step with its quartiles; ``memory`` in MB: peak, saved, optimizer."""

    parameters: int
    seconds: float
    ratio: float
    quartiles: list[float]
    memory: NotRequired[dict[str, float]]


class Steps(TypedDict):
    """The steps of all methods on one model, at one resolution and batch size, of so many rounds."""

    model: str
    rounds: int
    resolution: int
    batch_size: int
    machine: str
    threads: int
    torch: str
    cpu_time: bool
    compile: str | None
    rows: dict[str, StepRow]


@dataclass(frozen=True)
class Cost:
    """A method, or the frozen model, in the table of costs.

    Attributes:
        arm: its name.
        parameters: trained numbers; None of the frozen model.
        bytes: of its file; None where it is not recorded.
        step: its training step; None where it was not measured.
    """

    arm: str
    parameters: int | None
    bytes: int | None
    step: StepRow | None

    @property
    def quartiles(self) -> str:
        """Of the ratio, as text."""
        if self.step is None or self.arm == FROZEN:
            return ""
        low, high = (number(value, ".2f") for value in self.step["quartiles"])
        return f"[{low}, {high}]"


def read_steps(path: Path) -> list[Steps]:
    """The tables that ``benchmarks/step.py`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it holds something else; the message names it.
    """
    tables: list[Steps] = read_json(path, list[Steps])
    return tables


def steps_of(base: str, tables: Sequence[Steps]) -> Steps | None:
    """The table of a benchmark's base.

    Args:
        base: its name; empty for pictures that existed, which have no steps. Of an embedded base the model must be
            called the same; of another one the file's only table of a model that is not embedded is taken, since a
            folder or a Hub id is no name of a model.
        tables: of the file.

    Returns:
        The table; None where none is of that base.

    Raises:
        StepsError: there are several.
    """
    if not base:
        return None
    embedded = base in EMBEDDED
    fitting = [t for t in tables if (t["model"] == base if embedded else t["model"] not in EMBEDDED)]
    if len(fitting) > 1:
        sizes = ", ".join(f"{table['model']} at {table['resolution']} px x {table['batch_size']}" for table in fitting)
        raise StepsError(f"several tables of steps fit the base {base}: {sizes}; measure one size and write it alone")
    return fitting[0] if fitting else None


def costs(rows: Sequence[Row], steps: Steps | None) -> list[Cost]:
    """The frozen model, where steps were measured, and every method of a benchmark once.

    Raises:
        StepsError: the steps are of other methods, since one trains another number of parameters or none is there.
    """
    methods: dict[str, Row] = {}
    for row in rows:
        if row["arm"] not in (REAL, *ANCHORS) and row["parameters"]:
            methods.setdefault(row["arm"], row)
    measured: Mapping[str, StepRow] = {} if steps is None else steps["rows"]
    if steps is not None and methods and not methods.keys() & measured.keys():
        raise StepsError(
            f"the steps are of {', '.join(measured)}, the benchmark's methods are {', '.join(methods)}: "
            "measure its own arms by benchmarks/step.py --arms with the benchmark's config"
        )
    for arm, row in methods.items():
        if arm in measured and measured[arm]["parameters"] != row["parameters"]:
            raise StepsError(
                f"{arm} trains {row['parameters']:,} numbers in the benchmark and {measured[arm]['parameters']:,} in "
                "the file of steps: they are of different settings; measure the benchmark's own config"
            )
    frozen = [Cost(FROZEN, None, None, measured[FROZEN])] if FROZEN in measured else []
    return frozen + [
        Cost(arm, row["parameters"], row["bytes"] or None, measured.get(arm)) for arm, row in methods.items()
    ]


def steps_caption(steps: Steps) -> str:
    """What the times and memory are of."""
    clock = "CPU time" if steps["cpu_time"] else "time"
    compiled = f", compiled ({steps['compile']})" if steps["compile"] else ""
    return (
        f"A step is a forward and a backward of {steps['model']} at {steps['resolution']} px, batch "
        f"{steps['batch_size']}{compiled}: the median {clock} of {steps['rounds']} rounds on {steps['machine']}, "
        f"{steps['threads']} threads, torch {steps['torch']}. Against the frozen step: the median of the rounds' "
        "ratios, [ ]: their quartiles. Peak: of the process; kept: by autograd for the backward."
    )
