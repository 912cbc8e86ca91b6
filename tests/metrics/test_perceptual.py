"""LPIPS against torchmetrics' own network, over the same trunk with random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as reference

from ether_diffusion.metrics.perceptual import Lpips
from ether_diffusion.playground.world import draw, random_scene

SIZE = 72


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [draw(random_scene(5, index)).image.resize((SIZE, SIZE)) for index in range(5)]


def alexnet() -> nn.Sequential:
    """AlexNet's convolutions as torchvision has them, written apart from the package."""
    plan: list[nn.Module] = [nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    plan += [nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for before, after in ((192, 384), (384, 256), (256, 256)):
        plan += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU()]
    return nn.Sequential(*plan, nn.MaxPool2d(3, 2))


def vgg16() -> nn.Sequential:
    plan: list[nn.Module] = []
    before = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        plan += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2, 2)]
        before = width or before
    return nn.Sequential(*plan)


@pytest.fixture(params=["alex", "vgg"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Lpips, nn.Module]:
    """Ours and torchmetrics' LPIPS with one random trunk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        trunk = {"alex": alexnet, "vgg": vgg16}[request.param]()
    path = tmp_path / "trunk.pth"
    whole = {f"features.{key}": value for key, value in trunk.state_dict().items()}
    torch.save({**whole, "classifier.6.bias": torch.zeros(3)}, path)
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *arguments: trunk)
    return Lpips(str(path), request.param, SIZE), reference._LPIPS(pretrained=True, net=request.param)


def pixels(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures]) / 127.5 - 1).permute(0, 3, 1, 2)


def test_every_pair_is_as_torchmetrics_says(pair: tuple[Lpips, nn.Module], pictures: list[Image.Image]) -> None:
    ours, theirs = pair
    (distances,), (diversity,) = ours.compare([pictures[:3]], pictures[3:])
    seen = pixels(pictures)
    with torch.no_grad():
        expected = torch.stack(
            [theirs(seen[:3], seen[3 + other].expand(3, -1, -1, -1)).flatten() for other in (0, 1)], 1
        )
        among = [theirs(seen[i : i + 1], seen[j : j + 1]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert expected.min() > 1e-3
    torch.testing.assert_close(distances, expected, rtol=1e-5, atol=0)
    assert diversity == pytest.approx(sum(among) / 3, rel=1e-5)
    assert ours.among(pictures[:3]) == pytest.approx(sum(among) / 3, rel=1e-5)


def test_groups_are_compared_within_and_every_image_seen_once(
    pair: tuple[Lpips, nn.Module], pictures: list[Image.Image]
) -> None:
    ours, _ = pair
    looks: list[int] = []
    ours.model[0].register_forward_hook(lambda module, args, output: looks.append(len(output)))
    distances, diversities = ours.compare([pictures[:2], pictures[2:3], pictures[3:]], pictures[:1])
    assert sum(looks) == len(pictures) + 1
    assert [part.shape for part in distances] == [(2, 1), (1, 1), (2, 1)]
    assert distances[0][0].item() == pytest.approx(0, abs=1e-9)
    assert diversities[0] == pytest.approx(distances[0][1].item(), rel=1e-6)
    assert diversities[1] is None
    assert diversities[2] == pytest.approx(ours.among(pictures[3:]), rel=1e-6)


def test_other_sizes_are_cut_to_the_middle_square(pair: tuple[Lpips, nn.Module], pictures: list[Image.Image]) -> None:
    ours, _ = pair
    wide = Image.new("RGB", (3 * SIZE, SIZE), "red")
    wide.paste(pictures[0], (SIZE, 0))
    assert ours.among([wide, pictures[0]]) == pytest.approx(0, abs=1e-9)
    assert f"side {SIZE}" in ours.identity["preprocessing"]


def test_what_is_missing_or_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.pth"):
        Lpips(str(tmp_path / "nowhere.pth"))
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold torchvision's weights of alex"):
        Lpips(str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="'squeeze' is not one of alex, vgg"):
        Lpips("lpips", "squeeze")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips torchvision"):
        Lpips("lpips")


def test_the_packages_trunk_is_taken_out_of_its_slices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trunk = alexnet()[:12]
    torch.save({f"features.{key}": value for key, value in trunk.state_dict().items()}, tmp_path / "trunk.pth")
    slices = nn.Module()
    for number, (start, stop) in enumerate(((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)), 1):
        part = nn.Sequential()
        for layer in range(start, stop):
            part.add_module(str(layer), trunk[layer])
        slices.add_module(f"slice{number}", part)
    package = SimpleNamespace(LPIPS=lambda net, verbose: SimpleNamespace(net=slices))
    monkeypatch.setitem(sys.modules, "lpips", package)
    known, packaged = Lpips(str(tmp_path / "trunk.pth"), size=SIZE), Lpips("lpips", size=SIZE)
    assert known.identity["weights"] == packaged.identity["weights"]
