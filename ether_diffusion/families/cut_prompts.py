"""Which prompts an encoder sees only the beginning of, in words for the user."""

from __future__ import annotations

from collections.abc import Iterable

from ether_diffusion.families.protocol import Family

SHOWN = 3
"""So many prompts are named for each encoder."""


def cut_remarks(family: Family, prompts: Iterable[str]) -> list[str]:
    """A remark for each text encoder that does not see all of every prompt: how many, the first few and their rests.

    Args:
        family: around a pipeline with its tokenizers; its settings say how much is seen.
        prompts: any number; equal ones count once.
    """
    distinct, found = list(dict.fromkeys(prompts)), dict[str, dict[str, str]]()
    for prompt in distinct:
        for encoder, rest in family.cut(prompt).items():
            found.setdefault(encoder, {})[prompt] = rest
    remarks = []
    for encoder, rests in found.items():
        named = [f'of "{prompt}" it does not see "{rest}"' for prompt, rest in list(rests.items())[:SHOWN]]
        more = "; …" if len(rests) > SHOWN else ""
        remarks.append(
            f"{encoder} sees only the beginning of {len(rests)} of {len(distinct)} prompts: {'; '.join(named)}{more}"
        )
    return remarks
