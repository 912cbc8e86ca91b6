"""The sheet of a run: which picture stands where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ether_diffusion.runs.sheet import GAP, SIDE, TITLE, draw_sheet, main

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One grey reference; samples green and blue of the base, red and blue of step 9."""
    folder = tmp_path / "run"
    Image.new("RGB", (200, 100), GREY).save(tmp_path / "photo.png")
    for step, colours in ((0, (GREEN, BLUE)), (9, (RED, BLUE))):
        grid = folder / "samples" / f"step-{step:06d}"
        grid.mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (8, 8), colour).save(grid / f"{number:02d}.png")
    listing = [{"file": f"{n:02d}.png", "prompt": "a dog", "seed": n} for n in range(2)]
    (folder / "samples" / "prompts.json").write_text(json.dumps(listing))
    config = {"pretrained_model_name_or_path": "base", "method": "ether_plus", "max_train_steps": 9}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"instance_images": [str(tmp_path / "photo.png")], "step": 9}))
    return folder


def middle(sheet: Image.Image, row: int, column: int) -> object:
    place = (GAP + column * (SIDE + GAP) + SIDE // 2, row * (TITLE + SIDE + GAP) + TITLE + SIDE // 2)
    return sheet.getpixel(place)


def test_references_base_and_finetuned_stand_below_each_other(run: Path) -> None:
    sheet = draw_sheet(run)
    seen = [[middle(sheet, row, column) for column in range(2)] for row in range(3)]
    assert seen == [[GREY, (255, 255, 255)], [GREEN, BLUE], [RED, BLUE]]


def test_rows_are_cut_and_left_out(run: Path) -> None:
    (run.parent / "photo.png").unlink()
    sheet = draw_sheet(run, columns=1)
    assert sheet.size == (SIDE + 2 * GAP, 2 * (TITLE + SIDE + GAP))
    assert middle(sheet, 0, 0) == GREEN


def test_the_program_writes_the_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), str(tmp_path / "sheet.png")])
    assert Image.open(tmp_path / "sheet.png").size == draw_sheet(run).size
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "sheet.png")])
    assert "not a run folder" in capsys.readouterr().err
