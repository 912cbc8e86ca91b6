"""``ether completion``: the script, asked by a real bash what it completes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ether_diffusion.cli import main
from ether_diffusion.cli.completion import SHELLS
from ether_diffusion.cli.verbs import ETHER, STUDY
from ether_diffusion.recipes import recipes
from ether_diffusion.registry import METHODS


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the script for bash."""
    pytest.importorskip("shtab")
    file = tmp_path_factory.mktemp("completion") / "ether.bash"
    with file.open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        main(["completion", "bash"])
    return file


def completed(file: Path, folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words after ``ether``."""
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    script = (
        'source "$1"; shift; COMP_WORDS=(ether "$@"); COMP_CWORD=$#; '
        '"$(complete -p ether | sed "s/.*-F \\([^ ]*\\).*/\\1/")" ether "${@: -1}" ""; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ended = subprocess.run(
        ["bash", "-c", script, "bash", str(file), *words], capture_output=True, text=True, cwd=folder, check=True
    )
    return {line.strip() for line in ended.stdout.splitlines() if line.strip()}


def test_verbs_are_completed_at_every_level(written: Path, tmp_path: Path) -> None:
    assert set(ETHER.verbs) <= completed(written, tmp_path, "")
    assert completed(written, tmp_path, "tr") == {"train"}
    assert set(STUDY.verbs) <= completed(written, tmp_path, "study", "")


def test_settings_and_their_choices_are_completed(written: Path, tmp_path: Path) -> None:
    assert completed(written, tmp_path, "train", "--lr_w") == {"--lr_warmup_steps"}
    assert completed(written, tmp_path, "control", "--canny") == {"--canny_low", "--canny_high"}
    assert completed(written, tmp_path, "train", "--method", "") == set(METHODS)
    assert completed(written, tmp_path, "train", "--seed", "3", "--random_flip", "t") == {"true"}
    assert completed(written, tmp_path, "bench", "--lpips_n") == {"--lpips_net"}
    assert completed(written, tmp_path, "study", "lr_robustness", "--tuned") == {"--tuned_rates"}


def test_recipes_and_files_are_completed(written: Path, tmp_path: Path) -> None:
    (tmp_path / "dream.yaml").touch()
    known = {name for name in recipes() if name.startswith("dream")}
    assert completed(written, tmp_path, "train", "--config", "dream") == known | {"dream.yaml"}
    assert completed(written, tmp_path, "train", "--instance_data_dir", "dr") == {"dream.yaml"}
    assert completed(written, tmp_path, "export", "dr") == {"dream.yaml"}


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    main(["completion", shell])
    assert "--max_train_steps" in capsys.readouterr().out


def test_without_shtab_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bash"])
    assert ended.value.code == 2
    assert "pip install 'ether-diffusion[completion]'" in capsys.readouterr().err
