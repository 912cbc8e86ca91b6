"""Stage 5: a ``UNet2DConditionModel`` on cached latents, under the frozen text tower."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel

from ether_diffusion.playground.build.autoencoder import cached_latents
from ether_diffusion.playground.build.clip import text_tower
from ether_diffusion.playground.build.drawings import CAPTIONS, load_pool
from ether_diffusion.playground.build.loop import Stage, copy_weights
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.vocabulary import LENGTH, world_tokenizer

DROPOUT = 0.1
"""Share of the captions that are empty, for classifier-free guidance."""
SNR_GAMMA = 1.0
"""5 is usual; with so few steps to train in, 1 leaves more of them to the noisy half, where shapes are decided."""


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise, predicted as ε."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class UnetStage(Stage):
    """Mean squared error of the noise with min-SNR-γ weights (arXiv:2303.09556)."""

    name = "unet"
    network: UNet2DConditionModel

    def __init__(self, project: Project) -> None:
        self.device, self.training = project.device, project.preset.training[self.name]
        with project.seeded(self.name):
            network = UNet2DConditionModel(**project.preset.architecture.unet)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        clip = CLIPModel.from_pretrained(project.model("clip"), dtype=torch.float32).to(self.device)
        vae = AutoencoderKL.from_pretrained(project.model("autoencoder"))
        vae = vae.to(self.device, memory_format=torch.channels_last)
        pool = load_pool(project.drawings, "scenes", project.preset.scenes, ("pictures", "tokens"), self.device)
        self.tokens = pool["tokens"]
        self.latents = cached_latents(vae, pool["pictures"], project.latents(self.name), self.device)
        self.text_encoder = text_tower(clip).requires_grad_(False)
        empty = world_tokenizer()("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        self.empty = empty.to(self.device)
        self.alphas = noise_scheduler().alphas_cumprod.to(self.device)

    def loss(self, dice: torch.Generator) -> Tensor:
        """``min(SNR, γ) / SNR · |ε_θ(√ᾱ x + √(1-ᾱ) ε, t, c) - ε|²``."""
        rows = self.rows(len(self.latents), dice)
        columns = torch.randint(CAPTIONS, rows.shape, generator=dice, device=self.device)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=dice, device=self.device)
        timesteps = torch.randint(len(self.alphas), rows.shape, generator=dice, device=self.device)
        dropped = torch.rand(rows.shape, generator=dice, device=self.device) < DROPOUT
        prompt_embeds = self.prompt_embeds(self.tokens[rows, columns], dropped)
        alpha = self.alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = self.network(noisy, timesteps, prompt_embeds).sample
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        return (error * snr.clamp(max=SNR_GAMMA) / snr).mean()

    @torch.no_grad()
    def prompt_embeds(self, tokens: Tensor, dropped: Tensor) -> Tensor:
        """Token ids (N, L) as a pipeline would encode them, the empty prompt where ``dropped``: (N, L, width)."""
        return self.text_encoder(torch.where(dropped[:, None], self.empty, tokens.long()))[0]

    def start_from(self, folder: Path) -> None:
        """Go on with the model."""
        copy_weights(UNet2DConditionModel.from_pretrained(folder / "unet"), self.network)

    def save(self, folder: Path) -> None:
        """Write the model in fp16."""
        self.network.half().save_pretrained(folder)
