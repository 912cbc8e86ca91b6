"""Size and load time of every kind of page: a run, many runs, a benchmark, a study of controls, a comparison.

The folders are made up, with as much in them as a large study has: settings, scores, curves, and pictures whose detail
falls with the frequency as that of photos does, all different. The pages are written by the programs that write them
for users, and opened in Chromium, each time in a new profile. "load" is the browser's load event, "paint" the first
paint with content; both are medians, in milliseconds after the navigation began.

    pip install playwright                            # drives a Chromium that is there already
    python benchmarks/pages.py                        # figures
    python benchmarks/pages.py --keep pages           # the pages stay in this folder, for tests/axe.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from ether_diffusion.evaluation.compare.columns import columns_of, read_sources
from ether_diffusion.evaluation.compare.page import write_page
from ether_diffusion.evaluation.controls.findings import write_differences, write_outline
from ether_diffusion.evaluation.overview import write_report as write_overview
from ether_diffusion.page.text import markdown_table
from ether_diffusion.playground.pairs import write_pairs
from ether_diffusion.runs.report import write_report
from ether_diffusion.runs.sample import Request
from ether_diffusion.training.dreambooth_config import DreamBoothConfig

SCENES = ("on a beach", "in the snow", "in a forest at dawn", "on a wooden table beside a cup", "in a city at night")
PROMPTS = [f"a photo of a qwe dog {scene}{view}" for view in ("", ", from above", ", a close view", ", a painting",
                                                             ", in black and white") for scene in SCENES]  # fmt: skip
ARMS = {("base", None): 0.31, ("ether_plus", 6e-3): 0.62, ("lora", 1e-4): 0.58, ("oft", 1e-3): 0.57}
SUBJECTS = 30


def photo(seed: int, side: int) -> Image.Image:
    """A square picture, different for every seed, whose amplitudes fall with the frequency as those of photos do."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(side)[:, None, None], np.fft.rfftfreq(side)[None, :, None]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / side)
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side, 3)), axes=(0, 1)) * falling, (side, side), (0, 1))
    colours = 110 + 40 * noise / noise.std() + rng.uniform(-30, 30, 3)
    image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    x, y, half = (int(side * share) for share in rng.uniform((0.3, 0.3, 0.12), (0.7, 0.7, 0.25)))
    colour = (int(rng.integers(150, 255)), 120, 60)
    ImageDraw.Draw(image).ellipse((x - half, y - half, x + half, y + half), fill=colour)
    return image


def save_photo(path: Path, seed: int, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, side).save(path, compress_level=1)


def make_run(folder: Path, steps: range, prompts: int, method: str = "ether_plus", seed: int = 0) -> Path:
    """A run folder with samples at ``steps``, scores of them, settings and curves."""
    photos = [folder.parent / f"{folder.name}-photos" / f"{number}.png" for number in range(5)]
    for number, path in enumerate(photos):
        save_photo(path, 10_000 * (seed + 1) + number, 512)
    config = DreamBoothConfig(
        "playground", output_dir=folder, instance_data_dir=photos[0].parent, instance_prompt="a photo of a qwe dog"
    )
    config.method, config.max_train_steps = method, steps[-1]
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = [{"file": f"{n:02d}.png", "prompt": PROMPTS[n % len(PROMPTS)], "seed": n} for n in range(prompts)]
    for place, step in enumerate(steps):
        for number in range(prompts):
            path = folder / "samples" / f"step-{step:06d}" / f"{number:02d}.png"
            save_photo(path, 1000 * seed + 100 * place + number, 512)
    (folder / "samples" / "prompts.json").write_text(json.dumps(asked))
    rows = [
        {"step": s, "loss": 0.2 + 0.8 / s**0.5, "lr": {"unet": 6e-3}, "grad_norm": 1 / s**0.5, "steps_per_second": 2.0}
        for s in range(1, steps[-1] + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = [
        {"step": s, "dino": 0.3 + 0.4 * s / steps[-1], "dino_nearest": 0.4 + 0.5 * s / steps[-1], "clip_t": 0.31}
        | {"references": 0.7, "references_nearest": 0.8}
        for s in steps
    ]
    (folder / "sample_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    (folder / "scores.json").write_text(json.dumps({"DINO": {"base": 0.31, "finetuned": 0.68, "references": 0.71}}))
    provenance = {
        "status": "finished", "step": steps[-1], "seconds": 1234.5, "device": "cpu", "config_hash": "c0ffee" * 10,
        "base_hash": {"unet": "0123456789abcdef" * 4}, "trained_parameters": {"unet": 398_592},
        "versions": {"torch": "2.9.1", "diffusers": "0.42.1"}, "instance_images": [str(path) for path in photos],
        "started": "2026-11-20T09:00:00+00:00",
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def run_page(folder: Path) -> Path:
    """A run of 12 steps with samples of 16 prompts."""
    return write_report(make_run(folder / "dog", range(0, 1200, 100), 16))


def many_runs_page(folder: Path) -> Path:
    """Eight runs of three methods, 5 steps with samples of 4 prompts each."""
    methods = ("ether_plus", "lora", "ether")
    runs = [
        make_run(folder / f"subject-{number}", range(0, 500, 100), 4, methods[number % 3], number)
        for number in range(8)
    ]
    return write_overview(runs, folder / "report.html")


def benchmark_page(folder: Path) -> Path:
    """A benchmark of 3,000 pictures: 30 subjects, 4 methods, 25 prompts."""
    keys, rng = [], np.random.default_rng(0)
    for number in range(SUBJECTS):
        subject = f"subject-{number:02d}"
        reference = folder / "subjects" / subject / "0.png"
        save_photo(reference, 50_000 + number, 128)
        for place, ((arm, rate), mean) in enumerate(ARMS.items()):
            key = f"{arm if rate is None else f'{arm}@{rate:g}'}/{subject}/seed-0"
            images = [
                {"file": f"{n:04d}.png", "prompt": prompt, "dino": mean + float(rng.normal(0, 0.05)),
                 "clip_t": 0.3 + float(rng.normal(0, 0.01)), "clip_i": mean + 0.1}
                for n, prompt in enumerate(PROMPTS)
            ]  # fmt: skip
            for n in range(len(PROMPTS)):
                path = folder / "images" / key / "images" / f"{n:04d}.png"
                save_photo(path, 100_000 + 10_000 * place + 100 * number + n, 128)
            result: dict[str, object] = {
                "arm": arm, "learning_rate": rate, "subject": subject, "seed": 0, "images": images,
                "references": [str(reference)], "folder": f"images/{key}/images",
                "judges": {"dino": {"model": "facebook/dino-vits16", "weights": "abc"}},
            }  # fmt: skip
            if rate is not None:
                result["trained_parameters"] = {"unet": 100_000 * (place + 1)}
            path = folder / "results" / f"{key}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
            keys.append(key)
    (folder / "jobs.json").write_text(json.dumps(keys))
    return write_overview([folder], folder / "report.html")


def controls_page(folder: Path) -> Path:
    """A study of controls: three methods, two seeds, eight pairs."""
    write_pairs(folder / "pairs", 8)
    jobs = {(arm, seed): value + 0.02 * seed for arm, value in
            {"ether_plus": 0.52, "lora": 0.49, "encoder alone": 0.28}.items() for seed in (0, 1)}  # fmt: skip
    keys = {job: f"{job[0]}/seed-{job[1]}" for job in jobs}
    write_outline(folder, list(keys.values()), 400, None)
    classes = ("sky", "sea", "grass", "tree", "house", "road", "person", "animal")
    for (arm, seed), key in keys.items():
        for number in range(8):
            save_photo(folder / "images" / key / "000400" / f"{number:05d}-0.png", 700_000 + 10 * number + seed, 128)
        for steps in (100, 200, 400):
            miou = jobs[arm, seed] * steps / 400
            found = {
                "arm": arm, "rate": None, "seed": seed, "steps": steps, "folder": f"images/{key}/000400", "pairs": 8,
                "samples_per_pair": 1, "warnings": [], "choices": {"classes": len(classes)},
                "originals": {"miou": 0.91}, "judges": {"segmenter": {"model": "playground", "weights": "abc"}},
                "scores": {"miou": {"mean": miou, "spread": None}},
                "trained_parameters": {"unet": 100_000, "control_encoder": 50_000},
                "classes": [{"name": name, "iou": miou + 0.01 * place} for place, name in enumerate(classes)],
            }  # fmt: skip
            path = folder / "results" / key / f"{steps:06d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
    write_differences(folder, ["encoder alone"])
    return write_overview([folder], folder / "report.html")


def comparison_page(folder: Path) -> Path:
    """A comparison of three runs: 8 prompts with 2 seeds, each in four columns."""
    runs = [make_run(folder / name, range(0, 200, 100), 1, seed=n) for n, name in enumerate(("dog", "style", "lora"))]
    sources = read_sources(runs)
    request = Request(PROMPTS[:8], [0, 1], [1.0], 30, 7.5, 512, 512, 4)
    columns = columns_of(sources, request.strengths)
    drawn = (
        (column, prompt, seed, photo(900_000 + 1000 * place + 10 * number + seed, 512))
        for place, column in enumerate(columns)
        for number, prompt in enumerate(request.prompts)
        for seed in request.seeds
    )
    return write_page(sources, columns, request, "float32", drawn, folder / "compared")


KINDS: dict[str, Callable[[Path], Path]] = {
    "run": run_page,
    "many-runs": many_runs_page,
    "benchmark": benchmark_page,
    "controls": controls_page,
    "comparison": comparison_page,
}

TIMES = """() => [
  performance.getEntriesByType("navigation")[0].loadEventEnd,
  performance.getEntriesByName("first-contentful-paint")[0]?.startTime ?? NaN,
]"""


def measure(pages: dict[str, Path], rounds: int) -> list[list[str]]:
    """A row for each page: its size, its pictures, and the medians of its times."""
    from playwright.sync_api import sync_playwright

    times: dict[str, list[list[float]]] = {name: [] for name in pages}
    counts: dict[str, int] = {}
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            for name, path in pages.items():
                context = browser.new_context(viewport={"width": 1400, "height": 900})
                page = context.new_page()
                page.goto(path.as_uri(), wait_until="load")
                page.wait_for_timeout(300)  # the paint may come after the load
                times[name].append(page.evaluate(TIMES))
                counts[name] = page.locator("img").count()
                context.close()
        browser.close()
    rows = []
    for name, path in pages.items():
        load, paint = (statistics.median(column) for column in zip(*times[name], strict=True))
        rows.append([name, f"{counts[name]:,}", f"{path.stat().st_size / 1e6:.2f}", f"{load:.0f}", f"{paint:.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--keep", type=Path, help="new folder, in which the pages stay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        pages = {kind: KINDS[kind](Path(temporary) / kind) for kind in given.kinds}
        print(markdown_table(["page", "pictures", "MB", "load, ms", "paint, ms"], measure(pages, given.rounds)))
        if given.keep is not None:
            given.keep.mkdir(parents=True)
            for kind, path in pages.items():
                shutil.copy(path, given.keep / f"{kind}.html")


if __name__ == "__main__":
    main()
