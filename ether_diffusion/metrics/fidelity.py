"""Subject fidelity after DreamBooth (arXiv 2208.12242): do the images show this subject, and what the prompt says?"""

from __future__ import annotations

from torch import Tensor


def subject_similarity(generated: Tensor, references: Tensor) -> float:
    """Mean cosine over all pairs of generated and real images: DINO or CLIP-I, by whose features they are.

    Args:
        generated: unit features (N, d).
        references: unit features (M, d) of the subject's own images.
    """
    return (generated @ references.T).mean().item()


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


def prompt_similarity(generated: Tensor, prompts: Tensor) -> float:
    """Mean cosine of each generated image and its own prompt: CLIP-T.

    Args:
        generated: unit image features (N, d).
        prompts: unit text features (N, d).
    """
    return (generated * prompts).sum(-1).mean().item()


def without_token(prompt: str, token: str) -> str:
    """The prompt without the rare token, which CLIP was never taught: ``"a qwe dog"`` becomes ``"a dog"``."""
    return " ".join(word for word in prompt.split() if word != token)
