"""Fig. 3: what random transforms of growing distance do to the base's images, without any training.

ETHER's reflections are always at ‖H - I‖_F = 2 per block, ETHER+'s at most at √2; rotations and unconstrained blocks
go as far as they are sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.host import attach
from ether_diffusion.core.methods import Method, Reflection
from ether_diffusion.core.targets import find_targets
from ether_diffusion.data.randomness import generator
from ether_diffusion.evaluation.figures import Line, Panel, write_figure
from ether_diffusion.evaluation.tables import judges_line
from ether_diffusion.families.parts import denoiser_of
from ether_diffusion.files import write_text
from ether_diffusion.metrics.fidelity import prompt_similarity
from ether_diffusion.metrics.scoring import Judges
from ether_diffusion.page.pictures import picture_grid, save_picture
from ether_diffusion.page.text import markdown_table
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.runs.base import Base
from ether_diffusion.runs.drawing import Asked, draw, load_pipeline, own_guidance


def rotation_limit(width: int) -> float:
    """The bound of ‖Q - I‖_F for Cayley rotations in ``width`` dimensions: 2 √width, or one dimension less if odd."""
    return 2 * math.sqrt(width - width % 2)


def relaxed_pair(n_blocks: int, width: int, distance: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random unit u and v (n, width) with ‖H⁺ - I‖_F = √(2 - 2 (u·v)²) = ``distance`` ≤ √2 in every block."""
    u, aside = F.normalize(torch.randn(2, n_blocks, width, generator=rng), dim=-1)
    aside = F.normalize(aside - (aside * u).sum(-1, keepdim=True) * u, dim=-1)
    cosine = math.sqrt(max(0.0, 1 - distance**2 / 2))
    return u, cosine * u + math.sqrt(1 - cosine**2) * aside


def free_blocks(n_blocks: int, width: int, distance: float, rng: torch.Generator) -> Tensor:
    """I + G with Gaussian G of norm ``distance`` in every block, (n, width, width)."""
    noise = torch.randn(n_blocks, width, width, generator=rng)
    return torch.eye(width) + distance * noise / noise.flatten(1).norm(dim=1)[:, None, None]


def rotations(n_blocks: int, width: int, distance: float, rng: torch.Generator) -> Tensor:
    """Random Q = (I + S)(I - S)⁻¹ with ‖Q - I‖_F = ``distance`` in every block, (n, width, width), as OFT has them.

    An eigenvalue iσ of S turns by the angle 2 arctan σ, so that ‖Q - I‖² = Σ 4 sin²(arctan sσ) for a scale s of S,
    which grows with s and is solved for by bisection.
    """
    noise = torch.randn(n_blocks, width, width, generator=rng, dtype=torch.float64)
    skew = noise - noise.mT
    sigma = torch.linalg.eigvals(skew).imag.abs()
    low, high = torch.full((n_blocks, 1), -40.0), torch.full((n_blocks, 1), 40.0)
    for _ in range(80):
        middle = (low + high) / 2
        reached = (4 * torch.sin(torch.arctan(middle.exp() * sigma)) ** 2).sum(1, keepdim=True).sqrt()
        low, high = torch.where(reached < distance, middle, low), torch.where(reached < distance, high, middle)
    skew = skew * ((low + high) / 2).exp()[:, :, None]
    eye = torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(eye - skew, eye + skew).float()


def _relax(transform: Method, n_blocks: int, distance: float, rng: torch.Generator) -> None:
    assert isinstance(transform, Reflection)
    for pairs in transform.vectors():
        for u, v in pairs:
            assert v is not None
            u.data, v.data = relaxed_pair(n_blocks, u.shape[1], distance, rng)


def _rotate(transform: Method, n_blocks: int, distance: float, rng: torch.Generator) -> None:
    for blocks in transform.parameters():
        blocks.data = rotations(n_blocks, blocks.shape[1], distance, rng)


def _free(transform: Method, n_blocks: int, distance: float, rng: torch.Generator) -> None:
    for blocks in transform.parameters():
        blocks.data = free_blocks(n_blocks, blocks.shape[1], distance, rng)


@dataclass(frozen=True)
class Kind:
    """Random transforms of one method.

    Attributes:
        carrier: the adapter that carries them: OFT's rotations are blocks like any others.
        reaches: whether a block of so many features can be at a distance from the identity.
        move: puts vectors of n blocks at a distance; None where every initial direction is at the only one.
    """

    carrier: str
    reaches: Callable[[float, int], bool]
    move: Callable[[Method, int, float, torch.Generator], None] | None


KINDS = {
    "ether": Kind("ether", lambda distance, width: math.isclose(distance, 2.0), None),
    "ether_plus": Kind("ether_plus", lambda distance, width: distance <= 2**0.5 + 1e-9, _relax),
    "oft": Kind("naive", lambda distance, width: distance < rotation_limit(width), _rotate),
    "naive": Kind("naive", lambda distance, width: True, _free),
}
"""One for each of :data:`~ether_diffusion.evaluation.paper.settings.PERTURBED`."""


@contextmanager
def perturbed(model: nn.Module, method: str, n_blocks: int, distance: float, seed: int) -> Iterator[None]:
    """Inside, every attention projection of ``model`` has a random transform of the method at that distance."""
    kind = KINDS[method]
    adapter = attach(model, EtherConfig(kind.carrier, n_blocks, seed=seed), "perturbation")
    try:
        for path, transform in adapter.methods().items():
            if kind.move is not None:
                rng = generator(seed, "perturbation", path)
                kind.move(transform, n_blocks, distance, rng)
        yield
    finally:
        adapter.detach()


def study(
    pipe: DiffusionPipeline,
    asked: Asked,
    judges: Judges,
    methods: Sequence[str],
    distances: Sequence[float],
    n_blocks: int,
    settings: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[tuple[str, float], list[Image.Image]]]:
    """Draw and score the same images under every transform.

    Args:
        pipe: the base.
        asked: what to draw, the same for all.
        judges: DINO compares with the base's own images, CLIP with the prompts.
        methods: of ``KINDS``.
        distances: per block.
        n_blocks: blocks per projection.
        settings: batch_size, num_inference_steps, guidance_scale.

    Returns:
        Rows of method, distance, dino, clip_t (means, with low and high the 5th and 95th percentile of images), the
        base first at distance 0; and the images.
    """
    widths = [part.width for target in find_targets(denoiser_of(pipe)) for part in target.inputs.parts]
    narrowest = min(widths) // n_blocks
    arms = [("base", 0.0)]
    arms += [(method, each) for method in methods for each in distances if KINDS[method].reaches(each, narrowest)]
    images: dict[tuple[str, float], list[Image.Image]] = {}
    rows: list[dict[str, Any]] = []
    texts = judges.clip.text_features(asked.prompts)
    for method, distance in tqdm(arms, desc="transforms"):
        if method == "base":
            drawn = list(draw(pipe, asked, **settings))
            before = judges.dino.image_features(drawn)
        else:
            with perturbed(denoiser_of(pipe), method, n_blocks, distance, seed=0):
                drawn = list(draw(pipe, asked, **settings))
        images[method, distance] = drawn
        scores = {
            "dino": (judges.dino.image_features(drawn) * before).sum(-1),
            "clip_t": prompt_similarity(judges.clip.image_features(drawn), texts),
        }
        rows.append({"method": method, "distance": distance} | {k: _spread(v.numpy()) for k, v in scores.items()})
    return rows, images


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float]:
    low, high = np.percentile(values, [5, 95])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def write_study(
    folder: Path,
    rows: list[dict[str, Any]],
    images: Mapping[tuple[str, float], Sequence[Image.Image]],
    facts: Mapping[str, Any],
) -> str:
    """Write ``perturbation.json`` and ``.md``, ``perturbation.png`` (curves), ``perturbed.png``; return the table."""
    methods = list(dict.fromkeys(row["method"] for row in rows[1:]))
    panels = []
    for key, title in (("dino", "Likeness to the base's image (DINO)"), ("clip_t", "Prompt fidelity (CLIP-T)")):
        lines = []
        for method in methods:
            mine = [row for row in rows if row["method"] == method]
            x = [row["distance"] for row in mine]
            lines.append(Line(method, x, *([row[key][part] for row in mine] for part in ("mean", "low", "high"))))
        panels.append(Panel(title, "‖T − I‖ per block", lines, log_x=True, level=rows[0][key]["mean"]))
    pictures = len(images["base", 0.0])
    told = (
        f"One random transform of each kind and distance; {pictures} pictures, whose 5th to 95th percentile is shaded."
    )
    write_figure(folder / "perturbation.png", panels, caption=[told])
    distances = sorted({row["distance"] for row in rows[1:]})
    blank = Image.new("RGB", next(iter(images.values()))[0].size, "white")
    grid = [("base", [images["base", 0.0][0]])]
    grid += [(m, [images[m, d][0] if (m, d) in images else blank for d in distances]) for m in methods]
    save_picture(picture_grid(grid, [f"{distance:.2g}" for distance in distances]), folder / "perturbed.png")
    cells = [
        [row["method"], f"{row['distance']:.2f}", f"{row['dino']['mean']:.3f}", f"{row['clip_t']['mean']:.3f}"]
        for row in rows
    ]
    table = markdown_table(["method", "‖T − I‖ per block", "DINO to the base", "CLIP-T"], cells)
    text = f"{table}\n{told}\n{judges_line(facts['judges'])}\n"
    write_text(folder / "perturbation.json", json.dumps({**facts, "rows": rows}, indent=1))
    write_text(folder / "perturbation.md", text)
    return text


def study_base(
    base: Base,
    prompts: Sequence[str],
    images_per_prompt: int,
    judges: Judges,
    methods: Sequence[str],
    distances: Sequence[float],
    n_blocks: int,
    settings: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[tuple[str, float], list[Image.Image]], dict[str, Any]]:
    """Load a base, draw and score it under every transform.

    Args:
        base: whose denoiser is transformed.
        prompts: what to draw.
        images_per_prompt: of each.
        judges: they say the device, too.
        methods, distances, n_blocks: see :func:`study`.
        settings: likewise; without a guidance_scale the base's own is taken.

    Returns:
        What :func:`study` returns, and the facts that :func:`write_study` needs.

    Raises:
        OSError: the base cannot be loaded.
        ValueError: the blocks do not fit.
    """
    wanted = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    asked = Asked(wanted, [generator(0, "image", number).initial_seed() for number in range(len(wanted))])
    guidance = own_guidance(base) if settings["guidance_scale"] is None else settings["guidance_scale"]
    settings = {**settings, "guidance_scale": guidance}
    pipe = load_pipeline(base, judges.dino.device)
    rows, images = study(pipe, asked, judges, methods, distances, n_blocks, settings)
    facts = {
        "base": str(base),
        "base_hash": base_hash(denoiser_of(pipe)),
        "prompts": list(prompts),
        "n_blocks": n_blocks,
        "judges": judges.identity,
    }
    return rows, images, facts | settings
