"""The one module that a run trains: the base, its adapters, and a forward that ends in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ether_diffusion.core.host import host_of
from ether_diffusion.pipelines.components import is_xl
from ether_diffusion.training.batches import Batch, join
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
        adapters: names of adapters that are trained side by side, each on samples of its own; none for one training.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        trainables: list[Trainable],
        objective: Objective,
        prior_loss_weight: float = 1.0,
        prompt_embeds: dict[str, dict[str, Tensor]] | None = None,
        control: Conditioning | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.pipe = pipe
        self.objective = objective
        self.prior_loss_weight = prior_loss_weight
        self.prompt_embeds = prompt_embeds
        self.control = control
        self.adapters = list(adapters)
        self.unet = pipe.unet
        # once: diffusers looks through all modules for them
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.trained = nn.ModuleDict({t.key.replace(".", " "): t.module for t in trainables})
        self.encoders = nn.ModuleDict(
            {t.component: getattr(pipe, t.component) for t in trainables if t.component.startswith("text_encoder")}
        )

    def forward(self, lanes: list[list[Batch]]) -> list[dict[str, Tensor]]:
        """Scalar losses of every lane: ``loss`` = instance_loss + prior_loss_weight · prior_loss, and its parts.

        Several lanes pass the UNet as one batch, in which each sample has the adapter of its lane.
        """
        if not self.adapters:
            return [self._together(torch.cat([self._losses(batch) for batch in lanes[0]]), lanes[0])]
        counts = [sum(len(batch.timesteps) for batch in batches) for batches in lanes]
        (everything,) = join([batch for batches in lanes for batch in batches])
        names = [name for name, count in zip(self.adapters, counts, strict=True) for _ in range(count)]
        for component in (self.unet, *self.encoders.values()):
            if (host := host_of(component)) is not None:
                host.set_per_sample(names)
        losses = self._losses(everything).split(counts)
        return [self._together(own, batches) for own, batches in zip(losses, lanes, strict=True)]

    def _together(self, losses: Tensor, batches: list[Batch]) -> dict[str, Tensor]:
        """The losses of a lane from those of its samples."""
        prior = torch.cat([batch.prior for batch in batches])
        instance_loss = losses[~prior].mean()
        if not prior.any():
            return {"loss": instance_loss}
        prior_loss = losses[prior].mean()
        loss = instance_loss + self.prior_loss_weight * prior_loss
        return {"loss": loss, "instance_loss": instance_loss, "prior_loss": prior_loss}

    def _losses(self, batch: Batch) -> Tensor:
        noisy = self.objective.add_noise(batch.latents, batch.noise, batch.timesteps)
        conditioning = self._condition(batch.prompts)
        added = None
        if is_xl(self.pipe):
            added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": batch.time_ids.to(self.dtype)}
        inputs = UNetInputs(noisy.to(self.dtype), batch.timesteps, conditioning["prompt_embeds"], added)
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
        return {key: value.to(self.device, self.dtype) for key, value in encoded.items()}
