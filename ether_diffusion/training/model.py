"""The one module that a run trains: the base, its adapters, and a forward that ends in the loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ether_diffusion.training.base_model import is_xl
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.conditioning import Conditioning, UNetInputs, encode_prompts
from ether_diffusion.training.diffusion import Objective
from ether_diffusion.training.trainables import Trainable


class DenoisingModel(nn.Module):
    """Owns the UNet, the trained text encoders and the adapters: one ``prepare`` and one wrap by DDP is enough.

    Args:
        pipe: the base.
        trainables: what is trained in it.
        objective: the loss.
        prior_loss_weight: weight of the class images.
        prompt_embeds: encoded prompts, where the text encoders are frozen; they are encoded in every step otherwise.
        control: what the conditions of the batches act through.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        trainables: list[Trainable],
        objective: Objective,
        prior_loss_weight: float = 1.0,
        prompt_embeds: dict[str, dict[str, Tensor]] | None = None,
        control: Conditioning | None = None,
    ) -> None:
        super().__init__()
        self.pipe = pipe
        self.objective = objective
        self.prior_loss_weight = prior_loss_weight
        self.prompt_embeds = prompt_embeds
        self.control = control
        self.unet = pipe.unet
        self.trained = nn.ModuleDict({trainable.component: trainable.module for trainable in trainables})
        self.encoders = nn.ModuleDict(
            {t.component: getattr(pipe, t.component) for t in trainables if t.component.startswith("text_encoder")}
        )

    def forward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Scalar losses: ``loss`` = instance_loss + prior_loss_weight · prior_loss, and its parts."""
        losses = torch.cat([self._losses(batch) for batch in batches])
        prior = torch.cat([batch.prior for batch in batches])
        instance_loss = losses[~prior].mean()
        if not prior.any():
            return {"loss": instance_loss}
        prior_loss = losses[prior].mean()
        loss = instance_loss + self.prior_loss_weight * prior_loss
        return {"loss": loss, "instance_loss": instance_loss, "prior_loss": prior_loss}

    def _losses(self, batch: Batch) -> Tensor:
        dtype = self.unet.dtype
        noisy = self.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        conditioning = self._condition(batch.prompts)
        added = None
        if is_xl(self.pipe):
            added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": batch.time_ids.to(dtype)}
        inputs = UNetInputs(noisy.to(dtype), batch.timesteps, conditioning["prompt_embeds"], added)
        controlled: AbstractContextManager[dict[str, Any]] = nullcontext({})
        if self.control is not None and batch.conditions is not None:
            controlled = self.control.training(inputs, batch.conditions)
        with controlled as more:
            prediction = self.unet(
                inputs.sample, inputs.timesteps, inputs.prompt_embeds, added_cond_kwargs=added, **more
            ).sample
        target = self.objective.target(batch.latents, batch.noise, batch.timesteps)
        return self.objective.losses(prediction, target, batch.timesteps)

    def _condition(self, prompts: list[str]) -> dict[str, Tensor]:
        if self.prompt_embeds is None:
            encoded = encode_prompts(self.pipe, prompts)
        else:
            known = [self.prompt_embeds[prompt] for prompt in prompts]
            encoded = {key: torch.stack([entry[key] for entry in known]) for key in known[0]}
        return {key: value.to(self.unet.device, self.unet.dtype) for key, value in encoded.items()}
