"""A training's gradients are those of the dense fp64 weights: two models, four forwards, parts, checkpoints, rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import dense_weight, shake
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ether_diffusion import Adapter, EtherConfig, attach
from ether_diffusion.core.host import host_of
from ether_diffusion.playground.tiny import tiny_text_encoder, tiny_tokenizer, tiny_unet

ROUNDS, BETA = 2, 5.0
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {"unet": tiny_unet(), "text_encoder": tiny_text_encoder(tiny_tokenizer())}
    return {name: model.requires_grad_(False).eval().double() for name, model in found.items()}


def pictures(round_number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(round_number)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {name: noise(1, 4, 8, 8) for name in ("winner", "loser", "noise")}
    return found | {"hidden": noise(1, 9, 64), "ids": torch.randint(1, 40, (1, 7), generator=generator)}


class Dense:
    """The twin: plain models whose weights are functions of the vectors."""

    def __init__(self, adapters: dict[str, Adapter]) -> None:
        self.models = models()
        self.vectors = {
            name: {key: value.detach().clone().requires_grad_() for key, value in adapter.named_parameters()}
            for name, adapter in adapters.items()
        }

    def call(self, name: str, acts: bool, *args: Any, part: str = "", **kwargs: Any) -> Any:
        model = self.models[name].get_submodule(part)
        replaced = {}
        for path in dict.fromkeys(key.rpartition(".")[0] for key in self.vectors[name]) if acts else ():
            own = {k.rpartition(".")[2]: v for k, v in self.vectors[name].items() if k.rpartition(".")[0] == path}
            prefix = f"{part}." if part else ""
            if path.startswith(prefix):
                weight = self.models[name].get_submodule(path).weight
                assert isinstance(weight, Tensor)
                replaced[f"{path.removeprefix(prefix)}.weight"] = dense_weight(weight, own)
        return torch.func.functional_call(model, replaced, args, kwargs)


class Adapted:
    """The models with adapters on them."""

    def __init__(self, kind: str, reentrant: bool | None) -> None:
        self.models, self.reentrant = models(), reentrant
        self.adapters = {}
        for seed, (name, model) in enumerate(self.models.items()):
            self.adapters[name] = attach(model, EtherConfig(kind)).double()
            shake(self.adapters[name], seed=seed)
        if reentrant is not None:
            self.models["unet"].enable_gradient_checkpointing(  # type: ignore[operator]
                lambda module, *args: checkpoint(module, *args, use_reentrant=reentrant)
            )
            self.models["text_encoder"].gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
            for model in self.models.values():
                model.train()

    def call(self, name: str, acts: bool, *args: Any, part: str = "", **kwargs: Any) -> Any:
        host = host_of(self.models[name])
        assert host is not None
        host.enable(acts)
        try:
            model = self.models[name].get_submodule(part)
            if part and self.reentrant is not None:
                return checkpoint(lambda *given: model(*given, **kwargs), *args, use_reentrant=self.reentrant)
            return model(*args, **kwargs)
        finally:
            host.enable()


def preference(of: Dense | Adapted, given: dict[str, Tensor]) -> Tensor:
    """A preference loss: the policy and, without adapters, its reference see both pictures, a part sees features."""

    def error(picture: str, acts: bool, text: Tensor) -> Tensor:
        sample = (given[picture] + given["noise"]).requires_grad_(acts)  # for reentrant checkpoints
        predicted = of.call("unet", acts, sample, torch.tensor([10]), text).sample
        return F.mse_loss(predicted, given["noise"])

    embeds = of.call("text_encoder", True, given["ids"]).last_hidden_state
    with torch.no_grad():
        before = of.call("text_encoder", False, given["ids"]).last_hidden_state
    policy = error("winner", True, embeds) - error("loser", True, embeds)
    with torch.no_grad():
        reference = error("winner", False, before) - error("loser", False, before)
    hidden = given["hidden"].requires_grad_()
    part = of.call("unet", True, hidden, None, embeds, part=BLOCK)
    return -F.logsigmoid(-BETA * (policy - reference)) + 0.1 * part.square().mean()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["no checkpoints", "checkpoints", "reentrant ones"])
@pytest.mark.parametrize("kind", ["ether", "ether_plus", "naive"])
def test_gradients_of_a_preference_loss_over_rounds_are_the_dense_ones(kind: str, reentrant: bool | None) -> None:
    ours = Adapted(kind, reentrant)
    theirs = Dense(ours.adapters)
    for number in range(ROUNDS):  # gradients add up, as in accumulation
        found, expected = (preference(of, pictures(number)) / ROUNDS for of in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        found.backward()
        expected.backward()
    for name, adapter in ours.adapters.items():
        for key, parameter in adapter.named_parameters():
            assert parameter.grad is not None, key
            torch.testing.assert_close(parameter.grad, theirs.vectors[name][key].grad, rtol=1e-7, atol=1e-11)
