"""What the page of a benchmark has beside its scores: costs, strengths, default and tuned settings, the filter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from page.chromium import Opener, needs_chromium
from PIL import Image

from ether_diffusion.cli.programs.report import main
from ether_diffusion.evaluation.overview import write_report
from ether_diffusion.evaluation.subjects.costs import StepsError, costs, read_steps, steps_of
from ether_diffusion.evaluation.subjects.summary import BY_KEY, summarize
from ether_diffusion.evaluation.subjects.tuning import tuned_against_default, tunings

ROOT = Path(__file__).parents[3]
SHARED = {"pretrained_model_name_or_path": "playground", "max_train_steps": 250}
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "ether_plus": {"method": "ether_plus", "learning_rate": 1e-2, "n_blocks": 8},
    "ether_plus_default": {"method": "ether_plus"},
    "dora": {"method": "peft", "peft_config": {"peft_type": "LORA", "r": 4, "use_dora": True}, "learning_rate": 1.8e-3},
}
LEVELS = {"base": 0.1, "ether_plus": 0.6, "ether_plus_default": 0.3, "dora": 0.4}
SUBJECTS = ("dog", "cat", "box")


def result(arm: str, subject: str) -> dict[str, Any]:
    level = LEVELS[arm] + 0.01 * SUBJECTS.index(subject) * len(arm)

    def rows(kind: str, gain: float) -> list[dict[str, Any]]:
        scores = {"truth": level - gain, "dino": 0.2, "clip_t": 0.3 + gain}
        return [{"file": f"{kind}{n:04d}.png", "prompt": f"a qwe {subject}, {n}"} | scores for n in range(2)]

    trained = {"trained_parameters": {"unet": 1234}, "bytes": 56789, "settings": {**SHARED, **ARMS[arm]}}
    at = {"at": {"0.5": rows("../images@0.5/", 0.1)}} if arm.startswith("ether") else {}
    return {
        **{"arm": arm, "learning_rate": ARMS[arm].get("learning_rate"), "subject": subject, "seed": 0},
        **{"judges": {}, "references": [], "images": rows("", 0.0)},
        **(trained if arm != "base" else {}),
        **at,
    }


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A benchmark's folder with three methods on three subjects, two of which drew at strength .5, too."""
    folder = tmp_path / "bench"
    for arm in ARMS:
        for subject in SUBJECTS:
            found = result(arm, subject) | {"folder": f"images/{arm}/{subject}/images"}
            path = folder / "results" / arm / subject / "seed-0.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(found))
            for kind in ("images", *(["images@0.5"] if "at" in found else [])):
                images = folder / "images" / arm / subject / kind
                images.mkdir(parents=True)
                for number in range(2):
                    Image.new("RGB", (16, 16), "red").save(images / f"{number:04d}.png")
    (folder / "jobs.json").write_text("[]")
    (folder / "config.yaml").write_text(yaml.safe_dump({"protocol": "playground", "training": SHARED}))
    return folder


def steps(model: str = "playground", **rows: dict[str, Any]) -> dict[str, Any]:
    frozen = {"parameters": 0, "seconds": 0.04, "ratio": 1.0, "quartiles": [1.0, 1.0]}
    facts = {"model": model, "rounds": 25, "resolution": 128, "batch_size": 1, "machine": "x86_64", "threads": 1}
    return {**facts, "torch": "2.13.0", "cpu_time": True, "compile": None, "rows": {"frozen": frozen, **rows}}


def step(parameters: int = 1234) -> dict[str, Any]:
    memory = {"peak": 612.5, "saved": 11.1, "optimizer": 0.1}
    return {"parameters": parameters, "seconds": 0.0536, "ratio": 1.286, "quartiles": [1.25, 1.378], "memory": memory}


def plain(row: str) -> list[str]:
    """The cells of a table's row without their markup."""
    return [" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in re.findall("<t[hd].*?</t[hd]>", row, re.DOTALL)]


def rows_of(page: str, table: str) -> list[list[str]]:
    """The rows of the table with this label."""
    start = page.index(f'<table class="table sortable" aria-label="{table}')
    body = page[page.index("<tbody>", start) : page.index("</tbody>", start)]
    return [plain(row) for row in re.findall("<tr.*?</tr>", body, re.DOTALL)]


def test_costs_stand_beside_the_scores(bench: Path, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    file.write_text(json.dumps([steps("playground-flow", dora=step()), steps(ether_plus=step(), lora=step(5))]))
    page = write_report([bench], tmp_path / "page.html", file).read_text()
    assert rows_of(page, "Costs of") == [
        ["frozen", "", "", "40.0", "1.00", "", "", ""],
        ["dora", "1,234", "56,789", "", "", "", "", ""],  # not measured on this base
        ["ether_plus", "1,234", "56,789", "53.6", "1.29 [1.25, 1.38]", "612.5", "11.1", "0.1"],
        ["ether_plus_default", "1,234", "56,789", "", "", "", "", ""],
    ]
    assert "of playground at 128 px, batch 1: the median CPU time of 25 rounds on x86_64" in page
    without = write_report([bench], tmp_path / "page.html").read_text()
    assert rows_of(without, "Costs of")[0] == ["dora", "1,234", "56,789"]
    assert "benchmarks/step.py --arms CONFIG --json FILE" in without


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (
            [steps("playground-flow", dora=step())],
            r"measures playground-flow, the bases of the benchmarks are playground",
        ),
        ([steps(lora=step())], r"the steps are of frozen, lora, the benchmark's methods are dora, ether_plus"),
        ([steps(dora=step(99))], r"dora trains 1,234 numbers in the benchmark and 99 in the file of steps"),
        ([steps(dora=step()), steps(dora=step())], r"several tables of steps fit the base playground"),
    ],
)
def test_steps_of_something_else_are_refused(
    tables: list[dict[str, Any]], said: str, bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps.json").write_text(json.dumps(tables))
    with pytest.raises(StepsError, match=said):
        write_report([bench], tmp_path / "page.html", tmp_path / "steps.json")
    with pytest.raises(SystemExit):
        main([str(bench), "--steps", str(tmp_path / "steps.json"), "--output", str(tmp_path / "page.html")])
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "page.html").exists()


def test_a_base_that_is_not_embedded_takes_the_only_table_that_is_not_either() -> None:
    tables: Any = [steps("playground"), steps("sd15")]
    found = steps_of("stable-diffusion-v1-5/stable-diffusion-v1-5", tables)
    assert found is not None
    assert found["model"] == "sd15"
    assert steps_of("/bases/mine", tables[:1]) is None
    assert steps_of("", tables) is None  # pictures that existed


def test_a_damaged_file_of_steps_is_one_line(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "steps.json").write_text(json.dumps([{"model": "playground"}]))
    with pytest.raises(SystemExit):
        main([str(bench), "--steps", str(tmp_path / "steps.json")])
    assert "steps.json is damaged" in capsys.readouterr().err


def test_the_committed_steps_belong_to_the_committed_rows() -> None:
    tables = read_steps(ROOT / "docs" / "results" / "steps-all-methods.json")
    rows = json.loads((ROOT / "docs" / "results" / "playground.json").read_text())["jobs"]
    trained = {row["arm"]: sum(row["trained_parameters"].values()) for row in rows if "trained_parameters" in row}
    summary = [{"arm": arm, "parameters": parameters, "bytes": 0} for arm, parameters in trained.items()]
    found = costs(summary, steps_of("playground", tables))
    assert [cost.arm for cost in found] == ["frozen", *trained]
    assert all(cost.step is not None for cost in found)


def test_the_front_is_shown_with_its_pictures(bench: Path, tmp_path: Path) -> None:
    page = write_report([bench], tmp_path / "page.html").read_text()
    table = {(row[0], row[2]): (row[3][:5], row[5]) for row in rows_of(page, "Strengths of")}
    assert table == {  # clip_t is .3 at strength 1, .4 at .5; truth-likeness grows with the subject and the arm's name
        ("dora", "1"): ("0.440", ""),
        ("ether_plus", "0.5"): ("0.600", "on it"),
        ("ether_plus", "1"): ("0.700", "on it"),
        ("ether_plus_default", "0.5"): ("0.380", ""),
        ("ether_plus_default", "1"): ("0.480", ""),
    }
    assert "truth-likeness and CLIP-T: methods at their strengths" in page
    pictures = page[page.index("Pictures at every strength") : page.index("default and tuned settings")]
    assert pictures.count("data:image/webp") == len(SUBJECTS) * 2 * 2  # two methods at two strengths
    assert "ether_plus at 0.5" in pictures
    for path in bench.glob("results/ether*/*/*.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "at"}))
    without = write_report([bench], tmp_path / "page.html").read_text()
    assert [row[2] for row in rows_of(without, "Strengths of")] == ["1", "1", "1"]
    assert "strengths: [0.5, 0.75] in the config draws them" in without
    assert "Pictures at every strength" not in without


def test_default_and_tuned_settings_stand_together(bench: Path, tmp_path: Path) -> None:
    page = write_report([bench], tmp_path / "page.html").read_text()
    found = rows_of(page, "Default and tuned settings of")
    assert [row[:5] for row in found] == [
        ["LORA (PEFT)", "tuned", "dora", "0.0018", "r 4, use_dora yes"],
        ["ETHER+", "default", "ether_plus_default", "0.006", ""],
        ["ETHER+", "tuned", "ether_plus", "0.01", "n_blocks 8 (default 4)"],
    ]
    assert [row[5][:5] for row in found] == ["0.440", "0.480", "0.700"]
    results = [result(arm, subject) for arm in ARMS for subject in SUBJECTS]
    (compared,) = tuned_against_default(results, tunings(results, summarize(results)), BY_KEY["truth"])
    assert (compared.arm, compared.rival) == ("ether_plus, 0.01", "ether_plus_default, 0.006")
    assert compared.difference.mean == pytest.approx(0.3 - 0.08)  # the longer name of the default's arm gains more
    assert '<th scope="row">ether_plus, 0.01</th><td>ether_plus_default, 0.006</td><td>+0.220 [' in page
    for path in bench.glob("results/ether_plus_default/*/*.json"):
        path.unlink()
    not_run = rows_of(write_report([bench], tmp_path / "page.html").read_text(), "Default and tuned settings of")
    settings = "n_blocks 4, targets attention, initial_length 1, two_sided yes"
    assert ["ETHER+", "default", "not run", "0.006", settings, "", ""] in not_run


def test_a_shorter_start_is_no_default_and_a_further_way_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "short", {"method": "ether_plus", "initial_length": 0.5})
    monkeypatch.setitem(LEVELS, "short", 0.5)
    results = [result(arm, subject) for arm in ("base", "short", "ether_plus") for subject in SUBJECTS]
    results += [result("ether_plus", subject) | {"arm": "ether_plus, best", "way": "best"} for subject in SUBJECTS]
    default, short, other = tunings(results, summarize(results))
    assert (default.arm, default.is_default) == (None, True)
    assert (short.arm, short.settings) == ("short", "initial_length 0.5 (default 1)")
    assert other.arm == "ether_plus"


def test_every_number_leads_to_its_pictures_and_nothing_needs_scripts(bench: Path, tmp_path: Path) -> None:
    shutil.copytree(bench, tmp_path / "second")
    page = write_report([bench, tmp_path / "second"], tmp_path / "page.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) >= 2 * len(SUBJECTS) * len(ARMS)
    assert set(links) <= set(ids)
    head = re.search(r'<th scope="col" id="b0-1-2"[^>]*>(.*?)</th>', page)
    cell = re.search(r'<td[^>]*><a href="#b0-1-2">(.*?)</a>', page)
    assert head is not None
    assert cell is not None
    assert (head[1], cell[1][:5]) == ("ether_plus, 0.01", "0.700")  # the cat, of the third method
    assert len(re.findall(r'<form class="methods" [^>]*hidden>', page)) == 2
    assert 'class="off"' not in page


PROBE = """() => {
const form = document.querySelector("form.methods");
const [field, ...boxes] = form.querySelectorAll("input");
const seen = label => [...document.querySelectorAll(`table[aria-label^="${label}"] tbody tr`)]
  .filter(row => row.offsetParent).map(row => row.cells[0].textContent.trim().split(/\\s/)[0]).join(" ");
const changed = () => form.dispatchEvent(new Event("input"));
const heads = () => [...document.querySelectorAll(".matrix thead th")].filter(head => head.offsetParent).length;
document.querySelectorAll("details").forEach(each => each.open = true);
const found = [form.hidden, seen("Scores of"), heads()];
field.value = "ETHER+"; changed();
found.push(seen("Scores of"), seen("Costs of"), heads(), form.querySelector("[role=status]").textContent);
field.value = ""; boxes.find(box => box.value === "dora").click();
found.push(seen("Scores of"), seen("Strengths of"));
document.querySelectorAll("details").forEach(each => each.open = false);
const link = document.querySelector('a[href="#b0-1-2"]');
link.click();
found.push(document.getElementById("b0-1-2").closest("details").open);
return found;
}"""


@needs_chromium
def test_methods_are_filtered_by_text_and_by_box(bench: Path, tmp_path: Path, open_page: Opener) -> None:
    page = open_page(write_report([bench], tmp_path / "page.html"))
    hidden, scores, heads, by_text, costly, fewer, told, by_box, strengths, opened = page.evaluate(PROBE)
    assert hidden is False
    assert scores == "base dora ether_plus ether_plus_default"
    assert by_text == costly == "ether_plus ether_plus_default"
    assert told == "2 of 4 methods"
    assert heads - fewer == 2 * len(SUBJECTS)  # the base's and DoRA's columns of pictures
    assert by_box == "base ether_plus ether_plus_default"
    assert strengths == "ether_plus ether_plus ether_plus_default ether_plus_default"
    assert opened is True
