"""train_controlnet.py on small models: both ways of control, what is trained, saved, resumed, drawn and refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file
from training.helpers import (
    checkpoints,
    draw_photo,
    metrics,
    optimizer_state,
    pixels,
    provenance,
    relative_change,
    same_tensors,
    samples,
    trained,
)

import ether_diffusion as ether
import ether_diffusion.training.loop as loop
from ether_diffusion.cli import main
from ether_diffusion.control.conditions import colour_map, load_map
from ether_diffusion.control.pipeline import controlled
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.sd import StableDiffusion
from ether_diffusion.metrics.control_tasks import Pair
from ether_diffusion.metrics.segmentation import Segmenter
from ether_diffusion.playground.pairs import write_pairs
from ether_diffusion.playground.tiny import tiny_controlnet
from ether_diffusion.private import forget_accelerator
from ether_diffusion.runs.control_drawing import Drawing
from ether_diffusion.runs.drawing import draw_samples, load_run
from ether_diffusion.runs.record import read_run
from ether_diffusion.training import control
from ether_diffusion.training.cli import parse_config
from ether_diffusion.training.control_config import ControlConfig
from ether_diffusion.training.finish import _not_uploaded

SMALL: dict[str, Any] = {
    "max_train_steps": 3,
    "num_validation_images": 0,
    "num_inference_steps": 2,
    "resolution": 32,
    "condition": "image",
    "learning_rate": 0.02,
}
Train = Callable[..., Path]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs in the layout of an image folder; the condition is the picture's negative."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(4):
        path = draw_photo(folder / "images" / f"{number}.png", number, (80, 64))
        (folder / "hints").mkdir(exist_ok=True)
        with Image.open(path) as image:
            Image.fromarray(255 - np.asarray(image)).save(folder / "hints" / f"{number}.png")
        rows.append({"file_name": f"images/{number}.png", "conditioning_image": f"hints/{number}.png", "text": "a dog"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def controlnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet whose zero convolutions have learnt something."""
    folder = tmp_path_factory.mktemp("base") / "controlnet"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = tiny_controlnet()
        for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def train(tmp_path: Path, base_folder: Path, pairs: Path) -> Train:
    """Train with ``SMALL`` and these changes, and return the run folder."""

    def run(name: str = "run", **changes: Any) -> Path:
        forget_accelerator()
        values = {"pretrained_model_name_or_path": str(base_folder), "output_dir": tmp_path / name}
        config = ControlConfig(**SMALL | values | {"train_data_dir": str(pairs)} | changes)
        control.run(config)
        return config.output_dir

    return run


WAYS: dict[str, dict[str, Any]] = {
    "encoder and ETHER": {"method": "ether"},
    "encoder and ETHER+": {"method": "ether_plus"},
    "encoder alone": {"method": "none"},
    "encoder and LoRA": {"method": "lora"},
    "encoder and OFT": {"method": "oft"},
    "encoder and the whole UNet": {"method": "full", "learning_rate": 1e-3},
    "new ControlNet": {"control": "controlnet", "method": "ether_plus", "encoder_lr": 1e-2},
    "new ControlNet, all of it": {
        "control": "controlnet",
        "method": "none",
        "train_controlnet": "all",
        "encoder_lr": 1e-2,
    },
    "given ControlNet": {"control": "controlnet", "method": "ether"},
    "given ControlNet and LoRA": {"control": "controlnet", "method": "lora"},
}


@pytest.fixture
def way(request: pytest.FixtureRequest, controlnet_folder: Path) -> dict[str, Any]:
    """The settings of a way of control."""
    settings = dict(WAYS[request.param])
    if settings.get("method") in ("lora", "oft"):
        pytest.importorskip("peft")
    if request.param.startswith("given"):
        settings["controlnet_model_name_or_path"] = str(controlnet_folder)
    return settings


def draw(pipe: DiffusionPipeline, prompt: str, condition: Image.Image, seed: int = 0) -> np.ndarray:
    """A picture under a control, by the pipeline's own ``__call__``."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "generator": torch.Generator().manual_seed(seed),
        "height": 64,
        "width": 64,
    }
    if hasattr(pipe, "controlnet"):
        return np.array(pipe(prompt, condition, **settings).images[0])
    with controlled(pipe, condition):
        return np.array(pipe(prompt, **settings).images[0])


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_fresh_pipeline_draws_the_last_samples_of_training(way: dict[str, Any], train: Train) -> None:
    run = train(num_validation_images=1, num_validation_pairs=2, resolution=64, **way)
    drawn = samples(run)
    assert list(drawn) == [
        *("conditions/00.png", "conditions/01.png", "step-000000/00.png", "step-000000/01.png"),
        *("step-000003/00.png", "step-000003/01.png"),
    ]
    assert not np.array_equal(drawn["step-000000/00.png"], drawn["step-000003/00.png"])
    condition = Image.open(run / "samples" / "conditions" / "01.png")
    assert np.array_equal(draw(load_run(run), "a dog", condition), drawn["step-000003/01.png"])
    other = Image.fromarray(255 - np.asarray(condition))
    assert not np.array_equal(draw(load_run(run), "a dog", other), drawn["step-000003/01.png"])


CARDS = ("encoder and ETHER", "encoder alone", "encoder and LoRA", "encoder and the whole UNet", "new ControlNet")
"""Ways whose cards differ, with those of a given ControlNet."""


@pytest.mark.parametrize("way", [*CARDS, "given ControlNet", "given ControlNet and LoRA"], indirect=True)
def test_the_model_cards_code_loads_the_run(
    way: dict[str, Any], train: Train, base_folder: Path, controlnet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(num_validation_images=1, num_validation_pairs=1, resolution=64, **way)
    assert str(controlnet_folder.parent) not in (run / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert block is not None
    *loading, drawing = block[1].strip().splitlines()
    image = "image" if way.get("control") == "controlnet" else "control_image"
    assert drawing == f'image = pipe(prompt="a dog", {image}=control_image).images[0]'
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    code = "\n".join(loading).replace("path/to/controlnet", str(controlnet_folder))
    exec(code.replace(f"path/to/{base_folder.name}", str(base_folder)), names)
    image = names["pipe"]("a dog", names["control_image"], num_inference_steps=1).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_everything_that_is_trained_moves_and_is_counted(way: dict[str, Any], train: Train) -> None:
    run = train(max_train_steps=6, checkpointing_steps=3, **way)
    early, late = trained(run, 3), trained(run, 6)
    still = [key for key in late if torch.equal(early[key], late[key])]
    assert not still
    counted = provenance(run)["trained_parameters"]
    assert sum(counted.values()) == sum(tensor.numel() for tensor in late.values())
    expected = {"encoder": {"control_encoder"}, "controlnet": set()}[way.get("control", "encoder")]
    if way["method"] != "none":
        expected = expected | {"controlnet" if "control" in way else "unet"}
    if "control" in way and "controlnet_model_name_or_path" not in way:
        expected = expected | {"controlnet_weights"}
    assert set(counted) == expected
    assert {key.split(".")[0] for key in late} == expected
    assert all(tensor.dtype == torch.float32 for tensor in late.values())


def test_learning_rates_are_the_papers_and_the_encoders_is_capped(train: Train) -> None:
    rates = metrics(train("paper", method="ether_plus", learning_rate=None))[0]["lr"]
    assert rates == {"unet": 1e-3, "control_encoder": 1e-4}
    rates = metrics(train("oft", method="naive", learning_rate=None))[0]["lr"]
    assert rates == {"unet": 1e-5, "control_encoder": 1e-5}
    rates = metrics(train("own", method="ether", learning_rate=1e-2, encoder_lr=3e-3))[0]["lr"]
    assert rates == {"unet": 1e-2, "control_encoder": 3e-3}


def test_the_papers_targets_are_the_default(train: Train) -> None:
    run = train(method="ether")
    keys = load_file(run / "ether_weights.safetensors")
    assert any(key.endswith("ff.net.0.proj.u") for key in keys)
    assert any(key.endswith("attn1.to_q.u") for key in keys)


@pytest.mark.parametrize("way", ["encoder and ETHER+", "new ControlNet", "encoder and LoRA"], indirect=True)
def test_a_resumed_run_is_the_uninterrupted_one(
    way: dict[str, Any], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = way | {"max_train_steps": 6, "checkpointing_steps": 2, "random_flip": True, "train_batch_size": 2}
    whole = train("whole", **common)

    class Unplugged(BaseException):
        pass

    original = loop._Run.sample_if_due

    def unplug(run: Any, step: int, interrupts: Any) -> None:
        original(run, step, interrupts)
        if step == 5:
            raise Unplugged

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "sample_if_due", unplug)
        with pytest.raises(Unplugged):
            train("cut", **common)
    cut = train("cut", resume="latest", **common)
    assert metrics(whole) == metrics(cut)
    assert same_tensors(trained(whole, 6), trained(cut, 6))
    assert same_tensors(optimizer_state(whole, 6), optimizer_state(cut, 6))
    assert checkpoints(whole) == checkpoints(cut)


@pytest.mark.parametrize("way", ["encoder and ETHER+", "new ControlNet"], indirect=True)
def test_the_average_of_a_control_is_what_is_saved_and_goes_on_after_a_resume(
    way: dict[str, Any], train: Train
) -> None:
    common = way | {"checkpointing_steps": 2, "ema_decay": 0.9}
    whole, cut = train("whole", max_train_steps=4, **common), train("cut", max_train_steps=2, **common)
    train("cut", max_train_steps=4, resume="latest", **common)
    found = [load_file(run / "checkpoints" / "step-000004" / "averaged.safetensors") for run in (whole, cut)]
    assert same_tensors(*found)
    assert found[0].keys() == trained(whole, 4).keys()
    assert not same_tensors(found[0], trained(whole, 4))
    saved = [
        file for file in whole.rglob("*.safetensors") if "checkpoints" not in file.parts and "cache" not in file.parts
    ]
    kept = {tensor.numpy().tobytes() for file in saved for tensor in load_file(file).values()}
    assert {tensor.numpy().tobytes() for tensor in found[0].values()} <= kept


def test_accumulation_equals_the_larger_batch(train: Train) -> None:
    large = train("large", train_batch_size=4)
    rounds = train("rounds", train_batch_size=1, gradient_accumulation_steps=4)
    assert relative_change(trained(rounds, 3), trained(large, 3)) < 1e-4


def test_data_workers_change_nothing(train: Train) -> None:
    assert same_tensors(trained(train("none"), 3), trained(train("two", dataloader_num_workers=2), 3))


def test_prompts_are_left_out_by_chance(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = control.to_batch

    def to_batch(stacked: Any, *arguments: Any) -> Any:
        seen.extend(stacked["prompts"])
        return original(stacked, *arguments)

    monkeypatch.setattr(control, "to_batch", to_batch)
    train(train_batch_size=16, proportion_empty_prompts=0.5)
    assert set(seen) == {"", "a dog"}
    seen.clear()
    train("all", train_batch_size=16, proportion_empty_prompts=0.0)
    assert set(seen) == {"a dog"}


def test_canny_edges_are_made_of_pictures_alone(train: Train, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    for number in range(2):
        draw_photo(tmp_path / "photos" / f"{number}.png", number)
    run = train(
        train_data_dir=str(tmp_path / "photos"), condition="canny", resolution=64, num_validation_images=1, seed=1
    )
    shown = pixels(run / "samples" / "conditions" / "00.png")
    assert np.array_equal(shown[..., 0], cv2.Canny(pixels(tmp_path / "photos" / "0.png"), 100, 200))
    assert provenance(run)["training_pairs"] == 2


def test_maps_are_made_by_a_model_once_for_all_runs(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "world", 3)
    settings = {
        "train_data_dir": str(tmp_path / "world" / "images"),
        "condition": "segmentation",
        "segmenter": "playground",
        "cache_dir": tmp_path / "cache",
        "num_validation_images": 1,
        "resolution": 64,
    }
    run = train(**settings)
    maps = sorted((tmp_path / "cache" / "maps").iterdir())
    assert len(maps) == 3
    truth = {path.name: load_map(path) for path in sorted((tmp_path / "world" / "maps").iterdir())}
    made = [load_map(path) for path in maps]
    assert all(max(np.mean(ids == each) for each in made) > 0.9 for ids in truth.values())
    shown = pixels(run / "samples" / "conditions" / "00.png")
    assert any(np.array_equal(shown, colour_map(ids)) for ids in made)

    def no_more(*arguments: Any) -> Any:
        raise AssertionError("a map is made anew")

    monkeypatch.setattr(Segmenter, "maps", no_more)
    assert same_tensors(trained(train("again", **settings), 3), trained(run, 3))


def test_the_playground_has_pairs_without_end(train: Train) -> None:
    run = train(train_data_dir="playground", condition=None, num_validation_images=1, resolution=64)
    assert "condition: map" in (run / "config.yaml").read_text()
    assert provenance(run)["training_pairs"] == 0
    assert "pairs without end" in (run / "report.html").read_text()


def test_the_report_shows_what_controls_the_samples(train: Train) -> None:
    page = (train(num_validation_images=1, num_validation_pairs=2) / "report.html").read_text()
    assert "learns to follow control images" in page
    assert page.count('alt="Control: a dog"') == 4  # two on the first screen, two beside the samples by step


def test_own_conditions_for_the_samples(train: Train, tmp_path: Path) -> None:
    wide = Image.new("RGB", (80, 50), "blue")
    wide.paste("red", (10, 0, 70, 50))
    wide.save(tmp_path / "red.png")
    run = train(
        validation_prompt=["a cat"],
        validation_image=[str(tmp_path / "red.png")],
        num_validation_images=1,
        resolution=64,
    )
    assert (pixels(run / "samples" / "conditions" / "00.png") == (255, 0, 0)).all()
    assert json.loads((run / "samples" / "prompts.json").read_text()) == [
        {"file": "00.png", "seed": 0, "prompt": "a cat", "condition": "conditions/00.png"}
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": None}, "name the training pairs with either train_data_dir or dataset_name"),
        ({"dataset_name": "x"}, "name the training pairs with either train_data_dir or dataset_name"),
        ({"condition": "segmentation"}, "condition=segmentation needs segmenter"),
        (
            {"condition": "segmentation", "segmenter": "playground", "train_data_dir": "playground"},
            "the playground has exact maps of its own",
        ),
        ({"validation_image": "a.png"}, "one validation_prompt for each validation_image"),
        ({"canny_low": 300}, "canny_low 300 must be at most canny_high 200"),
        ({"proportion_empty_prompts": 2.0}, "proportion_empty_prompts must be from 0 to 1, not 2.0"),
        ({"train_text_encoder": True}, "train_text_encoder is for train_dreambooth.py"),
        ({"train_controlnet": "all"}, "need control=controlnet"),
        ({"control": "controlnet", "method": "full"}, "method=none, train_controlnet=all"),
        ({"control": "controlnet", "train_controlnet": "nothing"}, "a new ControlNet has zero convolutions"),
        ({"control": "controlnet", "method": "lora"}, "method=lora adapts a given ControlNet only"),
        (
            {
                "control": "controlnet",
                "method": "none",
                "train_controlnet": "nothing",
                "controlnet_model_name_or_path": "x",
            },
            "trains nothing",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, train: Train) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(**changes)


def test_mistakes_in_the_data_end_in_one_line(
    base_folder: Path, pairs: Path, tmp_path: Path, controlnet_folder: Path
) -> None:
    def said(**changes: Any) -> str:
        values = SMALL | {"pretrained_model_name_or_path": base_folder, "output_dir": tmp_path / "run"} | changes
        with pytest.raises(SystemExit) as ended:
            control.main([f"--{name}={value}" for name, value in values.items()])
        return str(ended.value.code)

    (tmp_path / "empty").mkdir()
    assert "holds neither metadata.jsonl nor prompt.json" in said(train_data_dir=tmp_path / "empty")
    row = {"file_name": str(pairs / "images" / "0.png"), "text": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert "1 of 1 pictures" in (message := said(train_data_dir=tmp_path, allow_outside_paths=True))
    assert "have no conditioning_image" in message
    assert "--condition canny" in message
    row |= {"conditioning_image": "nowhere.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert f"{tmp_path / 'nowhere.png'} is missing" in said(train_data_dir=tmp_path, allow_outside_paths=True)
    assert "the ControlNet ./none cannot be loaded" in said(
        train_data_dir=pairs, control="controlnet", controlnet_model_name_or_path="./none"
    )
    assert "they are of different models" in said(
        train_data_dir=pairs, control="controlnet", controlnet_model_name_or_path=_wide(tmp_path)
    )
    assert not (tmp_path / "run").exists()


def _wide(folder: Path) -> Path:
    tiny_controlnet(cross_attention_dim=48).save_pretrained(folder / "wide")
    return folder / "wide"


def test_a_broken_condition_found_in_training_is_named_and_the_run_says_so(
    train: Train, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "hint.png").write_bytes((pairs / "hints" / "0.png").read_bytes()[:-60])
    row = {"file_name": str(pairs / "images" / "0.png"), "conditioning_image": "hint.png", "text": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"hint.png: cannot be decoded"):
        train(train_data_dir=str(tmp_path), allow_outside_paths=True)


def test_a_controlnet_of_the_run_loads_in_diffusers_own_pipeline(train: Train) -> None:
    run = train(control="controlnet", method="none", train_controlnet="all")
    net = ControlNetModel.from_pretrained(run / "controlnet")
    saved = {f"controlnet_weights.{name}": value for name, value in net.named_parameters()}
    assert same_tensors({key: value.data for key, value in saved.items()}, trained(run, 3))


def test_the_recipes_are_what_they_say() -> None:
    recipes = Path(__file__).parents[2] / "configs"
    flags = ["--output_dir", "runs/maps", "--train_data_dir", "pairs"]
    sd15 = parse_config(ControlConfig, ["--config", str(recipes / "controlnet_sd15.yaml"), *flags])
    assert (sd15.rate_of("unet"), sd15.rate_of("control_encoder"), sd15.train_batch_size) == (1e-3, 1e-4, 10)
    assert (sd15.targets, sd15.guidance_scale, sd15.condition) == ("attention+geglu", 9.0, "image")
    small = parse_config(ControlConfig, ["--config", str(recipes / "controlnet_playground.yaml"), *flags[:2]])
    assert (small.condition, small.rate_of("unet"), small.rate_of("control_encoder")) == ("map", 3e-3, 2e-3)


@pytest.mark.parametrize("way", [{}, {"control": "controlnet"}], ids=["encoder", "controlnet"])
def test_sdxl_learns_a_control_as_well(
    way: dict[str, Any], train: Train, xl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(
        pretrained_model_name_or_path=str(xl_folder),
        num_validation_images=1,
        num_validation_pairs=1,
        resolution=64,
        method="ether",
        **way,
    )
    block = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert block is not None
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    exec(block[1].replace(f"path/to/{xl_folder.name}", str(xl_folder)), names)
    assert names["image"].size == (64, 64)
    condition = Image.open(run / "samples" / "conditions" / "00.png")
    pipe = load_run(run)
    if not way:
        drawn = draw(pipe, "a dog", condition)
    else:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 64, "width": 64}
        dice = torch.Generator().manual_seed(0)
        drawn = np.array(pipe("a dog", image=condition, generator=dice, **settings).images[0])
    assert np.array_equal(drawn, samples(run)["step-000003/00.png"])


LONG = " ".join("abcdefghij" * 9)
"""Two chunks of the tiny base's tokens."""


@pytest.fixture
def long_pairs(pairs: Path, tmp_path: Path) -> Path:
    """The pairs, one of them with a caption beyond CLIP's length."""
    folder = tmp_path / "long"
    shutil.copytree(pairs, folder)
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    rows[2]["text"] = LONG
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("way", [{}, {"control": "controlnet"}], ids=["encoder", "controlnet"])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_long_captions_control_in_chunks_and_are_drawn_alike(
    xl: bool,
    way: dict[str, Any],
    train: Train,
    long_pairs: Path,
    xl_folder: Path,
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the programs that sample and score, and by the card's code; empty prompts have as many chunks."""
    lengths: set[int] = set()
    original = StableDiffusion.arguments

    def arguments(family: Any, noisy: Any, times: Any, prompts: Any, sizes: Any) -> Any:
        lengths.add(prompts["prompt_embeds"].shape[1])
        return original(family, noisy, times, prompts, sizes)

    monkeypatch.setattr(StableDiffusion, "arguments", arguments)
    folder = xl_folder if xl else base_folder
    run = train(
        pretrained_model_name_or_path=str(folder),
        train_data_dir=str(long_pairs),
        prompt_chunks="auto",
        proportion_empty_prompts=0.5,
        num_validation_images=1,
        num_validation_pairs=1,
        validation_prompt=LONG,
        resolution=64,
        method="ether",
        **way,
    )
    assert lengths == {2 * 77}
    assert read_run(run).family_settings.prompt_chunks == 2
    expected = samples(run)["step-000003/00.png"].astype(int)
    condition = run / "samples" / "conditions" / "00.png"
    command = ["sample", str(run), "--control_image", str(condition), "--seeds", "0", "--device", "cpu"]
    main([*command, "--output_dir", str(tmp_path / "out")])
    assert np.abs(pixels(tmp_path / "out" / "00-seed0-strength1.png").astype(int) - expected).max() <= 1
    drawing = Drawing(samples=1, num_inference_steps=2, guidance_scale=7.5)
    pair = Pair("0", condition, condition, LONG)
    ((sample,),) = draw_samples(load_run(run), read_run(run), [pair], tmp_path / "scored", drawing, show=False)
    block = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert f'encode_prompts(pipe, "{LONG}", chunks=2)' in block[1]
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    exec(block[1].replace(f"path/to/{folder.name}", str(folder)), names)
    assert names["image"].size == (64, 64)
    pipe = names["pipe"]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 64, "width": 64}
    asked |= {"image": names["control_image"]} if way else {} if xl else {"control_image": names["control_image"]}
    scored = pixels(tmp_path / "scored" / sample.file_name).astype(int)
    for seed, drawn in ((0, expected), (int(sample.seed or 0), scored)):
        with controlled(pipe, names["control_image"]) if xl and not way else nullcontext():
            given = ether.encode_prompts(pipe, LONG, chunks=2)
            again = pipe(**given, **asked, generator=torch.Generator().manual_seed(seed)).images[0]
        assert np.abs(np.asarray(again, dtype=int) - drawn).max() <= 1


def test_long_captions_of_pairs_are_told(train: Train, long_pairs: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(train_data_dir=str(long_pairs))
    assert "text_encoder sees only the beginning of 1 of 2 prompts: " in caplog.text
    assert "; --prompt_chunks auto encodes all of every prompt" in caplog.text


def test_captions_without_end_cannot_be_counted(train: Train) -> None:
    with pytest.raises(ValueError, match="nobody can count: leave prompt_chunks out"):
        train(train_data_dir="playground", condition=None, prompt_chunks="auto")


def test_an_empty_prompt_of_sdxl_is_what_guidance_leads_away_from(xl_folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(xl_folder)
    encoded = family_of(pipe).encode_prompts(["a dog", ""])
    _, negative, _, pooled = pipe.encode_prompt("a dog", device="cpu", do_classifier_free_guidance=True)
    assert torch.equal(encoded["prompt_embeds"][1], negative[0])
    assert torch.equal(encoded["pooled_prompt_embeds"][1], pooled[0])
    assert encoded["prompt_embeds"][0].any()


def test_gradient_checkpointing_reaches_the_controlnet(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"control": "controlnet", "method": "none", "train_controlnet": "all"}
    plain = train("plain", **settings)
    seen: list[bool] = []
    original = ControlNetModel.forward

    def forward(net: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(net.is_gradient_checkpointing)
        return original(net, *arguments, **more)

    monkeypatch.setattr(ControlNetModel, "forward", forward)
    saving = train("saving", gradient_checkpointing=True, **settings)
    assert set(seen) == {True}
    assert relative_change(trained(saving, 3), trained(plain, 3)) < 1e-6


def test_conditions_of_training_pairs_stay_at_home(tmp_path: Path) -> None:
    values: dict[str, Any] = {"pretrained_model_name_or_path": "base", "output_dir": tmp_path}
    own = ControlConfig(**values, train_data_dir="pairs")
    assert "samples/conditions/*" in _not_uploaded(own)
    given = ControlConfig(**values, train_data_dir="pairs", validation_image="a.png", validation_prompt="a")
    assert "samples/conditions/*" not in _not_uploaded(given)
