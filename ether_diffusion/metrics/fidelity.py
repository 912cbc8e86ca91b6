"""Subject fidelity after DreamBooth (arXiv 2208.12242): do the images show this subject, and what the prompt says?

All features are of unit length, so that their products are cosines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor


def pair_similarity(images: Tensor, references: Tensor) -> Tensor:
    """Cosines of all pairs, (N, M): DINO or CLIP-I by whose features they are, whose mean over all is the score.

    PRES, DreamBooth's measure of prior preservation, is the same with the images of the *bare class* in place of
    the subject's: how much of the subject has leaked into them; lower is better.

    Args:
        images: unit features (N, d) of generated images.
        references: unit features (M, d) of the subject's own images.
    """
    return images @ references.T


def similarity_among(references: Tensor) -> float:
    """Mean cosine over all pairs of different images of the subject: the "real images" row of the papers' tables.

    Args:
        references: unit features (M, d).

    Raises:
        ValueError: there are fewer than two.
    """
    count = len(references)
    if count < 2:
        raise ValueError("one image has no other to be compared with")
    cosines = references @ references.T
    return ((cosines.sum() - cosines.trace()) / (count * (count - 1))).item()


def prompt_similarity(images: Tensor, prompts: Tensor) -> Tensor:
    """Cosine of each image and its own prompt, (N,); their mean is CLIP-T.

    Args:
        images: unit image features (N, d).
        prompts: unit text features (N, d).
    """
    return (images * prompts).sum(-1)


def drift(images: Tensor, base: Tensor) -> Tensor:
    """(1 - cos) / 2 of each image and the base's for the same prompt and seed, (N,): 0 is none, 1 the greatest.

    For prompts that have nothing to do with the subject: what the finetuning changed where it should change nothing.

    Args:
        images: unit features (N, d) of images with the adapter.
        base: unit features (N, d) of images without it.
    """
    return ((1 - (images * base).sum(-1)) / 2).clamp(min=0)  # a cosine's rounding may pass 1


def without_token(prompt: str, token: str) -> str:
    """The prompt without the rare token, which CLIP was never taught: ``"a qwe dog"`` becomes ``"a dog"``.

    Only whole words are taken out, with the space before them: ``qwe`` of ``"a qwe's dog"``, nothing of ``"qweens"``.
    """
    return " ".join(_word(token).sub("", prompt).split())


def check_token(token: str, prompts: Sequence[str]) -> None:
    """Raise if no prompt has the token as a word of its own.

    Raises:
        ValueError: none has it; CLIP-T would then be of prompts with the real token in them.
    """
    if not any(_word(token).search(prompt) for prompt in prompts):
        raise ValueError(
            f"no prompt has the word {token!r}, such as {prompts[0]!r}: give --token the rare word of the training, "
            "or leave it out to score the prompts as they are written"
        )


def _word(token: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)")
