"""``ether doctor``: the state of this machine, for people and as JSON.

    ether doctor                 # packages, extras, devices, bases, what can be trained, what is amiss
    ether doctor --memory 24     # what can be trained on a card of 24 GiB
    ether doctor --json          # the same for programs

It asks nothing of the network. It ends with 1 where something stops every training, else with 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from ether_diffusion.arguments import Parser
from ether_diffusion.first_imports import first_imports
from ether_diffusion.ranges import POSITIVE


def main(arguments: Sequence[str] | None = None) -> None:
    """The program.

    Raises:
        SystemExit: 1 where something stops every training.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=POSITIVE.of(float), metavar="GIB", help="memory of another card, in GiB")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    given = parser.parse_args(arguments)
    with first_imports():
        from ether_diffusion.doctor.report import examine, text
    findings = examine(None if given.memory is None else int(given.memory * 2**30))
    print(json.dumps(asdict(findings), indent=1, ensure_ascii=False) if given.json else text(findings))
    if any(fault.stops for fault in findings.faults):
        raise SystemExit(1)
