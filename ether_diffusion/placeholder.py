"""What a placeholder token may be: a new token that stands for a subject in prompts, such as <dog>."""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(r"<[a-z0-9][a-z0-9_-]*>")
"""No part of another word, and in small letters, which CLIP's tokenizers make of capital ones."""
PLACEHOLDER_LIMIT = 64
"""Characters of a placeholder token."""
VECTORS_LIMIT = 64
"""Vectors of a token; a prompt of CLIP has 75 places."""


def check_placeholder(token: str) -> None:
    """Refuse what cannot be a placeholder token.

    Raises:
        ValueError: it is not of the form ``<dog>``.
    """
    if len(token) > PLACEHOLDER_LIMIT or not PLACEHOLDER.fullmatch(token):
        raise ValueError(
            f"the placeholder token {token[:PLACEHOLDER_LIMIT]!r} must be small letters, digits, - and _ in angle "
            "brackets, such as <dog>: within another word it would be found, too"
        )
