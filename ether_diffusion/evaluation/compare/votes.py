"""Which column readers of a comparison's page chose in the blind mode, from the files that it saved, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TypedDict

from ether_diffusion.evaluation.statistics import LEVEL, Estimate, share_interval
from ether_diffusion.page.text import interval, markdown_table, number
from ether_diffusion.reading import DamagedFileError, read_json, shown

FORMAT = 1


class Vote(TypedDict):
    """One row: the ``order`` in which the columns stood, and the ``choice`` among them, None for no preference."""

    prompt: str
    seed: int
    order: list[int]
    choice: int | None


class Votes(TypedDict):
    """What a page saves: the ``comparison`` that it is of, its ``columns`` without the base, the number of ``rows``."""

    format: int
    comparison: str
    columns: list[str]
    rows: int
    votes: list[Vote]


def read_votes(path: Path) -> Votes:
    """The choices of one reader.

    Raises:
        DamagedFileError: the file is not what a page saves.
        OSError: it cannot be read.
    """
    found: Votes = read_json(path, Votes)
    columns = list(range(len(found["columns"])))
    if found["format"] != FORMAT:
        raise DamagedFileError(f"{path} has format {found['format']}, expected {FORMAT}: update ether-diffusion")
    if len(columns) < 2:
        raise DamagedFileError(f"{path} is damaged: it has {len(columns)} columns, where a comparison has two or more")
    for vote in found["votes"]:
        if sorted(vote["order"]) != columns or vote["choice"] not in (None, *columns):
            raise DamagedFileError(f"{path} is damaged: the choice for {shown(vote['prompt'])} is of no column")
    rows = Counter((vote["prompt"], vote["seed"]) for vote in found["votes"])
    if rows and max(rows.values()) > 1:
        raise DamagedFileError(f"{path} is damaged: a row was judged twice")
    return found


def wins(readers: Sequence[Votes]) -> dict[str, Estimate]:
    """Each column's share of the choices, with its interval over prompts.

    Raises:
        ValueError: the files are of several comparisons, or there is no choice in them.
    """
    if len({reader["comparison"] for reader in readers}) > 1:
        raise ValueError("the files are of different comparisons: give those of one page")
    votes = [vote for reader in readers for vote in reader["votes"]]
    if not votes:
        raise ValueError("there is no choice in the files: judge rows in the blind mode of the page, and save again")
    columns = readers[0]["columns"]
    prompts: dict[str, list[Vote]] = {}
    for vote in votes:
        prompts.setdefault(vote["prompt"], []).append(vote)
    return {
        name: share_interval(fmean(_share(vote, column, len(columns)) for vote in of) for of in prompts.values())
        for column, name in enumerate(columns)
    }


def _share(vote: Vote, column: int, columns: int) -> float:
    return 1 / columns if vote["choice"] is None else float(vote["choice"] == column)


def votes_table(readers: Sequence[Votes]) -> str:
    """Wins and shares by column, and what they are of.

    Raises:
        ValueError: as :func:`wins`.
    """
    shares = wins(readers)
    columns = readers[0]["columns"]
    votes = [vote for reader in readers for vote in reader["votes"]]
    chosen = Counter(vote["choice"] for vote in votes)
    places = Counter(vote["order"].index(vote["choice"]) for vote in votes if vote["choice"] is not None)
    rows = [
        [name, str(chosen[column]), interval(share.mean, share.low, share.high)]
        for column, (name, share) in enumerate(shares.items())
    ]
    table = markdown_table(["column", "wins", f"share of wins, {LEVEL:.0%} interval"], rows)
    told = [
        f"{len(votes)} choices of {sum(reader['rows'] for reader in readers)}, {chosen[None]} without a preference; "
        f"files of readers: {len(readers)}.",
        f"By chance the share is {number(1 / len(columns))}. Prompts: {next(iter(shares.values())).units}; intervals "
        "are over them and assume no distribution of the shares; each holds for itself.",
        "Chosen by the place in the row: " + ", ".join(f"{chr(65 + p)} {places[p]}" for p in range(len(columns))) + ".",
    ]
    return f"{table}\n" + "\n".join(told)
