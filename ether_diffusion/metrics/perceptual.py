"""LPIPS (arXiv 1801.03924) as a distance between embeddings, so that every image passes the network once.

LPIPS of two images is Σ_l 1/(H_l W_l) Σ_hw w_l · (f̂_l - f̂'_l)², f̂_l being layer l's features of unit length per pixel
and w_l ≥ 0 the learnt weights of its channels. With φ_l = √(w_l / (H_l W_l)) f̂_l it is ‖φ - φ'‖².
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ether_diffusion.metrics.backbones import Backbone, Picture, weights_hash
from ether_diffusion.pipelines.file import first_line

PACKAGE = "lpips"
"""In place of a path: the trunk that the package ``lpips`` fetches."""
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Layers whose output is compared, as they are numbered in torchvision's ``features``."""
EPSILON = 1e-10
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation, for pixels in [-1, 1]."""


class Lpips(Backbone):
    """LPIPS with learnt channel weights (version 0.1), over AlexNet's or VGG-16's features.

    The papers that print an LPIPS beside DINO and CLIP take AlexNet and images of 512 pixels.

    Args:
        trunk: file of torchvision's ImageNet weights (``alexnet-owt-7be5be79.pth``, ``vgg16-397923af.pth``), or
            ``lpips``: as the package of that name fetches them.
        net: ``alex`` or ``vgg``.
        size: the shorter side is resized to so many pixels (Lanczos) and the middle square is compared.
        device: where to compute.

    Raises:
        ImportError: a package is not installed; the message says which.
        OSError: there is no such file.
        ValueError: the file holds other weights, or there is no such net.
    """

    def __init__(self, trunk: str, net: str = "alex", size: int = 512, device: torch.device | str = "cpu") -> None:
        if net not in TAPS:
            raise ValueError(f"net={net!r} is not one of {', '.join(TAPS)}")
        self.net, self.size = net, size
        features = _alex() if net == "alex" else _vgg()
        weights = _packaged_trunk(net) if trunk == PACKAGE else _trunk_file(Path(trunk))
        try:
            features.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{trunk} does not hold torchvision's weights of {net}: {error}") from error
        self.channel_weights = [weight.to(device) for weight in _channel_weights(net)]
        super().__init__(f"LPIPS {net} ({trunk})", features, f"shorter side {size}, Lanczos, middle square", device)
        heads = nn.ParameterList(weight.cpu() for weight in self.channel_weights)
        self.identity["weights"] += f", {weights_hash(heads)}"

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        square = (self.size, self.size)
        cut = [ImageOps.fit(image, square, Image.Resampling.LANCZOS) for image in images]
        return (
            torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in cut])).permute(0, 3, 1, 2) / 127.5 - 1
        )

    def _features(self, pixels: Tensor) -> Tensor:
        """φ of images (N, 3, H, W) in [-1, 1], (N, D): its squared distances are LPIPS."""
        shift, scale = (torch.tensor(each, device=pixels.device)[:, None, None] for each in (SHIFT, SCALE))
        hidden = (pixels - shift) / scale
        seen: list[Tensor] = []
        for number, layer in enumerate(self.model):
            hidden = layer(hidden)
            if number in TAPS[self.net]:
                weight = self.channel_weights[len(seen)] / (hidden.shape[-1] * hidden.shape[-2])
                unit = hidden / (hidden.square().sum(1, keepdim=True).sqrt() + EPSILON)
                seen.append((unit * weight.sqrt()[:, None, None]).flatten(1).cpu())
        return torch.cat(seen, 1)

    @torch.no_grad()
    def embeddings(self, images: Sequence[Picture], show: str | None = None) -> Iterator[Tensor]:
        """φ of one image after the other, (D,) fp32 on the CPU: 10 MB each for AlexNet at 512 pixels."""
        for pixels in self._batches(images, show):
            yield from self._features(pixels)

    def compare(
        self, groups: Sequence[Sequence[Picture]], references: Sequence[Picture], show: str | None = None
    ) -> tuple[list[Tensor], list[float | None]]:
        """LPIPS of every image to every reference, and DIV of every group; every image passes the network once.

        Args:
            groups: images that were made for the same prompt; a whole group's φ is in memory at a time.
            references: the subject's own images (M), whose φ are in memory, too.
            show: name of a progress bar, None for none.

        Returns:
            For each group the distances (len(group), M), and DIV: the mean LPIPS of its pairs, None for one image.
        """
        known = list(self.embeddings(references))
        stream = self.embeddings([image for group in groups for image in group], show)
        distances, diversities = [], []
        for group in groups:
            seen = [next(stream) for _ in group]
            distances.append(torch.tensor([[_distance(phi, other) for other in known] for phi in seen]))
            diversities.append(_mean_distance(seen))
        return distances, diversities

    def among(self, images: Sequence[Picture]) -> float | None:
        """The mean LPIPS of all pairs of the images, None for a single one."""
        return _mean_distance(list(self.embeddings(images)))


def _distance(phi: Tensor, other: Tensor) -> float:
    return (phi - other).square().sum().item()


def _mean_distance(embeddings: list[Tensor]) -> float | None:
    pairs = [_distance(a, b) for a, b in combinations(embeddings, 2)]
    return sum(pairs) / len(pairs) if pairs else None


def _alex() -> nn.Sequential:
    """AlexNet's convolutions (the "one weird trick" variant) up to the last that LPIPS looks at."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )


def _vgg() -> nn.Sequential:
    """VGG-16's convolutions: blocks of two or three, halved between them."""
    layers: list[nn.Module] = []
    before = 3
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1])


def _trunk_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path} with the weights of LPIPS' trunk: give torchvision's ImageNet weights, "
            f"or {PACKAGE!r} where that package is installed"
        )
    try:
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path} is no file of weights that torch reads: {first_line(error)}") from error
    return {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}


def _packaged_trunk(net: str) -> dict[str, Tensor]:
    """The weights under torchvision's numbers, from the slices that ``lpips`` cuts its trunk into."""
    try:
        import lpips
    except ImportError as error:
        raise ImportError(f"the package lpips is not installed ({error}): pip install lpips torchvision") from error
    trunk = lpips.LPIPS(net=net, verbose=False).net
    return {key.split(".", 1)[1]: value for key, value in trunk.state_dict().items()}


def _channel_weights(net: str) -> Iterator[Tensor]:
    """The learnt weights of each compared layer's channels, (C,), which torchmetrics and lpips come with."""
    for package, folder in (("torchmetrics", "functional/image/lpips_models"), ("lpips", "weights/v0.1")):
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            path = Path(found.origin).parent / folder / f"{net}.pth"
            state = torch.load(path, map_location="cpu", weights_only=True)
            yield from (state[f"lin{layer}.model.1.weight"].flatten() for layer in range(5))
            return
    raise ImportError("LPIPS needs the weights that torchmetrics comes with: pip install 'ether-diffusion[eval]'")
