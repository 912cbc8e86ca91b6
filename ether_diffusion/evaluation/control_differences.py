"""Whether a method of a study of controls is better than another: differences with intervals over trainings.

The unit is the training: methods are compared within each seed that both have, and the interval is over the seeds.
Pairs of one training are no units, since another seed changes what a method reaches on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.control_summary import MEASURES, MIOU, Findings, read_findings
from ether_diffusion.evaluation.statistics import Comparison, compare
from ether_diffusion.evaluation.tables import format_difference, markdown_table
from ether_diffusion.files import write_text

DIFFERENCES = "differences.json"
ONE_SEED = "One seed of the training: there is no interval, since another seed may give another order."


def differences(findings: Findings, against: Sequence[str]) -> list[Comparison]:
    """The mIoU of every arm minus that of each arm of ``against``, at the best rates, corrected for their number.

    Args:
        findings: of the study.
        against: arms; those that are not finished are left out.
    """
    values: dict[str, dict[str, float]] = {}
    for arm, setting in findings.best.items():
        means = {str(row["seed"]): row["scores"][MIOU]["mean"] for row in setting.last}
        values[arm] = {seed: mean for seed, mean in means.items() if mean is not None}
    others = [other for other in against if other in values]
    return compare(values, [(arm, other) for other in others for arm in values if arm != other])


def write_differences(study: Path, against: Sequence[str]) -> str:
    """Write ``differences.md`` and ``differences.json`` of a study's folder; return the table.

    What another process finishes meanwhile is taken in. The JSON has the rate and the seeds with their scores of every
    arm (``compared``), and the comparisons.

    Args:
        study: its folder.
        against: see :func:`differences`.
    """
    while True:
        findings = read_findings(study)
        found = differences(findings, against)
        if read_findings(study).compared == findings.compared:
            break
    text = differences_table(found)
    content: dict[str, Any] = {"compared": findings.compared, "comparisons": [asdict(each) for each in found]}
    write_text(study / DIFFERENCES, json.dumps(content, indent=1))
    write_text(study / "differences.md", text)
    return text


def read_differences(findings: Findings) -> list[Comparison]:
    """The comparisons that the study's :data:`DIFFERENCES` names, of the findings as they are now; none without it."""
    path = findings.folder / DIFFERENCES
    known = json.loads(path.read_text(encoding="utf-8"))["comparisons"] if path.is_file() else []
    return differences(findings, list(dict.fromkeys(each["rival"] for each in known)))


def differences_table(found: Sequence[Comparison]) -> str:
    """A row for each comparison, and what its interval is over."""
    if not found:
        return "nothing can be compared yet\n"
    rows = [
        [
            each.arm,
            each.rival,
            format_difference(each.difference),
            "" if each.p_holm is None else f"{each.p_holm:.2g}",
            str(each.difference.units),
        ]
        for each in found
    ]
    heads = ["method", "minus", f"difference in {MEASURES[MIOU].title}, 95 % interval", "p (Holm)", "seeds"]
    return f"{markdown_table(heads, rows, 2)}\n{difference_caption(found)}\n"


def difference_caption(found: Sequence[Comparison]) -> str:
    """What the intervals are over."""
    if max(each.difference.units for each in found) < 2:
        return ONE_SEED
    return (
        f"Intervals: Student's t over the seeds of the training, within which methods are compared; "
        f"p is corrected for {len(found)} comparisons. The rate of a method is the best of these results."
    )
