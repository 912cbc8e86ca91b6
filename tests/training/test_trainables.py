"""What each method trains: the same projections, as many parameters as its formula says, switched off to the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import flux2_transformer
from torch import Tensor

from ether_diffusion.core.targets import find_targets
from ether_diffusion.families.registry import family_of
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.registry import METHODS, OWN_METHODS
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion.training.optimizers import learning_rates, make_optimizer
from ether_diffusion.training.trainables import Trainable, check_trainables, make_trainables, trained_components

Settings = Callable[..., DreamBoothConfig]

OF_PEFT = [name for name, entry in METHODS.items() if entry.needs_peft and name != "peft"]
ADAPTERS = [*OWN_METHODS, *OF_PEFT]


@pytest.fixture
def make(settings: Settings) -> Callable[..., tuple[DiffusionPipeline, list[Trainable]]]:
    def of(method: str, xl: bool = False, **changes: Any) -> tuple[DiffusionPipeline, list[Trainable]]:
        if method in OF_PEFT:
            pytest.importorskip("peft")
        pipe = tiny_pipeline(xl)
        for part in (pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if part is not None:
                part.requires_grad_(False)
        config = settings(method=method, **changes)
        return pipe, make_trainables(trained_components(family_of(pipe), config), config)

    return of


Make = Callable[..., tuple[DiffusionPipeline, list[Trainable]]]

NUMBER: dict[str, Callable[[int, int], int]] = {
    "ether": lambda i, o: i,
    "anchored": lambda i, o: i,
    "ether_plus_free": lambda i, o: 2 * (i + o),
    "ether_plus": lambda i, o: 2 * (i + o),
    "naive": lambda i, o: i * i // 4,
    "lora": lambda i, o: 4 * (i + o),
    "oft": lambda i, o: 4 * ((i // 4) * (i // 4 - 1) // 2),
    "boft": lambda i, o: i * i // 4 + o,
    "hra": lambda i, o: 4 * i,
}
"""Parameters of one projection of (in, out) features with n_blocks = rank = 4; BOFT learns a scale beside."""


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_number_of_parameters_is_the_methods_formula_over_all_targets(method: str, make: Make) -> None:
    shapes = [(t.in_features, t.out_features) for t in find_targets(tiny_pipeline().unet)]
    assert len(shapes) > 8
    _, [trainable] = make(method)
    assert trainable.num_parameters() == sum(NUMBER[method](*shape) for shape in shapes)
    assert {parameter.dtype for parameter in trainable.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["ether", "ether_plus", "anchored", "ether_plus_free"])
def test_vectors_begin_at_the_length_that_is_asked_for(method: str, make: Make) -> None:
    (_, [whole]), (_, [short]) = make(method), make(method, initial_length=0.5)
    for one, other in zip(whole.parameters(), short.parameters(), strict=True):
        assert torch.equal(0.5 * one, other)
        torch.testing.assert_close(other.norm(dim=-1), torch.full(other.shape[:-1], 0.5))


def test_only_reflections_have_a_length(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"initial_length is of the vectors of reflections, and method=naive has none"):
        settings(method="naive", initial_length=0.5)


@pytest.mark.parametrize(("method", "linear"), [("ether_plus", 2 * (32 + 96)), ("lora", 4 * (32 + 288))])
def test_of_a_fused_linear_our_adapters_train_the_parts_and_others_the_whole(
    settings: Settings, method: str, linear: int
) -> None:
    """Of the 288 outputs of ``to_qkv_mlp_proj``, 96 are q, k and v."""
    if method in OF_PEFT:
        pytest.importorskip("peft")
    transformer = flux2_transformer().requires_grad_(False)
    [trainable] = make_trainables({"transformer": transformer}, settings(method=method, targets="attention"))
    named = trainable.module.named_parameters()
    assert sum(p.numel() for name, p in named if p.requires_grad and "to_qkv_mlp_proj" in name) == linear


def test_a_preset_that_a_text_encoder_lacks_names_the_component(settings: Settings) -> None:
    pipe = tiny_pipeline()
    config = settings(targets="cross", train_text_encoder=True)
    with pytest.raises(
        ValueError, match=r"^text_encoder: CLIPTextModel has no cross-attention for targets=\"cross\": "
    ):
        check_trainables(trained_components(family_of(pipe), config), config)


def test_full_trains_every_weight(make: Make) -> None:
    pipe, trainables = make("full", train_text_encoder=True)
    assert [trainable.component for trainable in trainables] == ["unet", "text_encoder"]
    for trainable in trainables:
        component = getattr(pipe, trainable.component)
        assert trainable.num_parameters() == sum(p.numel() for p in component.parameters())
    assert not any(parameter.requires_grad for parameter in pipe.vae.parameters())


@pytest.mark.parametrize("method", ["ether_plus", *OF_PEFT])
def test_targets_hold_for_every_component_and_method(method: str, make: Make) -> None:
    _, trainables = make(method, xl=True, train_text_encoder=True, targets=["*attn*k*"])
    assert [trainable.component for trainable in trainables] == ["unet", "text_encoder", "text_encoder_2"]
    for trainable in trainables:
        names = [name for name, parameter in trainable.module.named_parameters() if parameter.requires_grad]
        assert names
        assert all("to_k" in name or "k_proj" in name for name in names), names


def outputs(pipe: DiffusionPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    embeds = torch.randn(1, 77, 32, generator=generator)
    with torch.no_grad():
        result: Tensor = pipe.unet(sample, torch.tensor([500]), embeds).sample
    return result


@pytest.mark.parametrize("method", ADAPTERS)
def test_switched_off_the_model_is_the_base_bit_for_bit(method: str, make: Make) -> None:
    pipe, [trainable] = make(method)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert trainable.set_active is not None
    trained = outputs(pipe)
    trainable.set_active(False)
    base = outputs(pipe)
    trainable.set_active(True)
    assert torch.equal(base, outputs(tiny_pipeline()))
    assert not torch.equal(trained, base)
    assert torch.equal(outputs(pipe), trained)


@pytest.mark.parametrize("method", ["ether", "lora", "hra"])
def test_the_start_depends_on_the_seed_alone(method: str, make: Make) -> None:
    before = torch.get_rng_state()
    states = [[p.clone() for p in make(method, seed=seed)[1][0].parameters()] for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state()), "the global generator belongs to the user"
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, {"unet": 6e-3, "text_encoder": 6e-3}),
        ({"learning_rate": 1e-3}, {"unet": 1e-3, "text_encoder": 1e-3}),
        ({"text_encoder_lr": 1e-4}, {"unet": 6e-3, "text_encoder": 1e-4}),
        ({"text_encoder_lr": 0.0}, {"unet": 6e-3, "text_encoder": 0.0}),
    ],
)
def test_every_component_has_its_learning_rate(
    changes: dict[str, float], rates: dict[str, float], make: Make, settings: Settings
) -> None:
    _, trainables = make("ether_plus", train_text_encoder=True)
    optimizer = make_optimizer(trainables, settings(train_text_encoder=True, **changes))
    assert learning_rates(optimizer) == rates
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    for trainable, group in zip(trainables, optimizer.param_groups, strict=True):
        assert sum(parameter.numel() for parameter in group["params"]) == trainable.num_parameters()


@pytest.mark.parametrize(("precision", "fused"), [("no", True), ("bf16", True), ("fp16", None)])
def test_adamw_is_fused_unless_a_scaler_has_to_skip_its_steps(
    precision: str, fused: bool | None, make: Make, settings: Settings
) -> None:
    _, trainables = make("ether_plus")
    optimizer = make_optimizer(trainables, settings(mixed_precision=precision))
    assert [group["fused"] for group in optimizer.param_groups] == [fused]


def test_adamw_takes_the_steps_of_the_paper(make: Make, settings: Settings) -> None:
    """Algorithm 2 of arXiv 1711.05101 in fp64, over three steps; an fp32 step rounds by a few 1e-7 of its length."""
    _, (trainable,) = make("ether_plus")
    decay, rate, (beta1, beta2), eps = 0.1, 1e-2, (0.8, 0.99), 1e-8
    config = settings(learning_rate=rate, adam_beta1=beta1, adam_beta2=beta2, adam_weight_decay=decay)
    optimizer = make_optimizer([trainable], config)
    parameters = trainable.parameters()
    expected = [parameter.detach().double() for parameter in parameters]
    means, squares = ([torch.zeros_like(each) for each in expected] for _ in range(2))
    for step in range(1, 4):
        for i, parameter in enumerate(parameters):
            gradient = torch.sin(torch.arange(parameter.numel()) + step + i).reshape(parameter.shape)
            parameter.grad = gradient
            means[i] = beta1 * means[i] + (1 - beta1) * gradient.double()
            squares[i] = beta2 * squares[i] + (1 - beta2) * gradient.double() ** 2
            corrected = means[i] / (1 - beta1**step), squares[i] / (1 - beta2**step)
            expected[i] = expected[i] - rate * (corrected[0] / (corrected[1].sqrt() + eps) + decay * expected[i])
        optimizer.step()
    for parameter, exact in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.double(), exact, rtol=2e-6, atol=2e-7)
