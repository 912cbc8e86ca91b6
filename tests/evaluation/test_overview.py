"""The page of many runs: what it shows, and that it works offline in a real browser."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from page.chromium import Opener, needs_chromium, seen_at
from PIL import Image

from ether_diffusion.cli.programs.pictures import sheet as sheet_main
from ether_diffusion.cli.programs.report import main
from ether_diffusion.evaluation.controls.findings import write_differences, write_outline
from ether_diffusion.evaluation.overview import write_report
from ether_diffusion.evaluation.subjects.sections import MAX_PICTURES
from ether_diffusion.evaluation.subjects.summary import best_rates, summarize
from ether_diffusion.evaluation.tables import write_tables
from ether_diffusion.page.pictures import GAP, SIDE, TITLE
from ether_diffusion.page.text import distinct_names
from ether_diffusion.playground.pairs import write_pairs

ARMS = {("base", None): 0.1, ("lora", 1e-3): 0.3, ("lora", 1e-2): 0.2, ("ether", 6e-2): 0.4}


def result(arm: str, rate: float | None, subject: str, value: float, prompts: int = 2) -> dict[str, Any]:
    images = [
        {
            "file": f"{n:04d}.png",
            "prompt": f"a qwe {subject} <{n}>",
            "dino": value + n / 100,
            "clip_t": 0.5,
            "clip_i": 0.6,
        }
        for n in range(prompts)
    ]
    return {
        **{"arm": arm, "learning_rate": rate, "subject": subject, "seed": 0, "images": images, "references": []},
        "judges": {"dino": {"model": "playground", "weights": "abc"}},
        **({"trained_parameters": {"unet": 1234}} if arm != "base" else {}),
    }


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A benchmark's folder with two subjects and three methods, one of them at two rates."""
    folder = tmp_path / "bench"
    for subject in ("dog", "cat"):
        (folder / "subjects" / subject).mkdir(parents=True)
        Image.new("RGB", (16, 16), "blue").save(folder / "subjects" / subject / "0.png")
        for (arm, rate), value in ARMS.items():
            name = arm if rate is None else f"{arm}@{rate:g}"
            path = folder / "results" / name / subject / "seed-0.json"
            path.parent.mkdir(parents=True)
            found = result(arm, rate, subject, value)
            found |= {"folder": f"images/{name}/{subject}/seed-0/images"}
            found |= {"references": [str(folder / "subjects" / subject / "0.png")]}
            path.write_text(json.dumps(found))
            images = folder / "images" / name / subject / "seed-0" / "images"
            images.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (16, 16), "red").save(images / f"{number:04d}.png")
    (folder / "results" / "ether@0.06" / "cow").mkdir()
    (folder / "results" / "ether@0.06" / "cow" / "seed-0.error.txt").write_text("no photos")
    keys = [str(path.relative_to(folder / "results").with_suffix("")) for path in folder.glob("results/*/*/*.json")]
    (folder / "jobs.json").write_text(json.dumps([*keys, "ether@0.06/cow/seed-0", "ether@0.06/hen/seed-0"]))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    for step in (0, 50):
        (folder / "samples" / f"step-{step:06d}").mkdir(parents=True)
        Image.new("RGB", (16, 16), "green").save(folder / "samples" / f"step-{step:06d}" / "00.png")
    prompts = [{"file": "00.png", "prompt": "a qwe dog", "seed": 0}]
    (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))
    config = {"pretrained_model_name_or_path": "playground", "method": "ether_plus", "max_train_steps": 50}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps({"step": 50}))
    (folder / "scores.json").write_text(json.dumps({"DINO": {"base": 0.125, "finetuned": 0.625}}))
    rows = [{"step": s, "loss": 1 / s, "lr": {"unet": 1e-3}, "steps_per_second": 1.0} for s in range(1, 51)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of controls: an arm at two rates with two seeds, one without rates, one that diverged."""
    folder = tmp_path / "study"
    write_pairs(folder / "pairs", 2)
    jobs = {("ETHER", rate, seed): rate * 10 + seed / 10 for rate in (1e-2, 3e-2) for seed in (0, 1)}
    jobs |= {("encoder alone", None, 0): 0.25, ("encoder alone", None, 1): 0.15}
    keys = [f"{arm}@{rate:g}/seed-{seed}" if rate else f"{arm}/seed-{seed}" for arm, rate, seed in jobs]
    write_outline(folder, [*keys, "LoRA/seed-0", "OFT/seed-0"], 2, None)
    for key, ((arm, rate, seed), miou) in zip(keys, jobs.items(), strict=True):
        images = folder / "images" / key / "000002"
        images.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16), "red").save(images / f"{number:05d}-0.png")
        (folder / "results" / key).mkdir(parents=True)
        for steps in (1, 2):
            found = {
                **{"arm": arm, "rate": rate, "seed": seed, "steps": steps, "folder": f"images/{key}/000002"},
                **{"pairs": 2, "samples_per_pair": 1, "warnings": ["FID is biased"], "choices": {"classes": 17}},
                **{"originals": {"miou": 0.987}, "judges": {"segmenter": {"model": "playground", "weights": "abc"}}},
                "scores": {"miou": {"mean": miou * steps / 2, "spread": None}, "fid": {"mean": 12.0, "spread": None}},
                "trained_parameters": {"unet": 1234, "control_encoder": 56},
                "classes": [{"name": "sky", "iou": miou}, {"name": "<sea>", "iou": None if seed else 0.75}],
            }
            (folder / "results" / key / f"{steps:06d}.json").write_text(json.dumps(found))
    (folder / "results" / "LoRA" / "seed-0").mkdir(parents=True)
    diverged = {"arm": "LoRA", "rate": None, "seed": 0, "steps": 1, "diverged": "at step 1"}
    (folder / "results" / "LoRA" / "seed-0" / "000001.json").write_text(json.dumps(diverged))
    write_differences(folder, ["encoder alone"])
    return folder


def table_of(page: str) -> dict[tuple[str, ...], list[str]]:
    """The scores of the report's table by method, learning rate and parameters: ``0.412 ± 0.010 [0.380, 0.441]``."""
    table = page[page.index('aria-label="Scores of') :]
    rows = re.findall("<tr[^>]*>(.*?)</tr>", table[table.index("<tbody>") : table.index("</tbody>")], re.DOTALL)
    plain = [[" ".join(re.sub("<[^>]*>", "", cell).split()) for cell in re.findall("<t[hd].*?</t[hd]>", row, re.DOTALL)]
             for row in rows]  # fmt: skip
    return {tuple(cells[:3]): cells[3:] for cells in plain}


@pytest.mark.parametrize("seed", range(4))
def test_summary_and_report_say_the_same_whatever_the_order_of_the_results(seed: int, tmp_path: Path) -> None:
    shuffle = random.Random(seed)
    values = random.Random(9)
    results = []
    for subject in ("dog", "cat", "box", "hen", "owl"):
        for arm, rate in ARMS:
            for number in (0, 1):
                found = result(arm, rate, subject, 0.2, prompts=3)
                for row in found["images"]:
                    row |= {key: values.random() for key in ("dino", "clip_t", "clip_i")}
                results.append(found | {"seed": number, "folder": "images"})
    shuffle.shuffle(results)
    for found in results:
        path = tmp_path / "results" / f"{found['arm']}@{found['learning_rate']}" / found["subject"]
        path.mkdir(parents=True, exist_ok=True)
        (path / f"seed-{found['seed']}.json").write_text(json.dumps(found))
    text = write_tables(tmp_path, results, [])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    summary = {tuple(cells[:3]): cells[3:] for cells in lines if len(cells) == 6 and cells[0] != "method"}
    assert len(summary) == len(ARMS)
    assert all(
        re.fullmatch(r"\d\.\d{3} ± \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", cell)
        for cell in summary["ether", "0.06", "1,234"]
    )
    page = write_report([tmp_path], tmp_path / "page.html").read_text()
    assert table_of(page) == summary
    compared = [line for line in text.splitlines() if re.match(r"\| \w+ \| [+-]", line)]
    for line in compared:
        rival, difference, *_ = (cell.strip() for cell in line.split("|")[1:-1])
        assert f'<th scope="row">{rival}</th><td>{difference}</td>' in page


def test_of_equal_rates_the_same_is_best_whatever_the_order() -> None:
    results = [result("lora", rate, "dog", 0.3) for rate in (1e-3, 1e-2)]
    for order in (results, results[::-1]):
        assert [row["learning_rate"] for row in best_rates(summarize(order))] == [1e-3]


def test_the_page_shows_a_study_of_controls(study: Path, bench: Path, tmp_path: Path) -> None:
    page = write_report([study, bench], tmp_path / "page.html").read_text()
    of_study = page[page.index("study: control accuracy") :]
    assert of_study.count("data:image/webp") == 2 * (2 + 2)  # of two pairs the condition, the original and two arms
    assert '<th scope="row">ETHER <small>best</small></th>' in of_study
    assert of_study.count('<th scope="row">ETHER</th>') == 1  # the other rate
    assert "0.350 <small>± 0.071</small>" in of_study
    assert [f"<dd>{fact}</dd>" in of_study for fact in ("2", "1", "0, 1", "0.987")] == [True] * 4
    assert "LoRA/seed-0 (diverged, at step 1, so that its rate is left out); OFT/seed-0 (not done yet)" in of_study
    assert "<h3>encoder alone: mIoU</h3>" in of_study
    assert "mIoU less that of encoder alone" in of_study
    assert '<th scope="row">sky</th><td data-value="0.2">0.200</td><td data-value="0.35">0.350</td>' in of_study
    assert '<th scope="row">&lt;sea&gt;</th><td data-value="0.75">0.750</td><td data-value="0.75">' in of_study
    assert "FID is biased" in of_study
    assert "weights abc" in of_study
    assert not re.search(r'(src|href)="(?!data:|#|https://arxiv)', page)


def test_ids_of_figures_are_unique_in_a_page(study: Path, bench: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "more" / "study")
    plus = tmp_path / "more" / "study" / "results"
    for path in plus.glob("encoder alone/*/*.json"):
        path.write_text(path.read_text().replace("encoder alone", "ETHER+"))  # ETHER but for what is no letter
    page = write_report([study, tmp_path / "more" / "study", bench], tmp_path / "page.html").read_text()
    assert "<h2>more/study: scores</h2>" in page
    assert "ETHER+: mIoU" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) > 50
    assert len(set(ids)) == len(ids)


def test_a_study_shows_what_is_left_of_it(study: Path, tmp_path: Path) -> None:
    (study / "pairs" / "maps" / "00000.png").write_bytes(b"broken")
    next((study / "images").glob("encoder alone/*/*/00001-0.png")).unlink()
    assert write_report([study], tmp_path / "page.html").read_text().count("no picture") == 2
    shutil.rmtree(study / "pairs")
    (study / "differences.json").unlink()
    page = write_report([study], tmp_path / "page.html").read_text()
    assert "0.350 <small>± 0.071</small>" in page
    assert "data:image/webp" not in page
    assert "mIoU less that of" not in page
    for path in study.glob("results/*/*/000002.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"nothing can be compared yet: .*at step 1 of 2"):
        write_report([study], tmp_path / "page.html")


def test_the_page_shows_scores_pictures_and_curves(bench: Path, run: Path, tmp_path: Path) -> None:
    page = write_report([bench, run], tmp_path / "page.html").read_text()
    assert page.count("data:image/webp") == 2 * (1 + 3 * 2) + 2  # references, prompts by arms at their best; the run
    assert "0.405 <small>[" in page
    assert "lora, 0.001" in page
    assert "lora, 0.01<" not in page  # not the better one
    assert "a qwe dog &lt;1&gt;" in page
    assert "ether@0.06/cow/seed-0 (no photos); ether@0.06/hen/seed-0 (not done yet)" in page
    assert "against the learning rate" in page
    assert "Loss of the runs" in page
    assert "0.625" in page
    assert "weights abc" in page
    assert not re.search(r'(src|href)="(?!data:|#|https://arxiv)', page)


def test_settings_and_provenance_of_benchmarks_and_runs_are_shown(bench: Path, run: Path, tmp_path: Path) -> None:
    page = write_report([bench, run], tmp_path / "page.html").read_text()
    assert "No settings are recorded" in page
    settings = {"protocol": "my_<b>protocol", "data_dir": "/home/me/a/b/photos", "lpips": "/home/me/alex.pth"}
    settings |= {"training": {"pretrained_model_name_or_path": "/home/me/bases/sd", "max_train_steps": 7}}
    (bench / "config.yaml").write_text(yaml.safe_dump(settings))
    (bench / "results/ether@0.06/cow/seed-0.error.txt").write_text("there is no folder '/home/me/photos/cow': add it")
    for path in bench.glob("results/ether@*/*/seed-0.json"):
        facts = {"settings": {"n_blocks": 8}, "settings_hash": "5e77", "base_hash": "ba5e"}
        if "cat" in path.parts:
            facts["settings"] = {"training_adapter": "/home/me/c/d/lora.safetensors"}
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    page = write_report([bench, run], tmp_path / "page.html").read_text().replace("<wbr>", "")
    assert "my_&lt;b&gt;protocol" in page
    assert "…/b/photos" in page
    assert "/home/me" not in page
    assert "n_blocks 8; training_adapter …/d/lora.safetensors" in page
    assert "{max_train_steps: 7, pretrained_model_name_or_path: …/bases/sd}" in page
    assert "there is no folder &#39;…/photos/cow&#39;: add it" in page
    for name, value in (
        ("Hash of the settings, ether", "5e77"),
        ("max_train_steps", 50),
    ):
        assert re.search(rf'<th scope="row">{name}</th><td class="short">{value}</td>', page), name


def test_a_large_benchmark_leaves_prompts_out_and_says_so(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PICTURES > 1000
    monkeypatch.setattr("ether_diffusion.evaluation.subjects.sections.MAX_PICTURES", 6)
    page = write_report([bench], bench / "report.html").read_text()
    assert page.count("1 more prompts are not shown") == 2
    assert page.count("data:image/webp") == 2 * (1 + 3)


def test_what_was_not_scored_of_existing_images_is_shown(tmp_path: Path) -> None:
    results = [result("lora", None, "dog", 0.3) | {"folder": str(tmp_path)}]
    write_tables(tmp_path / "scores", results, ["dog/00.png: broken"])
    (tmp_path / "scores" / "results").mkdir()
    (tmp_path / "scores" / "results" / "dog.json").write_text(json.dumps(results[0]))
    page = write_report([tmp_path / "scores"], tmp_path / "page.html").read_text()
    assert "dog/00.png: broken" in page
    assert "0.305" in page


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    folders = [tmp_path / parts for parts in ("ether/dog/seed-0", "lora/dog/seed-0")]
    assert distinct_names(folders) == ["ether", "lora"]
    mixed = [tmp_path / parts for parts in ("ether/dog", "ether/cat", "lora/dog")]
    assert distinct_names(mixed) == ["ether/dog", "ether/cat", "lora/dog"]
    assert distinct_names(folders[:1]) == ["seed-0"]
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]


def test_the_program_names_its_page(bench: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(bench), str(run)])
    assert capsys.readouterr().out.strip() == str(bench / "report.html")
    with pytest.raises(SystemExit):
        main([str(bench.parent / "photos")])
    assert "neither a benchmark" in capsys.readouterr().err


def test_the_sheet_has_a_row_per_subject_and_a_column_per_method(bench: Path, tmp_path: Path) -> None:
    sheet_main([str(bench), str(tmp_path / "sheet.png"), "--subjects", "dog", "--prompt", "1"])
    picture = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert picture.size == (4 * (SIDE + GAP) + GAP, TITLE + TITLE + SIDE + GAP)  # reference, base, ether, lora
    row = 2 * TITLE + SIDE // 2
    colours = [picture.getpixel((GAP + column * (SIDE + GAP) + SIDE // 2, row)) for column in range(4)]
    assert colours == [(0, 0, 255), *[(255, 0, 0)] * 3]
    for arguments in (["--subjects", "cow"], ["--prompt", "2"]):
        with pytest.raises(SystemExit):
            sheet_main([str(bench), str(tmp_path / "other.png"), *arguments])
    assert not (tmp_path / "other.png").exists()


def test_an_arm_without_pictures_of_a_subject_leaves_its_place_empty(bench: Path, tmp_path: Path) -> None:
    """Not that of the last arm: every picture stays below its head."""
    shutil.rmtree(bench / "results" / "base" / "dog")
    diverged = bench / "results" / "ether@0.06" / "dog" / "seed-0.json"
    diverged.write_text(json.dumps(json.loads(diverged.read_text()) | {"images": []}))
    sheet_main([str(bench), str(tmp_path / "sheet.png"), "--subjects", "dog"])
    picture = Image.open(tmp_path / "sheet.png").convert("RGB")
    row = 2 * TITLE + SIDE // 2
    colours = [picture.getpixel((GAP + column * (SIDE + GAP) + SIDE // 2, row)) for column in range(4)]
    assert colours == [(0, 0, 255), (255, 255, 255), (255, 255, 255), (255, 0, 0)]  # reference, base, ether, lora


@needs_chromium
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_it_fits_every_screen(
    width: int, bench: Path, run: Path, study: Path, tmp_path: Path, open_page: Opener
) -> None:
    seen = seen_at(open_page, write_report([bench, study, run], tmp_path / "page.html"), width)
    assert (seen["outside"], seen["broken"], seen["unreached"]) == ([], [], 0)
    assert seen["large"] == width


@needs_chromium
def test_a_click_on_a_heading_sorts(bench: Path, tmp_path: Path, open_page: Opener) -> None:
    page = open_page(write_report([bench], tmp_path / "page.html"))
    table = page.locator("table.sortable").first

    def rows() -> list[str]:
        return [" ".join(row.split()[:2]) for row in table.locator("tbody tr").all_inner_texts()]

    before = rows()
    assert table.locator("thead button").count() == 6
    dino = table.get_by_role("button", name="DINO")
    dino.click()
    assert rows() == ["ether 0.06", "lora 0.001", "lora 0.01", before[0]]
    assert table.get_by_role("columnheader", name="DINO").get_attribute("aria-sort") == "descending"
    dino.press("Enter")
    assert rows() == [before[0], "lora 0.01", "lora 0.001", "ether 0.06"]
    table.get_by_role("button", name="Method").press("Space")
    assert [row.split()[0] for row in rows()] == ["lora", "lora", "ether", "base"]


@needs_chromium
@pytest.mark.parametrize("scripts", [True, False])
def test_every_picture_is_shown_and_the_theme_turns(
    scripts: bool, bench: Path, run: Path, tmp_path: Path, open_page: Opener
) -> None:
    place = write_report([bench, run], tmp_path / "page.html")
    place.write_text(place.read_text().replace('loading="lazy"', "").replace("<details>", "<details open>"))
    page = open_page(place, scripts=scripts)
    shown = page.locator("img").evaluate_all("all => all.map(each => each.naturalWidth > 0)")
    assert all(shown)
    assert len(shown) > 10
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_label("Switch between light and dark").press("Space")
    assert page.evaluate(paper) != light


def test_every_picture_says_what_it_shows(bench: Path, run: Path, study: Path, tmp_path: Path) -> None:
    page = write_report([bench, run, study], tmp_path / "page.html").read_text()
    texts = set(re.findall(r'<img [^>]*alt="(.*?)"', page))
    assert {"ether: a qwe dog &lt;1&gt;, seed 0", "Step 50: a qwe dog, seed 0"} <= texts
    assert any(text.startswith("ETHER, step 2: ") for text in texts)
    assert "" not in texts
