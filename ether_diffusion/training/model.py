"""The one module that a run trains: the base, its adapters, and a forward that ends in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.core.host import host_of
from ether_diffusion.families.protocol import Family, Objective, Prompts
from ether_diffusion.training.batches import Batch, join
from ether_diffusion.training.conditioning import Conditioning
from ether_diffusion.training.trainables import Trainable


class DenoisingModel(nn.Module):
    """Owns the denoiser, the trained text encoders and the adapters: one ``prepare`` and one wrap by DDP is enough.

    Args:
        family: of the base.
        trainables: what is trained in it.
        objective: the loss.
        prior_loss_weight: weight of the class images.
        prompt_embeds: encoded prompts, where the text encoders are frozen; they are encoded in every step otherwise.
        control: what the conditions of the batches act through.
        adapters: names of adapters that are trained side by side, each on samples of its own; none for one training.
        placeholder_token: a token that is trained: prompts with it are encoded in every step, whatever
            ``prompt_embeds`` has.
    """

    def __init__(
        self,
        family: Family,
        trainables: list[Trainable],
        objective: Objective,
        prior_loss_weight: float = 1.0,
        prompt_embeds: dict[str, dict[str, Tensor]] | None = None,
        control: Conditioning | None = None,
        adapters: Sequence[str] = (),
        placeholder_token: str | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.objective = objective
        self.prior_loss_weight = prior_loss_weight
        self.prompt_embeds = prompt_embeds
        self.control = control
        self.adapters = list(adapters)
        self.placeholder_token = placeholder_token
        self.denoiser = denoiser = family.denoiser
        # once: diffusers looks through all modules for them
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.trained = nn.ModuleDict({t.key.replace(".", " "): t.module for t in trainables})
        components = {trainable.component for trainable in trainables}
        self.encoders = nn.ModuleDict({n: m for n, m in family.text_encoders.items() if n in components})

    def forward(self, lanes: list[list[Batch]]) -> list[dict[str, Tensor]]:
        """Scalar losses of every lane: ``loss`` = instance_loss + prior_loss_weight · prior_loss, and its parts.

        Several lanes pass the denoiser as one batch, in which each sample has the adapter of its lane.
        """
        if not self.adapters:
            return [self._together(torch.cat([self.losses(batch) for batch in lanes[0]]), lanes[0])]
        counts = [sum(len(batch.times) for batch in batches) for batches in lanes]
        (everything,) = join([batch for batches in lanes for batch in batches])
        names = [name for name, count in zip(self.adapters, counts, strict=True) for _ in range(count)]
        for component in (self.denoiser, *self.encoders.values()):
            if (host := host_of(component)) is not None:
                host.set_per_sample(names)
        losses = self.losses(everything).split(counts)
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

    def losses(self, batch: Batch) -> Tensor:
        """Weighted loss of every sample, (batch,), with whatever adapters act."""
        noisy = self.objective.add_noise(batch.latents, batch.noise, batch.times).to(self.dtype)
        arguments = self.family.arguments(noisy, batch.times, self._prompts(batch.prompts), batch.sizes)
        controlled: AbstractContextManager[dict[str, Any]] = nullcontext({})
        if self.control is not None and batch.conditions is not None:
            controlled = self.control.training(arguments, batch.conditions)
        with controlled as more:
            output = self.denoiser(**arguments, **more)
        prediction = self.family.prediction(output, noisy)
        target = self.objective.target(batch.latents, batch.noise, batch.times)
        return self.objective.losses(prediction, target, batch.times)

    def _prompts(self, prompts: list[str]) -> Prompts:
        if self.prompt_embeds is None:
            encoded = self.family.encode_prompts(prompts)
        else:
            now = self._encoded_now(prompts)
            each = [now[prompt] if prompt in now else self.prompt_embeds[prompt] for prompt in prompts]
            if now:  # what was kept is on the CPU
                each = [{key: value.to(self.device) for key, value in prompt.items()} for prompt in each]
            encoded = self.family.batch_prompts(each)
        return self.family.placed(encoded, self.device, self.dtype)

    def _encoded_now(self, prompts: list[str]) -> dict[str, dict[str, Tensor]]:
        """Those of the prompts that have the trained token, each encoded once."""
        token = self.placeholder_token
        if token is None or not (own := [prompt for prompt in dict.fromkeys(prompts) if token in prompt]):
            return {}
        encoded = self.family.encode_prompts(own)
        return {prompt: {key: value[place] for key, value in encoded.items()} for place, prompt in enumerate(own)}
