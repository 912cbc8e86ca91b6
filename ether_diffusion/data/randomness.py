"""Counter-based randomness: a sample's draws depend on its counter, never on what was drawn before."""

from __future__ import annotations

import hashlib
import json

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """Return a fresh CPU generator that is a pure function of ``(seed, *key)``.

    A sample's augmentation, noise and timestep drawn from ``generator(seed, "noise", counter)`` are the same
    on any number of processes, in any worker and after a resume. ``1`` and ``"1"`` are different keys.

    PyTorch's CPU generator keeps 32 bits of its seed, so among ``n`` keys about ``n**2 / 2**33`` pairs share
    a stream: far apart in a run, which does no harm to training.

    Raises:
        TypeError: the seed or a key is neither an ``int`` nor a ``str``.
    """
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
