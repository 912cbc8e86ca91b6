"""Whether a method of a study of controls is better than another: differences with intervals over trainings.

The unit is the training: methods are compared within each seed that both have, and the interval is over the seeds.
Pairs of one training are no units, since another seed changes what a method reaches on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from ether_diffusion.evaluation.controls.findings import MEASURES, MIOU, Findings, read_findings
from ether_diffusion.evaluation.statistics import Comparison, compare
from ether_diffusion.evaluation.tables import format_difference
from ether_diffusion.files import write_text
from ether_diffusion.page.text import markdown_table, number

DIFFERENCES = "differences.json"
ONE_SEED = "One seed of the training: there is no interval, since another seed may give another order."


def differences(findings: Findings, against: Sequence[str]) -> list[Comparison]:
    """The mIoU of every arm minus that of each arm of ``against``, at the best rates, corrected for their number.

    Two arms of ``against`` are compared once, not in both directions, so that the correction counts them once.

    Args:
        findings: of the study.
        against: arms; those that are not finished are left out.
    """
    values = _by_seed(findings)
    pairs: list[tuple[str, str]] = []
    for other in against:
        pairs += [(arm, other) for arm in values if other in values and arm != other and (other, arm) not in pairs]
    return compare(values, list(dict.fromkeys(pairs)))


def _by_seed(findings: Findings) -> dict[str, dict[str, float]]:
    """MIoU of every arm at its best rate, by the seed; seeds without a score are left out."""
    values: dict[str, dict[str, float]] = {}
    for arm, setting in findings.best.items():
        means = {str(row["seed"]): row["scores"][MIOU]["mean"] for row in sorted(setting.last, key=itemgetter("seed"))}
        values[arm] = {seed: mean for seed, mean in means.items() if mean is not None}
    return values


def write_differences(study: Path, against: Sequence[str]) -> str:
    """Write ``differences.md`` and ``differences.json`` of a study's folder; return the table.

    What another process finishes meanwhile is taken in. The JSON has for every arm its rate and its score by seed
    (``arms``), and the ``comparisons``: ``arm``, ``rival``, the ``seeds`` that both have, the mean ``difference`` over
    them, the ends ``low`` and ``high`` of its 95 % interval, ``p``, and ``p_holm``. Of one seed the last four are null.

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
    values = _by_seed(findings)
    content: dict[str, Any] = {
        "measure": MIOU,
        "arms": {arm: {"rate": findings.best[arm].rate, "by_seed": of_arm} for arm, of_arm in values.items()},
        "comparisons": [_line(each, values) for each in found],
    }
    write_text(study / DIFFERENCES, json.dumps(content, indent=1))
    write_text(study / "differences.md", text)
    return text


def _line(found: Comparison, values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A comparison in :data:`DIFFERENCES`."""
    estimate = found.difference
    return {
        "arm": found.arm,
        "rival": found.rival,
        "seeds": [int(seed) for seed in values[found.arm] if seed in values[found.rival]],
        "difference": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "p": estimate.p,
        "p_holm": found.p_holm,
    }


def read_differences(findings: Findings) -> list[Comparison]:
    """The comparisons that the study's :data:`DIFFERENCES` names, of the findings as they are now; none without it."""
    path = findings.folder / DIFFERENCES
    known = json.loads(path.read_text(encoding="utf-8")).get("comparisons", []) if path.is_file() else []
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
            number(each.p_holm, ".2g"),
            str(each.difference.units),
        ]
        for each in found
    ]
    heads = ["method", "minus", f"difference in {MEASURES[MIOU].title}, 95 % interval", "p (Holm)", "seeds"]
    return f"{markdown_table(heads, rows, (0, 1))}\n{difference_caption(found)}\n"


def difference_caption(found: Sequence[Comparison]) -> str:
    """What the intervals are over."""
    if max(each.difference.units for each in found) < 2:
        return ONE_SEED
    return (
        f"Intervals: Student's t over the seeds of the training, within which methods are compared; "
        f"p is corrected for {len(found)} comparisons. The rate of a method is the best of these results."
    )
