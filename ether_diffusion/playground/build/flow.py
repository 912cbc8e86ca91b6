"""The second base: a ``ZImageTransformer2DModel`` on the first one's cached latents, under its frozen text tower."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ether_diffusion.data.randomness import generator
from ether_diffusion.families.flow import FlowMatching, Sigmas
from ether_diffusion.playground.build.autoencoder import cached_latents, latents_of
from ether_diffusion.playground.build.drawings import (
    CAPTIONS,
    HELD_OUT,
    caption_tokens,
    load_pool,
    picture_array,
)
from ether_diffusion.playground.build.loop import Stage, copy_weights
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.vocabulary import world_tokenizer
from ether_diffusion.playground.world import random_caption, random_scene

DROPOUT = 0.1
"""Share of the captions that are empty, for classifier-free guidance."""
SHIFT = 1.0
"""Of σ in training and drawing."""
LAYER = -2
"""Of the text tower's hidden states, as the pipeline takes it."""
FIXED_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
FIXED_SCENES = 128
"""Held-out scenes of the validation loss, each at every one of ``FIXED_SIGMAS``."""


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler's method along straight lines, from σ = 1 to 0."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class FlowStage(Stage):
    """Mean squared error of the velocity ε - x₀ at logit-normal times (arXiv:2403.03206)."""

    name = "flow"
    network: ZImageTransformer2DModel

    def __init__(self, project: Project) -> None:
        assert project.beside is not None, "a flow transformer is built beside a finished base"
        self.device, self.training = project.device, project.preset.training[self.name]
        self.text_encoder = CLIPTextModel.from_pretrained(project.beside / "text_encoder", dtype=torch.float32)
        self.text_encoder = self.text_encoder.to(self.device).requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(project.beside / "vae", dtype=torch.float32)
        vae = vae.to(self.device, memory_format=torch.channels_last)
        widths = {"in_channels": vae.config.latent_channels, "cap_feat_dim": self.text_encoder.config.hidden_size}
        with project.seeded(self.name):
            network = initialised(ZImageTransformer2DModel(**project.preset.architecture.flow, **widths))
        self.network = network.to(self.device)
        pool = load_pool(project.drawings, "scenes", project.preset.scenes, ("pictures", "tokens"), self.device)
        self.tokens = pool["tokens"]
        self.latents = cached_latents(vae, pool["pictures"], project.latents(self.name), self.device)
        tokenizer = world_tokenizer()
        self.end = tokenizer.eos_token_id
        self.empty = torch.as_tensor(caption_tokens(tokenizer, [""]), device=self.device)
        self.flow = FlowMatching(lambda size: SHIFT, Sigmas())
        self.fixed = self._fixed(vae, project.seed)

    def _fixed(self, vae: AutoencoderKL, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and prompts of the validation loss."""
        scenes = [random_scene(seed + HELD_OUT, index) for index in range(FIXED_SCENES)]
        pictures = torch.from_numpy(picture_array(scenes)).to(self.device)
        latents = latents_of(vae, pictures) * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator(seed, "validation", self.name)).to(self.device)
        captions = [random_caption(scene, seed + HELD_OUT, index) for index, scene in enumerate(scenes)]
        return latents, noise, torch.as_tensor(caption_tokens(world_tokenizer(), captions), device=self.device)

    def loss(self, dice: torch.Generator) -> Tensor:
        """``|v_θ((1 - σ) x + σ ε, σ, c) - (ε - x)|²``, σ = sigmoid(n) with n normal."""
        rows = self.rows(len(self.latents), dice)
        columns = torch.randint(CAPTIONS, rows.shape, generator=dice, device=self.device)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=dice, device=self.device)
        levels = torch.sigmoid(torch.randn(rows.shape, generator=dice, device=self.device))
        dropped = torch.rand(rows.shape, generator=dice, device=self.device) < DROPOUT
        tokens = torch.where(dropped[:, None], self.empty, self.tokens[rows, columns].long())
        times = self.flow.times(levels, (latents.shape[-2], latents.shape[-1]))
        return self.errors(self.network, latents, noise, times, tokens).mean()

    def errors(self, network: nn.Module, latents: Tensor, noise: Tensor, times: Tensor, tokens: Tensor) -> Tensor:
        """Each sample's loss, (N,) fp32; the family's tests hold what the transformer is told against the pipeline."""
        noisy = self.flow.add_noise(latents, noise, times)
        answer = network(list(noisy.unsqueeze(2)), 1 - times, self.prompt_embeds(tokens), return_dict=False)[0]
        velocity = -torch.stack(answer).squeeze(2)
        return self.flow.losses(velocity, self.flow.target(latents, noise, times), times)

    @torch.no_grad()
    def prompt_embeds(self, tokens: Tensor) -> list[Tensor]:
        """Token ids (N, L) as the pipeline encodes them: of each prompt (its tokens, width)."""
        lengths = (tokens != self.end).sum(1) + 1
        tokens = tokens[:, : int(lengths.max())]
        states: Tensor = self.text_encoder(tokens, output_hidden_states=True).hidden_states[LAYER]
        return [state[:length] for state, length in zip(states, lengths.tolist(), strict=True)]

    @torch.no_grad()
    def validation(self, network: nn.Module) -> Tensor:
        """The loss on held-out scenes with fixed noise, mean over fixed σ."""
        latents, noise, tokens = self.fixed
        losses = [
            self.errors(network, latents, noise, torch.full((len(latents),), sigma, device=self.device), tokens)
            for sigma in FIXED_SIGMAS
        ]
        return torch.stack(losses).mean()

    def start_from(self, folder: Path) -> None:
        """Go on with the model."""
        copy_weights(ZImageTransformer2DModel.from_pretrained(folder / "transformer"), self.network)

    def save(self, folder: Path) -> None:
        """Write the model in fp16."""
        self.network.half().save_pretrained(folder)


def initialised(transformer: ZImageTransformer2DModel) -> ZImageTransformer2DModel:
    """Initial weights as for DiT (arXiv:2212.09748): every block and the output are zero at the start.

    diffusers leaves the tokens of padding as whatever memory held, and the rest as torch's defaults.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if "adaLN_modulation" in name or name.endswith("final_layer.linear") or ".linear" in name:
                nn.init.zeros_(module.weight)
            elif "t_embedder" in name:
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token, std=0.02)
    return transformer
