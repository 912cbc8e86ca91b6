"""The plan of a step's memory: against what the same models keep on the CPU, and as the programs print it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families.tiny import DIFFUSION, FLOW, build

import ether_diffusion as ether
from ether_diffusion.evaluation.paper.blocks import kept_bytes
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import FamilySettings
from ether_diffusion.training.dreambooth import main
from ether_diffusion.training.memory import base_bytes, plan

FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux2", "qwen_image", "z_image")


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_those_that_the_model_keeps(name: str) -> None:
    """On a CPU the adapter may take another path than on a GPU, and its own part is small: hence the tolerance."""
    settings = FamilySettings(max_sequence_length=None if name in ("sd", "sdxl") else 64)
    family = family_of(build(name), settings)
    channels, factor, side = family.latent_channels, family.vae_factor, 64
    denoiser = family.denoiser.requires_grad_(False)
    kind = type(family)
    adapter = ether.attach(denoiser, ether.EtherConfig())
    blank = family.blank_prompts(2)
    noisy = torch.zeros(2, channels, side // factor, side // factor)
    times = torch.full((2,), 500 if name in ("sd", "sdxl") else 0.5)
    arguments = family.arguments(noisy, times, blank, torch.zeros(2, 6))
    denoiser.train()
    own = [*denoiser.parameters(), *denoiser.buffers(), *adapter.parameters()]
    real = kept_bytes(lambda: denoiser(**arguments), own)
    adapter.detach()
    pipe = SimpleNamespace(**{**family.pipe.components, kind.DENOISER: denoiser.to("meta"), "config": {}})
    found = plan(kind(pipe, settings), ether.EtherConfig(), side, (channels, factor), 2)  # type: ignore[arg-type]
    assert 0.75 < found.activations / real < 1.3
    assert found.trained == 8 * adapter.num_parameters()
    assert found.optimizer == 8 * adapter.num_parameters()
    less = plan(kind(pipe, settings), ether.EtherConfig(), side, (channels, factor), 2, checkpointing=True)  # type: ignore[arg-type]
    assert less.activations < found.activations


def test_quantised_weights_are_counted_in_their_bits() -> None:
    denoiser = build("sd3").transformer
    whole = base_bytes(denoiser)
    assert whole == sum(p.numel() * 4 for p in denoiser.parameters())
    linears = sum(
        module.weight.numel()
        for path, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in path
    )
    assert base_bytes(denoiser, "int8") == whole - 3 * linears
    assert base_bytes(denoiser, "nf4") == pytest.approx(whole - (4 - 4.5 / 8) * linears, abs=1)


@pytest.mark.parametrize("name", [*FLOW, *DIFFUSION])
def test_every_family_has_a_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(name).save_pretrained(tmp_path / "base")
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--instance_data_dir", "x", "--resolution=64"]
    main([*flags, "--output_dir", str(tmp_path / "run"), "--instance_prompt", "a qwe dog", "--dry_run"])
    said = capsys.readouterr().out
    assert "| as it is |" in said
    assert ("with --gradient_checkpointing" in said) == (name != "chroma")
    # experts and lists of tokens depend on values, which the meta device has not
    assert ("not known" in said) == (name.split()[0] in ("lumina2", "hidream", "ideogram4"))


def test_an_index_that_names_other_packages_imports_nothing(
    base_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``model_index.json`` of a stranger names a module beside the program as the library of a part."""
    shutil.copytree(base_folder, tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["unet"] = ["evil_parts", "UNet2DConditionModel"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "evil_parts.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--instance_data_dir", str(photos)]
    for dry in (["--dry_run"], []):
        with pytest.raises(SystemExit, match="its unet is UNet2DConditionModel of the package evil_parts"):
            main([*flags, "--output_dir", str(tmp_path / "run"), "--instance_prompt", "a qwe dog", *dry])
    assert not (tmp_path / "ran").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    base_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained_model_name_or_path", str(base_folder), "--instance_data_dir", str(photos)]
    main([*flags, "--output_dir", str(tmp_path / "run"), "--instance_prompt", "a qwe dog", "--dry_run"])
    said = capsys.readouterr().out
    assert "Stable Diffusion 1.x and 2.x, 64 px, batch 1, base in torch.float32" in said
    assert "with --gradient_checkpointing" in said
    assert "encoded in every step" not in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_that_text_encoders_stay_for_a_new_token(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained_model_name_or_path", str(base_folder), "--instance_data_dir", "x", "--dry_run"]
    token = ["--instance_prompt", "a <dog> dog", "--placeholder_token", "<dog>"]
    main([*flags, *token, "--output_dir", str(tmp_path / "run")])
    assert "They stay there, since prompts are encoded in every step" in capsys.readouterr().out
