"""LPIPS against the package ``lpips`` itself, with its own trunk from torchvision: where both are installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ether_diffusion.metrics.perceptual import Lpips
from ether_diffusion.playground.world import draw, random_scene


@pytest.mark.parametrize(("net", "model"), [("alex", "alexnet"), ("vgg", "vgg16")])
def test_every_pair_is_as_the_package_says(net: str, model: str, tmp_path: Path) -> None:
    reason = "the package lpips needs torchvision, which is not installed"
    lpips = pytest.importorskip("lpips", reason=reason, exc_type=ImportError)
    models = pytest.importorskip("torchvision.models", reason=reason, exc_type=ImportError)
    trunk = getattr(models, model)(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    with torch.no_grad():
        for name, parameter in theirs.net.named_parameters():
            parameter.copy_(trunk.features.state_dict()[name.split(".", 1)[1]])
    pictures = [draw(random_scene(5, index)).image.resize((128, 128)) for index in range(4)]
    raw = np.stack([np.asarray(picture, np.float32) for picture in pictures])
    seen = torch.from_numpy(raw / 127.5 - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        columns = [theirs(seen[:2], seen[other].expand(2, -1, -1, -1)).flatten() for other in (2, 3)]
    (distances,), _ = Lpips(str(tmp_path / "trunk.pth"), net, 128).compare([pictures[:2]], pictures[2:])
    torch.testing.assert_close(distances, torch.stack(columns, 1), rtol=1e-5, atol=0)
