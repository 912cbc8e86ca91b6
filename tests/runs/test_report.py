"""The report of a run folder: what it shows, what it says it leaves out, and that it opens offline."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from page.chromium import Opener, needs_chromium, seen_at
from PIL import Image, ImageDraw

from ether_diffusion.runs.curves import moving_average
from ether_diffusion.runs.record import read_run
from ether_diffusion.runs.report import evenly_spaced, main, short_path, write_report

PROMPTS = ["a photo of qwe dog", "qwe dog in the snow"]
VOID = {"meta", "img", "input", "br", "link", "wbr", "hr"}


class Page(HTMLParser):
    """Every element with its attributes, and the text under each element with an id, a class or an h3."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.columns: dict[str, list[str]] = {}  # the h3 of a gallery → the alt texts below it
        self._open: list[str] = []
        self._heading = ""
        self.feed(html)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""
        if tag == "img" and self._heading:
            self.columns[self._heading].append(str(dict(attrs)["alt"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h3":
            self._heading = data
            self.columns.setdefault(data, [])
        if not {"style", "script"} & {*self._open}:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def picture(path: Path, shade: int = 0, size: tuple[int, int] = (320, 320)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (shade % 256, 90, 160))
    ImageDraw.Draw(image).ellipse((40, 40, 200, 220), fill=(250, 200, shade % 256))
    image.save(path)
    return path


def metrics(steps: range, **more: object) -> str:
    rows = [
        {"step": s, "loss": 1 / s, "lr": {"unet": 6e-3}, "grad_norm": 0.1 * s, "steps_per_second": 2.0, **more}
        for s in steps
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(
    tmp_path: Path, steps: tuple[int, ...] = (0, 100, 200), prompts: list[str] = PROMPTS, **settings: object
) -> Path:
    run = tmp_path / "dog"
    references = [picture(tmp_path / "pictures" / f"dog{i}.png", 60 * i, (320, 240 + i)) for i in range(3)]
    provenance = {
        "config_hash": "c0ffee",
        "base_hash": {"unet": "abc123"},
        "git_revision": "deadbeef",
        "versions": {"torch": "2.9.1"},
        "device": "cpu",
        "num_processes": 1,
        "trained_parameters": {"unet": 398592},
        "status": "finished",
        "step": 1200,
        "instance_images": [str(path) for path in references],
        "class_images": 0,
        "started": "2025-11-23T15:06:12+00:00",
        "seconds": 3725.0,
    }
    config = {
        "pretrained_model_name_or_path": "owner/sd15",
        "instance_prompt": prompts[0],
        "method": "ether_plus",
        "learning_rate": 6e-3,
        "max_train_steps": 1400,
        "a_rare_setting": "of no importance",
    }
    samples = [{"file": f"{i:02}.png", "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    for step in steps:
        for i, sample in enumerate(samples):
            picture(run / "samples" / f"step-{step:06}" / sample["file"], step + 20 * i)
    (run / "samples").mkdir(parents=True, exist_ok=True)
    (run / "samples" / "prompts.json").write_text(json.dumps(samples))
    (run / "provenance.json").write_text(json.dumps(provenance))
    (run / "config.yaml").write_text(yaml.safe_dump(config | settings))
    (run / "metrics.jsonl").write_text(metrics(range(1, 201)))
    return run


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run.resolve() / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_references_base_and_finetuned_stand_side_by_side(tmp_path: Path) -> None:
    page = report(make_run(tmp_path))
    columns = {heading: alts for heading, alts in page.columns.items() if alts}
    assert list(columns.items()) == [
        ("References", ["Reference dog0.png", "Reference dog1.png", "Reference dog2.png"]),
        ("Base model", [f"Base model: {prompt}, seed {i}" for i, prompt in enumerate(PROMPTS)]),
        ("Finetuned, step 200", [f"Step 200: {prompt}, seed {i}" for i, prompt in enumerate(PROMPTS)]),
    ]
    assert len(page.all("img")) == 3 + 2 + 2 + len(PROMPTS) * 3


def test_the_first_screen_has_every_prompt_before_it_has_another_seed(tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=[f"{animal} {i}" for animal in ("cat", "dog") for i in range(4)])
    samples = [{"file": f"{i:02}.png", "prompt": "cat" if i < 4 else "dog", "seed": i % 4} for i in range(8)]
    (run / "samples" / "prompts.json").write_text(json.dumps(samples))
    page = report(run)
    order = [("cat", 0), ("dog", 0), ("cat", 1), ("dog", 1), ("cat", 2), ("dog", 2)]
    assert page.columns["Base model"] == [f"Base model: {prompt}, seed {seed}" for prompt, seed in order]
    assert page.text.count("6 of 8 samples; all of them stand below.") == 2


def test_the_first_screen_says_what_was_trained(tmp_path: Path) -> None:
    text = report(make_run(tmp_path)).text
    for fact in ("398,592 parameters (1.6 MB)", "owner/sd15", "1,200 of 1,400 steps", "1 h 2 min", "Finished"):
        assert fact in text
    assert re.search(r"ETHER\+ learns\s+a photo of qwe dog", text)
    for origin in ("c0ffee", "abc123", "deadbeef", "2.9.1", "a_rare_setting"):
        assert origin in text


def test_the_base_column_shows_the_pictures_of_step_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=(0, 200))
    for name, colour in (("step-000000", "red"), ("step-000200", "lime")):
        Image.new("RGB", (64, 64), colour).save(run / "samples" / name / "00.png")
    colours = {}
    for image in report(run).all("img"):
        decoded = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1]))).convert("RGB")
        colours[image["alt"]] = decoded.getpixel((32, 32))
    red, green = colours["Base model: a photo of qwe dog, seed 0"], colours["Step 200: a photo of qwe dog, seed 0"]
    assert red[0] > 200 > 50 > red[1]
    assert green[1] > 200 > 50 > green[0]


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = report(run)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value or tag == "a", (tag, name, value)
        assert "url(http" not in (attributes.get("style") or "")
    style = "".join(re.findall(r"<style.*?</style>", (run / "report.html").read_text(), re.DOTALL))
    assert "@import" not in style
    assert "url(" not in style
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


def test_thumbnails_are_at_most_256_pixels_wide_and_keep_their_shape(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    picture(tmp_path / "pictures" / "dog0.png", size=(1000, 500))
    sizes = {}
    for image in report(run).all("img"):
        source = str(image["src"])
        assert source.startswith("data:image/webp;base64,")
        sizes[image["alt"]] = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size
    assert sizes["Reference dog0.png"] == (256, 128)
    assert max(width for width, _ in sizes.values()) == 256


def test_a_prompt_with_a_script_is_text(tmp_path: Path) -> None:
    nasty = """</q></title><script>alert(1)</script>"><img src=x onerror='alert(2)'>"""
    run = make_run(tmp_path, prompts=[nasty, "plain"])
    edit(run / "provenance.json", device="<script>", versions={"<b>": "<script>"})
    page = report(run)
    assert len(page.all("script")) == len(report(make_run(tmp_path / "harmless")).all("script"))
    assert page.all("b") == []
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
    assert nasty in page.text


def test_torn_last_line_of_metrics_is_ignored_and_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "lo')
    page = report(run)
    assert read_run(run).metrics[-1]["step"] == 200
    assert "1 line of metrics.jsonl was cut short" in page.text
    assert len(page.all("svg")) == 3


@pytest.mark.parametrize("content", [None, ""])
def test_without_metrics_a_sentence_stands_for_the_curves(tmp_path: Path, content: str | None) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    page = report(run)
    assert page.all("svg") == []
    assert "No step has been recorded yet" in page.text


def test_curves_show_the_parts_of_the_loss_where_there_is_a_prior(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = report(run).text
    assert "prior loss" not in text
    assert "instance loss" not in text
    (run / "metrics.jsonl").write_text(metrics(range(1, 50), instance_loss=0.2, prior_loss=0.3))
    text = report(run).text
    assert "prior loss" in text
    assert "instance loss" in text


def test_every_trained_component_has_a_learning_rate_in_its_own_colour(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rates = {"unet": 6e-3, "text_encoder": 3e-3, "text_encoder_2": 3e-3}
    (run / "metrics.jsonl").write_text(metrics(range(1, 30), lr=rates))
    assert all(name in report(run).text for name in rates)
    figure = re.search(r"<h3>Learning rate</h3>(.*?)</figure>", (run / "report.html").read_text(), re.DOTALL)
    assert figure is not None
    assert set(re.findall(r"stroke: var\(--(\w+)\)", figure[1])) == {"line", "c0", "c1", "c2"}


def test_a_step_whose_gradient_overflowed_is_a_gap_in_the_norm_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [json.loads(line) for line in metrics(range(1, 4)).splitlines()]
    del rows[1]["grad_norm"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(run)
    points = {i: len(re.findall(r"[ML]", str(path["d"]))) for i, path in enumerate(page.all("path"))}
    curves = [points[i] for i, path in enumerate(page.all("path")) if "var(--c0)" in str(path.get("style"))]
    assert curves == [3, 3, 2]


def test_the_loss_on_fixed_pictures_has_a_curve_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "Loss on fixed pictures" not in write_report(run).read_text()
    rows = [{"step": step, "loss": 1 / (step + 1), "times": [500], "by_time": [1.0]} for step in (0, 2)]
    (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    page = write_report(run).read_text()
    assert page.count("Loss on fixed pictures over the training steps") == 1
    assert "step 0 is the base" in page


@needs_chromium
@pytest.mark.parametrize("width", [360, 390, 768, 1400])
def test_it_fits_every_screen_and_pictures_enlarge(width: int, tmp_path: Path, open_page: Opener) -> None:
    """Nothing sticks out, no number is broken, and the space bar makes a picture large and small again."""
    run = make_run(tmp_path, max_train_steps=1_400_000, learning_rate=0.00012345678)
    score_samples(run, step_100=0.5, lost_200=0.7)
    edit(run / "provenance.json", step=1_234_567, trained_parameters={"unet": 398_592_123}, class_images=12_345)
    seen = seen_at(open_page, write_report(run), width)
    assert (seen["outside"], seen["broken"], seen["unreached"]) == ([], [], 0)
    assert seen["outline"] == "solid"
    assert seen["again"] == seen["small"] < 0.5 * width
    assert seen["large"] == width


def score_samples(run: Path, **likeness: float) -> None:
    """Give the steps of a run these likenesses; the base's CLIP-T is 0.4, that of a step called ``lost_…`` 0.2."""
    rows = [{"step": 0, "dino": 0.1, "dino_nearest": 0.2, "clip_t": 0.4, "references_nearest": 0.8}]
    for name, dino in likeness.items():
        step, clip_t = int(name.rpartition("_")[2]), 0.2 if name.startswith("lost") else 0.39
        rows.append({"step": step, "dino": dino, "dino_nearest": dino + 0.1, "clip_t": clip_t})
    (run / "sample_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def note_kept(run: Path, step: int) -> None:
    """Record of which step the adapter in ``best/`` is."""
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(facts | {"files": {"best/ether_weights.safetensors": step}}))


def test_the_best_step_is_named_with_its_rule_its_curves_and_its_file(tmp_path: Path) -> None:
    run = make_run(tmp_path, (0, 100, 200))
    assert "Which step is best" not in report(run).text
    score_samples(run, step_100=0.5, lost_200=0.7)
    (run / "best").mkdir()
    for path in (run, run / "best"):
        (path / "ether_weights.safetensors").write_bytes(b"0" * 20000)
    note_kept(run, 100)
    page = report(run)
    heads = re.findall(r"<th scope=\"col\" data-column=\"\d\">(.*?)</th>", (run / "report.html").read_text())
    assert heads == ["base", "100 (best)", "200"]
    assert "keeps 90% of the base's" in page.text
    assert "Likeness and copying" in page.columns
    assert "Following the prompt" in page.columns
    label = next(str(svg["aria-label"]) for svg in page.all("svg") if "Likeness" in str(svg["aria-label"]))
    assert label.endswith("the best is step 100")
    assert "best/ether_weights.safetensors" in [link.get("href") for link in page.all("a")]
    assert "the adapter of step 100, the best:" in page.text

    score_samples(run, step_100=0.5, step_200=0.7)  # killed before it kept the later one
    page = report(run)
    assert "the adapter of step 100, the best so far when the run was stopped" in page.text
    assert "the adapter of step 200" not in page.text


def test_a_new_token_is_named_with_its_file(tmp_path: Path) -> None:
    run = make_run(tmp_path, (0, 100))
    (run / "learned_embeds.safetensors").write_bytes(b"0" * 20000)
    assert "learned_embeds" not in report(run).text
    with (run / "config.yaml").open("a") as file:
        file.write("\nplaceholder_token: <dog>\n")
    page = report(run)
    assert "the embeddings of the new token <dog>, which ether.load adds, too (0.02 MB)" in page.text
    assert "learned_embeds.safetensors" in [link.get("href") for link in page.all("a")]


def test_a_best_step_that_thinning_would_leave_out_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, tuple(range(0, 2001, 100)))
    score_samples(run, **{f"step_{step}": 0.5 + (step == 1100) for step in range(100, 2001, 100)})
    assert "1,100 (best)" in report(run).text


def test_without_scores_of_the_base_no_step_is_called_best(tmp_path: Path) -> None:
    run = make_run(tmp_path, (100,))
    (run / "sample_scores.jsonl").write_text('{"step": 100, "dino": 0.5, "dino_nearest": 0.6, "clip_t": 0.3}\n')
    page = report(run)
    assert "No step is called the best" in page.text
    assert "Best step" not in page.text


def test_curves_wear_the_colours_of_the_page_and_ids_are_unique(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = report(run)
    html = (run / "report.html").read_text()
    assert not re.search(r"#(0[12])\1\1|#0303", html)
    assert html.count("stroke: var(--c0)") >= 3
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    for use in page.all("use"):
        assert str(use["xlink:href"])[1:] in ids


def test_many_steps_are_thinned_and_those_left_out_are_named(tmp_path: Path) -> None:
    steps = tuple(range(0, 3000, 100))
    page = report(make_run(tmp_path, steps=steps, prompts=["dog"]))
    grid = {int(m[1]) for image in page.all("img") if (m := re.match(r"Step (\d+): dog", str(image["alt"])))}
    note = re.search(r"(\d+) of 30 sampled steps are shown. Left out: ([\d, ]+)\.", page.text)
    assert note is not None
    left_out = {int(step) for step in note[2].split(",")}
    assert int(note[1]) == len(grid) + 1 == 12  # the base model's column is the twelfth
    assert 2900 in grid
    assert grid | left_out | {0} == set(steps)
    assert not grid & left_out
    assert "Left out" not in report(make_run(tmp_path / "short")).text


def test_many_prompts_stay_below_five_megabytes(tmp_path: Path) -> None:
    steps = tuple(range(12))
    run = make_run(tmp_path, steps=steps, prompts=[f"dog {i}" for i in range(40)])
    noise = Image.effect_noise((64, 64), 120).resize((256, 256), Image.Resampling.BICUBIC)
    noise.save(tmp_path / "noise.png")
    for path in (run / "samples").glob("*/*.png"):
        path.unlink()
        os.link(tmp_path / "noise.png", path)
    page = report(run)
    assert len([image for image in page.all("img") if "Reference" not in str(image["alt"])]) == 40 * 12 + 12
    assert (run / "report.html").stat().st_size < 5e6


def test_a_reference_that_is_gone_or_no_picture_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "pictures" / "dog1.png").unlink()
    (tmp_path / "pictures" / "dog2.png").write_text("not a picture")
    page = report(run)
    assert page.columns["References"] == ["Reference dog0.png"]
    assert "No longer readable where the run found them: dog1.png, dog2.png." in page.text
    assert str(tmp_path) not in page.text


def test_a_sample_that_is_missing_leaves_a_labelled_gap(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "samples" / "step-000100" / "01.png").unlink()
    labels = [span.get("aria-label") for span in report(run).all("span") if span.get("class") == "missing"]
    assert labels == ["Missing: Step 100: qwe dog in the snow, seed 1"]


def test_a_run_that_has_just_begun_gives_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=(0,))
    (run / "metrics.jsonl").unlink()
    edit(run / "provenance.json", status="running", step=0)
    page = report(run)
    assert "No samples yet." in page.text
    assert "Running" in page.text
    assert page.columns["Finetuned"] == []


def test_scores_stand_in_a_table_when_there_are_any(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "DINO" not in report(run).text
    (run / "scores.json").write_text(json.dumps({"DINO": {"base": 0.31, "finetuned": 0.66}, "LPIPS": {"base": 0.7}}))
    cells = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (write_report(run)).read_text()))
    assert "Metric Base Finetuned DINO 0.310 0.660 LPIPS 0.700 –" in cells


JUDGING = {
    "judges": {
        "dino": {"model": "facebook/dino-vits16", "weights": "0123456789ab", "preprocessing": "<i>Vit</i>: size 224"},
        "libraries": {"torch": "2.9.1"},
    },
    "token": "<qwe>",
    "seed": 7,
    "step": 200,
    "prompts": 2,
    "images": {"base": 8, "finetuned": 8, "references": 5},
}


def test_scores_name_their_judges_and_the_few_pictures_behind_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    scores = {"DINO": {"base": 0.31, "finetuned": 0.66, "references": 0.7}, "nearest reference": {"finetuned": 0.8}}
    (run / "scores.json").write_text(json.dumps({"scores": scores} | JUDGING))
    page = report(run)
    cells = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (run / "report.html").read_text()))
    assert "Metric Base Finetuned References DINO 0.310 0.660 0.700 nearest reference – 0.800 –" in cells
    text = re.sub(r"\s+", " ", page.text)
    assert text.count("8 pictures of 2 prompts, one training, one seed (7)") == 2  # the first screen and the table
    assert "Finetuned is step 200." in text
    assert 'CLIP-T is of the prompts without the rare word "<qwe>".' in text
    for fact in ("Judges: dino facebook/dino-vits16 ", "weights 0123456789ab", "<i>Vit</i>: size 224", "torch 2.9.1"):
        assert fact in text
    assert page.all("i") == []
    assert "not recorded, nor" not in text


def test_scores_of_the_first_format_are_shown_without_judges(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    old = {"DINO": {"base": 0.31, "finetuned": 0.66}}
    (run / "scores.json").write_text(json.dumps(old))
    assert read_run(run).scores == old
    assert read_run(run).judging is None
    text = report(run).text
    assert "Judges not recorded" in text
    assert "one seed" not in text


def test_scores_without_a_token_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    few = {"token": None, "seed": None, "prompts": 1, "images": {"finetuned": 1, "references": 1}}
    (run / "scores.json").write_text(json.dumps({"scores": {"DINO": {"finetuned": 0.66}}} | JUDGING | few))
    assert read_run(run).judging.caption == (  # type: ignore[union-attr]
        "1 picture of 1 prompt, one training, one seed: another seed gives other values. Finetuned is step 200. "
        "CLIP-T is of the prompts as they are written, a rare word in them included."
    )


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json"])
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {name}.*Give the folder"):
        write_report(run)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (12, "12 parameters (0.0 kB)"),
        (99_456, "99,456 parameters (397.8 kB)"),
        (859_520_964, "859,520,964 parameters (3.4 GB)"),
    ],
)
def test_trained_parameters_in_words(tmp_path: Path, count: int, words: str) -> None:
    run = make_run(tmp_path)
    edit(run / "provenance.json", trained_parameters={"unet": count - 2, "text_encoder": 2})
    assert read_run(run).trained == words


@pytest.mark.parametrize(
    ("method", "own", "others"),
    [("ether_plus", "n_blocks", ["rank"]), ("lora", "rank", ["n_blocks"]), ("full", "seed", ["n_blocks", "rank"])],
)
def test_only_the_settings_of_the_method_are_highlighted(
    tmp_path: Path, method: str, own: str, others: list[str]
) -> None:
    run = make_run(tmp_path, method=method, n_blocks=4, rank=8, seed=3)
    settings = read_run(run).settings()
    assert own in settings
    assert not settings.keys() & set(others)


def test_a_setting_left_open_is_no_highlight_and_the_learning_rate_is_the_one_that_was_used(tmp_path: Path) -> None:
    run = make_run(tmp_path, learning_rate=None, resolution=None)
    warmup = "".join(metrics(range(s, s + 1), lr={"unet": 1e-3 * s, "text_encoder": 1.0}) for s in (1, 2, 3))
    (run / "metrics.jsonl").write_text(warmup)
    settings = read_run(run).settings()
    assert settings["learning_rate"] == "0.003"
    assert "resolution" not in settings
    (run / "metrics.jsonl").unlink()
    assert "learning_rate" not in read_run(run).settings()


def test_folders_are_named_by_their_last_two_parts(tmp_path: Path) -> None:
    here = str(tmp_path)
    run = make_run(
        tmp_path,
        pretrained_model_name_or_path=f"{here}/models/sd15",
        output_dir=f"{here}/runs/dog",
        resume=f"{here}/runs/dog/checkpoints/step-000200",
        cache_dir=f"{here}/shared/cache",
        instance_data_dir="../photos/pets/dog",
        class_data_dir=f"{here}/class/dogs",
    )
    text = report(run).text
    assert here not in text
    assert here not in (run / "report.html").read_text()
    assert text.count("…/models/sd15") == 2  # the first screen and the settings
    for short in ("…/runs/dog", "…/checkpoints/step-000200", "…/shared/cache", "…/pets/dog", "…/class/dogs"):
        assert short in text


@pytest.mark.parametrize("path", ["owner/sd15", "runs/dog", "dog", "latest"])
def test_a_hub_id_or_a_short_path_stays_whole(path: str) -> None:
    assert short_path(path) == path


def test_evenly_spaced_keeps_the_ends() -> None:
    assert evenly_spaced(range(0, 101), 5) == [0, 25, 50, 75, 100]
    assert evenly_spaced([0, 200], 12) == [0, 200]


def test_moving_average_is_the_weighted_mean_of_the_past() -> None:
    values, window = [3.0, -1.0, 4.0, 1.5], 5
    weights = [(1 - 1 / window) ** k for k in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, reversed(values), strict=True)) / sum(weights)
    assert moving_average(values, window)[-1] == pytest.approx(expected, rel=1e-12)
    assert moving_average(values, 1) == values


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_module_rewrites_the_report_and_prints_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    write_report(run).write_text("old")
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    runpy.run_module("ether_diffusion.runs.report", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(run.resolve() / "report.html")
    assert "ETHER+" in (run / "report.html").read_text()


def test_the_command_line_refuses_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    assert "no config.yaml" in capsys.readouterr().err
