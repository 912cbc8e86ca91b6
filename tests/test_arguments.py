from __future__ import annotations

import pytest

from ether_diffusion.cli.programs.control_accuracy import main as accuracy
from ether_diffusion.runs.report import main as report


def test_a_mistake_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for program, flags in ((accuracy, ["--data", "a"]), (accuracy, ["--nonsense"]), (report, ["/nowhere"])):
        with pytest.raises(SystemExit) as ended:
            program(flags)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "error: " in said
