"""What readers chose: shares against a count by hand, and files that no page saved are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.cli import main
from ether_diffusion.evaluation.compare.votes import read_votes, wins
from ether_diffusion.evaluation.statistics import share_interval


def votes_file(path: Path, choices: dict[tuple[str, int], int | None], count: int = 2, **changes: Any) -> Path:
    votes = [
        {"prompt": prompt, "seed": seed, "order": list(reversed(range(count))), "choice": choice}
        for (prompt, seed), choice in choices.items()
    ]
    names = ["dog", "lora", "third"][:count]
    found = {"format": 1, "comparison": "c0ffee", "columns": names, "rows": 8, "votes": votes}
    path.write_text(json.dumps(found | changes))
    return path


def test_seeds_and_readers_are_averaged_within_a_prompt(tmp_path: Path) -> None:
    one = read_votes(votes_file(tmp_path / "a.json", {("p", 0): 0, ("p", 1): 1, ("q", 0): 0, ("r", 0): None}))
    two = read_votes(votes_file(tmp_path / "b.json", {("p", 0): 0, ("q", 0): 0}))
    found = wins([one, two])
    by_prompt = [2 / 3, 1, 1 / 2]
    assert found["dog"] == share_interval(by_prompt)
    assert found["dog"].mean == pytest.approx(sum(by_prompt) / 3)
    assert found["lora"].mean == pytest.approx(1 - found["dog"].mean)
    assert found["dog"].units == 3


def test_no_preference_counts_for_all_columns_alike(tmp_path: Path) -> None:
    found = wins([read_votes(votes_file(tmp_path / "a.json", {("p", 0): None, ("q", 0): 2}, count=3))])
    assert [each.mean for each in found.values()] == pytest.approx([1 / 6, 1 / 6, 2 / 3])


def test_the_table_names_wins_shares_chance_and_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = votes_file(tmp_path / "a.json", {(f"prompt {n}", 0): 0 for n in range(6)} | {("last", 0): None})
    main(["votes", str(file)])
    said = capsys.readouterr().out
    low, high = (
        f"{each:.3f}" for each in (share_interval([1.0] * 6 + [0.5]).low, share_interval([1.0] * 6 + [0.5]).high)
    )
    assert f"| dog | 6 | 0.929 [{low}, {high}] |" in said
    assert "7 choices of 8, 1 without a preference" in said
    assert "By chance the share is 0.500. Prompts: 7" in said
    assert "A 0, B 6" in said  # the columns stood in reversed order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, expected 1"),
        ({"columns": ["dog"]}, "has 1 columns"),
        ({"votes": [{"prompt": "p", "seed": 0, "order": [0, 1], "choice": 2}]}, "is of no column"),
        ({"votes": [{"prompt": "p", "seed": 0, "order": [0, 0], "choice": 0}]}, "is of no column"),
        ({"votes": [{"prompt": "p", "seed": 0, "order": [0, 1], "choice": 0}] * 2}, "judged twice"),
        ({"votes": []}, "there is no choice"),
        ({"votes": [{"prompt": "p"}]}, "damaged"),
    ],
)
def test_a_file_that_no_page_saved_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["votes", str(votes_file(tmp_path / "a.json", {("p", 0): 0}, **changes))])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_files_of_two_comparisons_are_not_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = votes_file(tmp_path / "a.json", {("p", 0): 0})
    two = votes_file(tmp_path / "b.json", {("p", 0): 0}, comparison="other")
    with pytest.raises(SystemExit):
        main(["votes", str(one), str(two)])
    assert "different comparisons" in capsys.readouterr().err
