"""What the README tells a newcomer to type is executed, on a small base in place of Stable Diffusion 1.5."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import ether_diffusion as ether
from ether_diffusion.cli.programs.sample import main as draw
from ether_diffusion.pipelines.control_encoder import ControlEncoder
from ether_diffusion.pipelines.control_hook import attach_control
from ether_diffusion.playground.world import write_subject
from ether_diffusion.private import forget_accelerator
from ether_diffusion.training.dreambooth import main as train_dreambooth

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with photos, where the training command of the README has a small base and few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_subject("striped-robot", tmp_path / "dog")
    forget_accelerator()
    return tmp_path


def training_command() -> list[str]:
    line = next(b for b in blocks("bash") if "accelerate launch" in b).replace("\\\n", " ").splitlines()[-1]
    words = shlex.split(line)
    assert words[:3] == ["accelerate", "launch", "train_dreambooth.py"]
    assert (ROOT / words[2]).is_file()
    return words[3:]


def test_the_training_command_and_all_python_of_the_readme_run(workplace: Path, base_folder: Path) -> None:
    small = ["--pretrained_model_name_or_path", str(base_folder), "--resolution", "64", "--max_train_steps", "2",
             "--num_class_images", "2", "--num_inference_steps", "2", "--num_validation_images", "1",
             "--mixed_precision", "no"]  # fmt: skip
    train_dreambooth([*training_command(), *small])
    assert (workplace / "runs/dog/report.html").is_file()
    (drawing,) = (block for block in blocks("bash") if block.startswith("ether sample"))
    draw([*shlex.split(drawing)[2:], "--num_inference_steps", "2", "--device", "cpu"])
    assert len(list((workplace / "pictures").glob("00-seed*.png"))) == 12
    pipe = DiffusionPipeline.from_pretrained(base_folder)
    ether.attach(pipe.unet, ether.EtherConfig(method="ether"), name="style")
    ether.save(pipe, "runs/style")
    attach_control(pipe.unet, ControlEncoder.of(pipe.unet, pipe.vae_scale_factor), "style")
    ether.save(pipe, "runs/maps")
    Image.new("RGB", (64, 64), "red").save("map.png")

    namespace: dict[str, object] = {}
    for block in blocks("python"):
        code = block.replace(SD15, str(base_folder)).replace('.to("cuda")', "")
        exec(compile(code, "README.md", "exec"), namespace)
    assert (workplace / "bucket.png").is_file()
    assert (workplace / "house.png").is_file()
    assert list(ether.adapters(namespace["pipe"])) == ["default", "dog"]


def test_make_has_the_targets_that_the_documents_name() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE))
    assert named == {"demo", "test", "lint", "bench", "docs", "dist", "release-check"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_numbers_of_the_readme_are_those_of_the_code() -> None:
    from diffusers import UNet2DConditionModel

    from ether_diffusion.playground.sd15 import UNET

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    rows = {
        "| `ether` |": ether.EtherConfig(method="ether"),
        "| `ether_plus` (default) |": ether.EtherConfig(),
        "| `ether_plus`, one-sided |": ether.EtherConfig(two_sided=False),
        "| `naive`": ether.EtherConfig(method="naive"),
    }
    for start, config in rows.items():
        adapter = ether.attach(unet, config)
        row = next(line for line in README.splitlines() if line.startswith(start))
        assert f"| {adapter.num_parameters():,} |" in row
        adapter.detach()


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name} links to {link}"
