"""A frozen base in fewer bits: bitsandbytes' 4 and 8 bits, or fp8 as the dtype of storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from ether_diffusion.families.settings import Quantization

if TYPE_CHECKING:
    from diffusers import ModelMixin


def quantize(denoiser: ModelMixin, kind: Quantization, device: torch.device) -> None:
    """Replace the Linears in the blocks of a frozen denoiser, or store its weights in fp8; what is left stays.

    nf4 and int8 put layers of bitsandbytes in their place, one after another on the device, so that the device never
    holds the whole model in full precision. fp8-storage casts the weights of a layer to the denoiser's dtype while it
    computes, by diffusers' layerwise casting; convolutions stay.

    Args:
        denoiser: frozen, in the dtype of the computation.
        kind: nf4, int8 or fp8-storage.
        device: where it will compute.

    Raises:
        ImportError: nf4 and int8 need bitsandbytes.
        ValueError: the denoiser has no Linear in a list of blocks.
    """
    if kind == "fp8-storage":
        # a convolution keeps its weight for the backward as it is stored, which is no dtype to compute with
        denoiser.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=denoiser.dtype, skip_modules_classes=(nn.Conv2d,)
        )
        return
    paths = [path for path, _ in denoiser.named_modules() if is_quantizable(denoiser, path)]
    if not paths:
        name = type(denoiser).__name__
        raise ValueError(f"{name} has no Linear in its blocks to quantise: leave out base_quantization")
    dtype = denoiser.dtype
    for path in tqdm(paths, desc=f"quantising to {kind}", leave=False):
        parent, _, name = path.rpartition(".")
        linear = denoiser.get_submodule(path)
        setattr(denoiser.get_submodule(parent), name, _quantized(linear, kind, dtype).to(device))


def is_quantizable(denoiser: nn.Module, path: str) -> bool:
    """Whether a module is a Linear in one of the model's lists of blocks: embeddings and the last layer are not.

    The small matrices of a LoRA in such a Linear are left as they are.
    """
    parts = path.split(".")
    if any(part.startswith("lora_") for part in parts):
        return False
    return type(denoiser.get_submodule(path)) is nn.Linear and any(
        isinstance(denoiser.get_submodule(".".join(parts[:n])), nn.ModuleList) for n in range(1, len(parts))
    )


def _quantized(linear: nn.Linear, kind: Quantization, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    shape = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.detach()
    if kind == "nf4":
        new = layers.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
        new.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
        new.support_avx512bf16_for_cpu = False  # in evaluation mode it would repack the weights, on CPUs, and for good
    else:
        new = layers.Linear8bitLt(*shape, has_fp16_weights=False)
        new.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    quantized: nn.Module = new.requires_grad_(False)
    return quantized
