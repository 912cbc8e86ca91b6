"""Stage 1: an ``AutoencoderKL`` of factor 4, 64 px to latents of 4 x 16 x 16."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ether_diffusion.files import atomic_path
from ether_diffusion.playground.build.drawings import load_pool, to_unit
from ether_diffusion.playground.build.loop import Stage, copy_weights
from ether_diffusion.playground.build.project import Project

KL_WEIGHT = 3e-4
GRADIENT_WEIGHT = 0.5
SCALES = 3


class AutoencoderStage(Stage):
    """L1 of the pixels and of their differences at three scales, and a small KL."""

    name = "autoencoder"
    network: AutoencoderKL

    def __init__(self, project: Project) -> None:
        self.device, self.training = project.device, project.preset.training[self.name]
        with project.seeded(self.name):
            network = AutoencoderKL(**project.preset.architecture.autoencoder)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.pictures = load_pool(project.drawings, "scenes", project.preset.scenes, ("pictures",), self.device)[
            "pictures"
        ]

    def loss(self, dice: torch.Generator) -> Tensor:
        """``|x' - x| + w · multiscale |∇x' - ∇x| + w · KL(q(z|x) ‖ N(0, 1))``, the KL per value of the picture."""
        pictures = to_unit(self.pictures[self.rows(len(self.pictures), dice)])
        posterior = self.network.encode(pictures).latent_dist
        decoded = self.network.decode(posterior.sample(dice)).sample.float()
        kl = posterior.kl().float().mean() / pictures[0].numel()
        error = decoded - pictures
        return error.abs().mean() + GRADIENT_WEIGHT * gradient_loss(error) + KL_WEIGHT * kl

    def start_from(self, folder: Path) -> None:
        """Go on with the decoder alone: the unet was trained with the encoder's latents."""
        copy_weights(AutoencoderKL.from_pretrained(folder / "vae"), self.network)
        self.network.encoder.requires_grad_(False)
        self.network.quant_conv.requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the model in fp16, its ``scaling_factor`` set to one over the latents' standard deviation."""
        std = latents_of(self.network, self.pictures[:4096]).std().item()
        self.network.register_to_config(scaling_factor=1 / std)
        self.network.half().save_pretrained(folder)


def gradient_loss(error: Tensor) -> Tensor:
    """Mean ``|∇e|`` of ``error`` (N, C, H, W) over ``SCALES`` halvings: differences of neighbours, both ways."""
    total = error.new_zeros(())
    for _ in range(SCALES):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / SCALES


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """The posterior's means, unscaled, for pictures (N, H, W, 3) uint8: (N, 4, H/4, W/4) fp32."""
    chunks = tqdm(pictures.split(batch), desc="encode", unit="batch", leave=False)
    return torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in chunks])


def cached_latents(vae: AutoencoderKL, pictures: Tensor, path: Path, device: torch.device) -> Tensor:
    """:func:`latents_of` the pictures times the scaling factor, on ``device``; kept at ``path``, unscaled."""
    with PartialState().main_process_first():
        if not path.exists():
            with atomic_path(path) as temporary:
                save_file({"latents": latents_of(vae, pictures).cpu().contiguous()}, temporary)
    return load_file(path, str(device))["latents"] * vae.config.scaling_factor


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """Pictures (N, H, W, 3) uint8 through the posterior's mean and back, (N, 3, H, W) in [-1, 1]."""
    chunks = [vae.decode(vae.encode(to_unit(chunk)).latent_dist.mean).sample for chunk in pictures.split(batch)]
    return torch.cat(chunks).clamp(-1, 1)
