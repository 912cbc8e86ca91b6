"""Mistakes that users make end in one line that says what was given, what was expected and what to do."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from training.helpers import checkpoints, draw_photo, metrics, provenance, same_tensors, samples, trained

from ether_diffusion.training import setup
from ether_diffusion.training.dreambooth import main
from ether_diffusion.training.loop import TrainingDivergedError

Train = Callable[..., Path]
Flags = Callable[..., list[str]]


@pytest.fixture
def complaint(flags: Flags, tmp_path: Path) -> Callable[..., str]:
    """What the program says at its end for a run with these changes."""

    def of(**changes: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main(flags(tmp_path / "run", **changes))
        assert isinstance(ended.value.code, str)
        return ended.value.code

    return of


Complaint = Callable[..., str]


def test_a_folder_without_pictures(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert complaint(instance_data_dir=tmp_path / "empty") == (
        f"error: no readable picture directly in {tmp_path / 'empty'} (sub-folders are not searched); "
        "put .jpg, .png or .webp files there"
    )


def test_a_folder_that_does_not_exist(complaint: Complaint, tmp_path: Path) -> None:
    assert complaint(instance_data_dir=tmp_path / "nowhere") == (
        f"error: image folder {tmp_path / 'nowhere'} does not exist; check the path"
    )


def test_a_folder_with_nothing_but_a_broken_picture(
    complaint: Complaint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo = draw_photo(tmp_path / "broken" / "dog.png")
    photo.write_bytes(photo.read_bytes()[:100])
    assert "no readable picture" in complaint(instance_data_dir=tmp_path / "broken")
    assert f"skipping {photo}: cannot be decoded" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_blocks": 3}, "n_blocks=3 does not divide the 64 features of down_blocks.1"),
        ({"targets": "atention"}, 'did you mean "attention"?'),
        ({"targets": '["attn9.*"]'}, "attn9.*"),
        ({"sampler": "DDIMSchedular"}, "diffusers has no scheduler 'DDIMSchedular', did you mean \"DDIMScheduler\"?"),
        ({"resolution": 63}, "resolution must be a multiple of 8 pixels, such as 56, not 63"),
        ({"num_class_images": 0}, "num_class_images must be at least 1, not 0"),
        ({"sample_batch_size": 0}, "sample_batch_size must be at least 1, not 0"),
        ({"resume": "latest"}, "holds no checkpoints; start the run without --resume (with --overwrite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_does_not_fit(changes: dict[str, Any], message: str, complaint: Complaint) -> None:
    said = complaint(**changes)
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("changes", "package", "message"),
    [
        (
            {"optimizer": "adamw8bit"},
            "bitsandbytes",
            "optimizer=adamw8bit needs bitsandbytes: pip install 'ether-diffusion[adam8bit]'",
        ),
        (
            {"optimizer": "prodigy"},
            "prodigyopt",
            "optimizer=prodigy needs prodigyopt: pip install 'ether-diffusion[prodigy]'",
        ),
        ({"method": "boft"}, "peft", "method=boft needs peft: pip install 'ether-diffusion[study]'"),
        ({"report_to": "wandb"}, "wandb", "report_to=wandb needs wandb: pip install 'ether-diffusion[wandb]'"),
    ],
    ids=["adamw8bit", "prodigy", "peft", "wandb"],
)
def test_a_missing_package_is_named_before_anything_is_written(
    changes: dict[str, Any],
    package: str,
    message: str,
    complaint: Complaint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = setup.importlib.util.find_spec
    monkeypatch.setattr(
        setup.importlib.util, "find_spec", lambda name, *more: None if name == package else original(name, *more)
    )
    assert complaint(**changes) == f"error: {message}"
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as ended:
        main(flags(tmp_path / "file" / "run"))
    assert ended.value.code == f"error: cannot write to --output_dir {tmp_path / 'file' / 'run'}: Not a directory"


def test_a_hub_id_out_of_reach_is_one_line(complaint: Complaint) -> None:
    said = complaint(pretrained_model_name_or_path="nobody/no-such-model")
    assert said.startswith("error: there is no folder nobody/no-such-model, and as a Hub id it could not be fetched: ")
    assert said.endswith("(check the name, the connection and HF_HUB_OFFLINE, and log in for gated models)")
    assert "\n" not in said


def test_a_mistake_does_not_bar_the_folder_for_the_next_try(complaint: Complaint, flags: Flags, tmp_path: Path) -> None:
    complaint(pretrained_model_name_or_path="nobody/no-such-model")
    complaint(n_blocks=3)
    main(flags(tmp_path / "run", max_train_steps=1))
    assert provenance(tmp_path / "run")["status"] == "finished"


def test_a_folder_that_is_no_pipeline(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    said = complaint(pretrained_model_name_or_path=tmp_path / "model")
    assert said.startswith(f"error: {tmp_path / 'model'} is no diffusers folder: ")


def test_a_pipeline_of_another_class(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    said = complaint(pretrained_model_name_or_path=tmp_path / "model")
    assert said.startswith(
        f"error: the base model {tmp_path / 'model'} cannot be trained here: it is a WanPipeline, which nothing here "
        "trains; what can be trained: Stable Diffusion 1.x and 2.x (StableDiffusionPipeline), "
    )
    assert "FLUX.1 (FluxPipeline)" in said


def test_a_base_with_a_truncated_file(complaint: Complaint, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = complaint(pretrained_model_name_or_path=tmp_path / "model")
    assert str(tmp_path / "model") in said
    assert "\n" not in said


def test_a_finished_run_is_not_overwritten_unless_asked(
    complaint: Complaint, flags: Flags, train: Train, tmp_path: Path
) -> None:
    prior: dict[str, Any] = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 1}
    run = train(num_validation_images=1, method="full", **prior)
    before = trained(run, 3)
    assert complaint() == (
        f"error: {run} already holds a run (finished): choose another --output_dir, "
        "--resume latest to continue it, or --overwrite to replace it"
    )
    assert same_tensors(trained(run, 3), before)
    class_image = (run / "class_images" / "class-000000.png").stat().st_mtime_ns
    main([*flags(run, max_train_steps=2, **prior), "--overwrite"])
    assert checkpoints(run) == ["step-000002"]
    assert samples(run) == {}
    assert not (run / "model_index.json").exists(), "the former run's pipeline would shadow the adapter"
    assert not (run / "unet").exists()
    assert (run / "class_images" / "class-000000.png").stat().st_mtime_ns == class_image


def test_overwriting_leaves_a_model_that_is_no_run_alone(train: Train, base_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "run")
    train(overwrite=True, max_train_steps=1)
    assert (tmp_path / "run" / "unet" / "config.json").is_file()


def test_an_unknown_checkpoint_is_answered_with_those_there_are(complaint: Complaint, train: Train) -> None:
    run = train(max_train_steps=2, checkpointing_steps=1)
    assert complaint(resume="step-000007") == (
        f"error: {run} holds no checkpoint 'step-000007'; it has: step-000001, step-000002; or pass --resume latest"
    )


@pytest.mark.parametrize("changes", [{"method": "ether"}, {"n_blocks": 2}, {"targets": "cross_attention"}])
def test_a_checkpoint_of_other_settings_is_refused_and_kept(
    changes: dict[str, Any], complaint: Complaint, train: Train
) -> None:
    run = train(max_train_steps=2, checkpointing_steps=1)
    said = complaint(resume="step-000001", max_train_steps=3, **changes)
    assert f"the checkpoint {run / 'checkpoints' / 'step-000001'} does not fit this run's method or targets:" in said
    assert "unet." in said
    assert checkpoints(run) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_changes_anything(
    what: str, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = UNet2DConditionModel.forward

    def forward(unet: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += unet.training  # the loss that is only compared is not meant
        output = original(unet, *args, **kwargs)
        if unet.training and calls == 4:
            if what == "loss":
                output.sample = output.sample * math.nan
            else:
                output.sample.register_hook(lambda gradient: gradient * math.inf)
        return output

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    steps: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: steps.append(1))
    with pytest.raises(TrainingDivergedError) as stopped:
        train(max_train_steps=6, checkpointing_steps=2, learning_rate=0.25)
    run = Path(str(stopped.value).split("the last good checkpoint is ")[1].split(";")[0]).parents[1]
    assert str(stopped.value).startswith(f"the {what} is not finite at step 4: ")
    assert "learning rate {'unet': 0.25}" in str(stopped.value)
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-000002'}" in str(stopped.value)
    assert len(steps) == 3
    assert checkpoints(run) == ["step-000002"]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert (provenance(run)["status"], provenance(run)["step"]) == ("failed", 3)


def test_an_error_out_of_torch_keeps_its_traceback(
    flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no setting of the user's: the line alone would help nobody."""

    def forward(unet: torch.nn.Module, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.functional.interpolate(sample, size=1, scale_factor=1)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with pytest.raises(ValueError, match="only one of size or scale_factor"):
        main(flags(tmp_path / "run", max_train_steps=1))
