"""The settings of a run that its family of base models depends on; without torch, for those who only ask for help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ether_diffusion.ranges import Range, check_ranges

Weighting = Literal["logit_normal", "mode", "none", "sigma_sqrt", "cosmap"]
"""The names of diffusers' scripts: two distributions of σ, uniform σ, and uniform σ with two weights of the loss."""


Quantization = Literal["nf4", "int8", "fp8-storage"]
"""Of the frozen denoiser: bitsandbytes' 4-bit normal float and 8-bit integers, or fp8 as the dtype of storage."""

PROMPT_CHUNKS = Range(1, 64)
"""Chunks of a prompt; 64 are 4800 tokens, more than any caption has."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """The settings of a run that its objective depends on.

    Attributes:
        snr_gamma: γ of min-SNR weighting, of bases with DDPM noise.
        weighting_scheme: how σ is drawn, or what the loss is weighted with, of bases with flow matching.
        logit_mean: of the scheme logit_normal.
        logit_std: likewise.
        mode_scale: of the scheme mode.
    """

    snr_gamma: float | None = None
    weighting_scheme: Weighting = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


@dataclass(frozen=True)
class FamilySettings:
    """The settings of a run that its family depends on; None is the family's own default.

    Attributes:
        guidance_scale_training: guidance that the denoiser is told in training, of bases that were distilled with it.
        max_sequence_length: tokens that a prompt is cut and padded to.
        prompt_chunks: chunks of CLIP's length that each prompt is encoded in; with 1 the pipeline encodes it itself.

    Raises:
        ValueError: a number of chunks that no prompt can have.
    """

    guidance_scale_training: float | None = None
    max_sequence_length: int | None = None
    prompt_chunks: int = 1

    def __post_init__(self) -> None:
        check_ranges(self, {"prompt_chunks": PROMPT_CHUNKS})
