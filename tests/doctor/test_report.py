"""``ether doctor``: for people, for programs, without the network, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ether_diffusion.cli.programs.doctor import main as doctor_main
from ether_diffusion.doctor import report
from ether_diffusion.doctor.capacity import fits
from ether_diffusion.doctor.faults import Fault

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def without_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))


def test_json_has_all_that_the_text_says(capsys: pytest.CaptureFixture[str]) -> None:
    doctor_main(["--json", "--memory", "24"])
    found = json.loads(capsys.readouterr().out)
    doctor_main(["--memory", "24"])
    said = capsys.readouterr().out
    for name, version in found["packages"].items():
        assert f"{name}  " in said
        assert str(version) in said
    named = [*found["extras"], *found["devices"], *found["bases"]]
    assert named
    assert all(each["name"] in said for each in named)
    assert all(extra["command"] in said for extra in found["extras"] if extra["missing"])
    assert all(fault["what"] in said and fault["remedy"] in said for fault in found["faults"])
    assert "24.0 GiB (--mixed_precision bf16" in said
    assert found["fits"] == [
        {"base": f.base, "resolution": f.resolution, "flags": list(f.flags), "needs": f.needs, "fits": f.fits}
        for f in fits(24 * 2**30, half=True)
    ]


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    doctor_main([])
    packages = capsys.readouterr().out.partition("\nPackages\n")[2].partition("\n\n")[0].splitlines()
    places = {len(line) - len(line[2:].lstrip().partition(" ")[2].lstrip()) for line in packages}
    assert len(packages) > 5
    assert len(places) == 1


def test_what_stops_a_training_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "faults", lambda *found: [Fault("a fault", "a remedy", stops=True)])
    with pytest.raises(SystemExit) as ended:
        doctor_main([])
    assert ended.value.code == 1
    assert "  stops training: a fault\n    -> a remedy\n" in capsys.readouterr().out


def test_it_imports_only_what_it_needs_and_asks_no_network(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*arguments): raise SystemExit('the network is asked')\n"
        "socket.socket.connect = refuse\n"
        "from ether_diffusion.cli import main\nmain(['doctor', '--json'])\nprint(*sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    loaded = {name.partition(".")[0] for name in ended.stderr.split()}
    assert {"torch", "psutil"} <= loaded
    assert not {"diffusers", "transformers", "accelerate", "peft"} & loaded
    assert {base["state"] for base in json.loads(ended.stdout)["bases"]} == {"embedded", "absent"}
