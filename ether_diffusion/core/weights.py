"""What can be read of a projection and changed in it, whatever it is stored in: weight, bias, and its own forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ether_diffusion.core.functional import matmul_dtype
from ether_diffusion.core.methods import Sides
from ether_diffusion.core.plan import Mixture, PerSample

TOKENS_TO_FEATURES = 0.5
"""From half as many tokens as output features on, four passes over the weight cost less than four over the tokens.

That is so on a CPU. On other devices launches count, of which the weight's way takes more.
"""


def frozen_weight(module: nn.Module, x: Tensor, sides: Sides) -> Tensor | None:
    """The weight, where it can be read and needs no gradient, and x and the rows are of its dtype and stay in it.

    Under autocast to fp16, x stays in fp32 where gradients are taken, and products in it would not.
    """
    if not is_plain(module) or matmul_dtype(x) != x.dtype:
        return None
    weight = plain_weight(module)
    if weight is None or weight.device != x.device or not x.dtype == weight.dtype == sides[0].analysis.dtype:
        return None
    trained = weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
    return None if trained and torch.is_grad_enabled() else weight  # their gradients are autograd's


def many_tokens(x: Tensor, weight: Tensor, plan: Mixture | PerSample) -> bool:
    """Whether passes over the weight cost less than passes over the tokens."""
    samples = 1 if isinstance(plan, Mixture) else x.shape[0]
    return x.device.type == "cpu" and x.numel() >= TOKENS_TO_FEATURES * samples * weight.numel()


def keeps_output(output: Tensor) -> bool:
    """Whether the backward of few tokens keeps the output rather than makes what it needs of it with the weight.

    A pass over the weight is nothing for a GPU, and its memory is dear.
    """
    return output.device.type == "cpu"


def is_plain(module: nn.Module) -> bool:
    """Whether a projection computes what ``nn.Linear`` does: neither quantised nor under an offloading hook."""
    return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__


def bias_of(module: nn.Module, like: Tensor) -> Tensor | None:
    """The projection's bias; where an offloading hook or a quantised layer hides it, the image of zero."""
    bias = getattr(module, "bias", None)
    if bias is None:
        return None
    if isinstance(bias, Tensor) and bias.device == like.device and "forward" not in module.__dict__:
        return bias
    found: Tensor = module.forward(like.new_zeros(1, int(module.in_features)))[0]  # type: ignore[arg-type]
    return found


def image(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """W x, without the bias, by the projection's own forward."""
    found: Tensor = module.forward(x)
    return found if bias is None else found - bias.to(found.dtype)


def plain_weight(module: nn.Module) -> Tensor | None:
    """The (out_features, in_features) weight of a projection; None where it is quantised (8 bits and fewer count)."""
    weight = getattr(module, "weight", None)
    if type(weight) is not nn.Parameter and (not isinstance(weight, Tensor) or type(weight.data) is not Tensor):
        return None  # a subclass holds packed numbers
    whole = weight.is_floating_point() and weight.element_size() > 1
    return weight if whole and list(weight.shape) == [module.out_features, module.in_features] else None


def writable_weight(module: nn.Module, wish: str) -> Tensor:
    """The weight of a projection that can be changed in place.

    Args:
        module: the projection.
        wish: what is to be done, for the error.

    Raises:
        ValueError: it is quantised, sharded, stored in 8 bits, or an offloading hook keeps it elsewhere.
    """
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    if isinstance(weight, Tensor) and type(weight.data).__name__ == "DTensor":
        raise ValueError(f"cannot {wish} {kind}: its weight is sharded (FSDP); use the adapter unfused")
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() == 1:
        raise ValueError(f"cannot {wish} {kind}: its weight is stored in 8 bits ({weight.dtype}); use it unfused")
    plain = plain_weight(module)
    if isinstance(weight, Tensor) and (weight.is_meta or weight.numel() == 0):
        raise ValueError(
            f"cannot {wish} offloaded weights: call pipe.remove_all_hooks(), which brings them back, and enable "
            "offloading again afterwards"
        )
    if plain is None:
        raise ValueError(f"cannot {wish} {kind}: its weight is quantised; use the adapter unfused")
    return plain


def checksum(weight: Tensor) -> int:
    """A number that stands for the bits of a weight, of two bytes an element at least, in their places."""
    bits = weight.detach().contiguous().view(-1).view(_INTEGERS[weight.element_size()]).long()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return int((bits * places).sum()) ^ int(bits.sum())


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_but_for_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two weights differ by no more than what adding another update and taking it off again rounds away."""
    epsilon = torch.finfo(found.dtype).eps
    difference, scale = (found.double() - expected.double()).abs(), expected.double().square().mean().sqrt()
    near = difference.square().mean().sqrt() <= epsilon * scale
    return bool(near and (difference <= 4 * epsilon * (expected.double().abs() + scale)).all())
