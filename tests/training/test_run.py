"""Whole runs on a tiny model: what is trained, what is not, and that what was saved draws what training drew."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from training.helpers import (
    QUIET,
    checkpoints,
    draw,
    draw_photo,
    metrics,
    pixels,
    provenance,
    relative_change,
    same_tensors,
    samples,
    trained,
)

import ether_diffusion as ether
from ether_diffusion import registry
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.runs.drawing import load_run
from ether_diffusion.training.dreambooth import main

Train = Callable[..., Path]

METHODS = [name for name in registry.METHODS if name not in ("none", "peft")]
OF_PEFT = [name for name in METHODS if registry.METHODS[name].needs_peft]


ANY_OF_PEFT: dict[str, dict[str, Any]] = {
    "DELORA": {"r": 4},
    "DORA": {"r": 4, "use_dora": True},
    "LOKR": {"r": 4},
    "IA3": {"feedforward_modules": []},
    "RANDLORA": {"r": 4},  # tensors of its state share memory
    "OSF": {},  # holds the weights themselves, decomposed
    **{"BEFT": {}, "BOFT": {"boft_block_size": 4}},
    **{"C3A": {"block_size": 4}, "DEFT": {}, "FOURIERFT": {"n_frequency": 20}, "GLORA": {}, "GRALORA": {}, "HIRA": {}},
    **{"HRA": {}, "LILY": {}, "LN_TUNING": {}, "LOHA": {}, "LORA": {}, "OFT": {"oft_block_size": 4}, "PEANUT": {}},
    **{"PSOFT": {}, "ROAD": {}, "RSLORA": {"use_rslora": True}, "SHIRA": {"r": 2}, "SUPERTUNING": {}},
    "WAVEFT": {"n_frequency": 20},
}
"""Every type of peft 0.21 that trains here, with settings for a small model; ``ETHER_ALL_PEFT=1`` tries them all."""
SOME_OF_PEFT = ["DELORA", "DORA", "IA3", "RANDLORA", "OSF"]


def load_as_the_card_says(run: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> DiffusionPipeline:
    """Execute the model card's code up to its last line, which draws a picture."""
    block = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert block is not None
    *loading, drawing = block[1].strip().splitlines()
    assert drawing == 'image = pipe(prompt="a photo of qwe dog").images[0]'
    code = "\n".join(loading).replace(f"path/to/{base.name}", str(base))
    monkeypatch.chdir(run.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["pipe"]


def base_weights(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights of a pipeline by their names in the base, whatever was attached to it."""
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    states = {part: getattr(pipe, part).state_dict() for part in parts if getattr(pipe, part, None) is not None}
    return {
        f"{part}.{key.replace('.base_layer.', '.')}": value
        for part, state in states.items()
        for key, value in state.items()
        if "trained" not in key.split(".")
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_pipeline_draws_the_last_samples_of_training(
    method: str,
    train_with_samples: Train,
    pipes: list[DiffusionPipeline],
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if method in OF_PEFT:
        pytest.importorskip("peft")
    run = train_with_samples(method, method=method, learning_rate=0.02)
    drawn = samples(run)
    assert list(drawn) == ["step-000000/00.png", "step-000003/00.png"]
    base = DiffusionPipeline.from_pretrained(base_folder)
    assert np.array_equal(drawn["step-000000/00.png"], draw(base))

    loaded = load_as_the_card_says(run, base_folder, monkeypatch)
    assert np.array_equal(drawn["step-000003/00.png"], draw(loaded))
    assert not np.array_equal(drawn["step-000003/00.png"], drawn["step-000000/00.png"])

    unchanged = same_tensors(base_weights(pipes[0]), base_weights(base))
    assert unchanged == (method != "full")


@pytest.mark.parametrize("name", ANY_OF_PEFT if os.environ.get("ETHER_ALL_PEFT") else SOME_OF_PEFT)
def test_any_adapter_of_peft_draws_in_a_fresh_pipeline_as_in_training(
    name: str, train_with_samples: Train, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    config = {"peft_type": "LORA" if name in ("DORA", "RSLORA") else name} | ANY_OF_PEFT[name]
    run = train_with_samples("peft", method="peft", peft_config=config, learning_rate=0.02)
    drawn = samples(run)
    loaded = load_as_the_card_says(run, base_folder, monkeypatch)
    assert np.array_equal(drawn["step-000003/00.png"], draw(loaded))
    assert np.array_equal(drawn["step-000003/00.png"], draw(load_run(run)))
    assert not np.array_equal(drawn["step-000003/00.png"], drawn["step-000000/00.png"])
    assert f"{config['peft_type']} (PEFT)" in (run / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_that_is_trained_moves(method: str, train: Train, pipes: list[DiffusionPipeline]) -> None:
    if method in OF_PEFT:
        pytest.importorskip("peft")
    run = train(method=method, learning_rate=0.02, checkpointing_steps=1)
    first, last = trained(run, 1), trained(run, 3)
    assert [key for key in first if torch.equal(first[key], last[key])] == []
    assert sum(provenance(run)["trained_parameters"].values()) == sum(value.numel() for value in last.values())
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert {row["lr"]["unet"] for row in metrics(run)} == {0.02}


@pytest.mark.parametrize("method", ["ether_plus", "full", "lora", "hra"])
def test_text_encoders_train_with_their_own_rate_and_load_with_the_unet(
    method: str, train_with_samples: Train, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in OF_PEFT:
        pytest.importorskip("peft")
    run = train_with_samples(
        method=method, train_text_encoder=True, learning_rate=0.01, text_encoder_lr=0.03, checkpointing_steps=1
    )
    assert metrics(run)[0]["lr"] == {"unet": 0.01, "text_encoder": 0.03}
    first, last = trained(run, 1), trained(run, 3)
    moved = {key.partition(".")[0] for key in last if not torch.equal(first[key], last[key])}
    assert moved == {"unet", "text_encoder"}
    drawn = draw(load_as_the_card_says(run, base_folder, monkeypatch))
    assert np.array_equal(samples(run)["step-000003/00.png"], drawn)


@pytest.mark.parametrize(
    ("method", "train_text_encoder"), [("ether_plus", False), ("ether_plus", True), ("lora", True), ("full", True)]
)
def test_sdxl_trains_through_the_same_program(
    method: str, train_text_encoder: bool, train_with_samples: Train, xl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method in OF_PEFT:
        pytest.importorskip("peft")
    run = train_with_samples(
        pretrained_model_name_or_path=str(xl_folder),
        method=method,
        train_text_encoder=train_text_encoder,
        learning_rate=0.02,
    )
    encoders = {"text_encoder", "text_encoder_2"} if train_text_encoder else set()
    assert set(provenance(run)["trained_parameters"]) == {"unet"} | encoders
    assert np.array_equal(samples(run)["step-000000/00.png"], draw(DiffusionPipeline.from_pretrained(xl_folder)))
    loaded = draw(load_as_the_card_says(run, xl_folder, monkeypatch))
    assert np.array_equal(samples(run)["step-000003/00.png"], loaded)
    assert not np.array_equal(loaded, samples(run)["step-000000/00.png"])


def test_a_base_that_predicts_velocity_trains_and_samples_as_such(train_with_samples: Train, tmp_path: Path) -> None:
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "velocity")
    run = train_with_samples(pretrained_model_name_or_path=str(tmp_path / "velocity"), learning_rate=0.02)
    velocity = DiffusionPipeline.from_pretrained(tmp_path / "velocity")
    assert np.array_equal(samples(run)["step-000000/00.png"], draw(velocity))
    ether.load(velocity, run)
    assert np.array_equal(samples(run)["step-000003/00.png"], draw(velocity))


def test_training_lowers_the_loss_on_fixed_noise(train: Train, photos: Path, tmp_path: Path) -> None:
    """One picture, the same noise levels before and after: the loss falls by far more than its spread."""
    draw_photo(tmp_path / "one" / "dog.png", 1)
    run = train(instance_data_dir=tmp_path / "one", max_train_steps=60, learning_rate=0.02, train_batch_size=2)
    pipe = tiny_pipeline()
    before = fixed_loss(pipe, tmp_path / "one" / "dog.png")
    ether.load(pipe, run)
    after = fixed_loss(pipe, tmp_path / "one" / "dog.png")
    assert after < 0.9 * before


@torch.no_grad()
def fixed_loss(pipe: DiffusionPipeline, photo: Path) -> float:
    """Mean epsilon loss of 32 noises at 32 evenly spaced timesteps."""
    image = torch.from_numpy(pixels(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(32, *latents.shape[1:], generator=torch.Generator().manual_seed(7))
    timesteps = torch.arange(15, 1000, 31)[:32]
    embeds, _ = pipe.encode_prompt("a photo of qwe dog", "cpu", 32, do_classifier_free_guidance=False)
    noisy = pipe.scheduler.add_noise(latents.expand_as(noise), noise, timesteps)
    return float((pipe.unet(noisy, timesteps, embeds).sample - noise).square().mean())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(train: Train, wide_photos: Path) -> None:
    changes: dict[str, Any] = {"instance_data_dir": wide_photos, "random_flip": True, "checkpointing_steps": 1}
    first = train("first", seed=3, **changes)
    again = train("again", seed=3, **changes)
    other = train("other", seed=4, **changes)
    assert metrics(first) == metrics(again)
    assert same_tensors(trained(first, 3), trained(again, 3))
    assert metrics(first)[0]["loss"] != metrics(other)[0]["loss"]
    assert not same_tensors(trained(first, 3), trained(other, 3))


def test_samples_do_not_change_what_is_trained(train: Train, wide_photos: Path) -> None:
    without = train("without", instance_data_dir=wide_photos)
    sampled = train(
        "sampled", instance_data_dir=wide_photos, num_validation_images=2, validation_steps=1, sampler="base"
    )
    assert len(samples(sampled)) == 4 * 2
    assert metrics(without) == metrics(sampled)
    assert same_tensors(trained(without, 3), trained(sampled, 3))


def test_data_workers_do_not_change_what_is_trained(train: Train, wide_photos: Path) -> None:
    alone = train("alone", instance_data_dir=wide_photos)
    helped = train("helped", instance_data_dir=wide_photos, dataloader_num_workers=1)
    assert same_tensors(trained(alone, 3), trained(helped, 3))


@pytest.mark.parametrize("prior", [False, True])
def test_accumulation_equals_the_larger_batch(prior: bool, train: Train, tmp_path: Path) -> None:
    """To rounding; Adam's ε keeps it from blowing up the rounding of gradients near zero."""
    changes: dict[str, Any] = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0.0}
    if prior:
        for shade in range(4):
            draw_photo(tmp_path / "class" / f"{shade}.png", shade + 4)
        changes |= {"with_prior_preservation": True, "class_prompt": "a dog", "class_data_dir": tmp_path / "class"}
        changes |= {"num_class_images": 4}
    large = train("large", train_batch_size=2, **changes)
    rounds = train("rounds", train_batch_size=1, gradient_accumulation_steps=2, **changes)
    assert relative_change(trained(rounds, 3), trained(large, 3)) < 1e-6
    for key in metrics(large)[0].keys() - {"step", "lr"}:
        pairs = [(a[key], b[key]) for a, b in zip(metrics(rounds), metrics(large), strict=True)]
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-5), key


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(train: Train) -> None:
    """With ε = 1 the first step of Adam is lr · g / (|g| + 1): for so small a g, lr times the clipped gradient."""
    adapter = ether.attach(tiny_pipeline().unet, ether.EtherConfig())
    start = {f"unet.{key}": value.double() for key, value in adapter.state_dict().items()}
    moved, norms = {}, {}
    for limit in (0.0, 1e-3):
        run = train(
            f"limit-{limit}",
            max_grad_norm=limit,
            adam_epsilon=1.0,
            learning_rate=1.0,
            max_train_steps=1,
            method="ether_plus",
        )
        squares = [(trained(run, 1)[key].double() - value).square().sum() for key, value in start.items()]
        moved[limit], norms[limit] = float(sum(squares)) ** 0.5, metrics(run)[0]["grad_norm"]
    assert norms[0.0] == norms[1e-3] > 0.03
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[0.0] == pytest.approx(norms[0.0], rel=5e-2)


def test_gradient_checkpointing_changes_nothing_but_memory(train: Train) -> None:
    plain = train("plain", train_text_encoder=True)
    checkpointed = train("checkpointed", train_text_encoder=True, gradient_checkpointing=True)
    assert relative_change(trained(checkpointed, 3), trained(plain, 3)) < 1e-6


def test_bf16_keeps_the_vectors_in_fp32_and_follows_the_fp32_losses(
    train_with_samples: Train, pipes: list[DiffusionPipeline]
) -> None:
    exact = train_with_samples("fp32")
    half = train_with_samples("bf16", mixed_precision="bf16")
    assert pipes[1].unet.dtype == torch.bfloat16
    assert pipes[1].vae.dtype == torch.float32
    assert {value.dtype for value in trained(half, 3).values()} == {torch.float32}
    assert metrics(half)[0]["loss"] != metrics(exact)[0]["loss"]
    assert metrics(half)[0]["loss"] == pytest.approx(metrics(exact)[0]["loss"], rel=2**-7)


def test_snr_weights_and_noise_offset_change_the_loss(train: Train) -> None:
    losses = {
        name: metrics(train(name, max_train_steps=1, **changes))[0]["loss"]
        for name, changes in {"plain": {}, "snr": {"snr_gamma": 0.01}, "offset": {"noise_offset": 0.1}}.items()
    }
    assert len(set(losses.values())) == 3


def test_a_caption_replaces_the_prompt_of_its_photo(train: Train, tmp_path: Path) -> None:
    draw_photo(tmp_path / "dog" / "a.png", 1)
    plain = train("plain", instance_data_dir=tmp_path / "dog", max_train_steps=1)
    (tmp_path / "dog" / "a.txt").write_text("qwe dog asleep")
    captioned = train("captioned", instance_data_dir=tmp_path / "dog", max_train_steps=1)
    prompted = train("prompted", instance_data_dir=tmp_path / "dog", max_train_steps=1, instance_prompt="ignored")
    assert metrics(captioned) == metrics(prompted)
    assert metrics(captioned)[0]["loss"] != metrics(plain)[0]["loss"]


def test_buckets_keep_the_shapes_of_the_photos(
    train: Train, wide_photos: Path, monkeypatch: pytest.MonkeyPatch, pipes: list[DiffusionPipeline]
) -> None:
    seen: set[tuple[int, ...]] = set()
    original = type(tiny_pipeline().unet).forward

    def forward(unet: torch.nn.Module, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if unet.training:  # and not where the loss is only compared
            seen.add(tuple(sample.shape))
        return original(unet, sample, *args, **kwargs)

    monkeypatch.setattr(type(tiny_pipeline().unet), "forward", forward)
    train(instance_data_dir=wide_photos, aspect_ratio_buckets=True, max_train_steps=8, train_batch_size=2)
    assert {shape[:2] for shape in seen} == {(2, 4)}
    assert {"tall" if h > w else "wide" if w > h else "square" for _, _, h, w in seen} == {"tall", "wide", "square"}


@pytest.mark.parametrize(("resolution", "warned"), [(None, False), (32, False), (128, False), (16, True), (136, True)])
def test_a_resolution_far_from_the_bases_own_is_warned_of(
    resolution: int | None, warned: bool, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    train(resolution=resolution, max_train_steps=1)
    said = f"resolution is {resolution} pixels, the base "
    assert (said in caplog.text) == warned
    assert ("draws 64: so far from its own size" in caplog.text) == warned


def test_class_images_weigh_as_the_prior_loss_says(train: Train) -> None:
    changes: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": "a photo of a dog"}
    run = train(num_class_images=2, prior_loss_weight=0.25, **changes)
    for row in metrics(run):
        assert row["loss"] == pytest.approx(row["instance_loss"] + 0.25 * row["prior_loss"], rel=1e-6)
    assert provenance(run)["class_images"] == 2
    assert metrics(run)[0]["instance_loss"] == pytest.approx(metrics(train("alone"))[0]["loss"], rel=1e-6)


def test_a_tensorboard_event_file_holds_the_losses(train: Train) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(report_to="tensorboard")
    [folder] = {path.parent for path in run.rglob("events.out.tfevents.*") if path.parent.name == "ether-diffusion"}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert logged == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in metrics(run)]


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda s: 1.0),
    "constant_with_warmup": ({"lr_warmup_steps": 4}, lambda s: min(1.0, s / 4)),
    "linear": ({"lr_warmup_steps": 2}, lambda s: s / 2 if s < 2 else (8 - s) / 6),
    "cosine": ({"lr_warmup_steps": 2}, lambda s: s / 2 if s < 2 else 0.5 + 0.5 * np.cos(np.pi * (s - 2) / 6)),
    "cosine_with_restarts": ({"lr_num_cycles": 2}, lambda s: 0.5 + 0.5 * np.cos(np.pi * (2 * s / 8 % 1))),
    "polynomial": ({"lr_power": 2.0}, lambda s: 1e-7 / 0.01 + (1 - 1e-7 / 0.01) * (1 - s / 8) ** 2),
    "piecewise_constant": ({"lr_step_rules": "1:3,0.1:6,0.01"}, lambda s: 1.0 if s < 3 else 0.1 if s < 6 else 0.01),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_follows_its_schedule(name: str, train: Train) -> None:
    """Step s of 8, from 0, against the schedule's formula."""
    changes, factor = SCHEDULES[name]
    run = train(lr_scheduler=name, learning_rate=0.01, max_train_steps=8, resolution=16, **changes)
    rates = [row["lr"]["unet"] for row in metrics(run)]
    assert rates == pytest.approx([0.01 * factor(s) for s in range(8)], rel=1e-9)


def test_prodigy_trains_from_a_rate_of_one(train: Train) -> None:
    pytest.importorskip("prodigyopt")
    run = train(optimizer="prodigy", checkpointing_steps=1)
    assert metrics(run)[0]["lr"] == {"unet": 1.0}
    assert not same_tensors(trained(run, 1), trained(run, 3))


def test_the_program_says_where_the_result_is(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(flags(tmp_path / "run", max_train_steps=2))
    said = capsys.readouterr().out
    assert f"\nweights and samples: {tmp_path / 'run'}, " in said
    assert f"\nreport: {tmp_path / 'run' / 'report.html'}\n" in said
    assert {"ether_weights.safetensors", "config.yaml", "metrics.jsonl", "report.html", "README.md"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert checkpoints(tmp_path / "run") == ["step-000002"]


def test_a_run_without_samples_records_how_far_it_came(train: Train) -> None:
    run = train(**QUIET)
    assert (provenance(run)["status"], provenance(run)["step"]) == ("finished", 3)
    assert provenance(run)["seconds"] > 0
