"""``ether config``: the recipes listed, shown and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion.cli import main
from ether_diffusion.recipes import recipes
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

NEEDED = ["--output_dir=run", "--instance_data_dir=dog", "--instance_prompt=a qwe dog", "--class_prompt=a dog"]


def test_the_list_has_every_recipe_with_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "list"])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _, _ in lines] == list(recipes())
    bases = {name: base for name, base, _ in lines}
    assert bases["dreambooth_sdxl"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert bases["eval_dreambooth"] == bases["dreambooth_sd15"]  # of a study, whose trainings name it
    assert all(purpose for _, _, purpose in lines)


def test_a_recipe_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "show", "dreambooth_sd15"])
    assert capsys.readouterr().out == recipes()["dreambooth_sd15"].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "file"), [("my.yaml", "my.yaml"), ("new/my.yaml", "new/my.yaml"), (".", "demo.yaml")]
)
def test_a_copy_is_a_config_that_means_the_same(
    target: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["config", "copy", "demo", target])
    assert Path(file).read_bytes() == recipes()["demo"].read_bytes()
    assert parse_config(DreamBoothConfig, [f"--config={file}", *NEEDED]) == parse_config(
        DreamBoothConfig, ["--config=demo", *NEEDED]
    )


def test_a_copy_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["config", "copy", "demo", "my.yaml"])
    assert ended.value.code == 2
    assert "my.yaml is there already" in capsys.readouterr().err
    assert Path("my.yaml").read_text() == "mine"


@pytest.mark.parametrize("words", [["show", "dreambooth_sd51"], ["copy", "dreambooth_sd51", "my.yaml"]])
def test_an_unknown_recipe_offers_the_nearest_and_writes_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["config", *words])
    assert ended.value.code == 2
    assert 'no config file dreambooth_sd51, did you mean "dreambooth_sd35"?' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb",
    [
        ["train"],
        ["control"],
        ["bench"],
        ["study", "lr_robustness"],
        ["study", "block_count"],
        ["study", "control_study"],
        ["demo", "folder"],
    ],
)
def test_every_verb_that_takes_a_config_offers_the_nearest_name(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--config", "dreambooth_sd51"])
    assert ended.value.code == 2
    assert 'no config file dreambooth_sd51, did you mean "dreambooth_sd35"?' in capsys.readouterr().err
