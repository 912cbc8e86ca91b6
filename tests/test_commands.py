"""What README and docs tell people to type: every command exists, with every flag, and its values are accepted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, commands, fault, split, workplace

from ether_diffusion.cli.verbs import ETHER


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[Path]:
    with workplace() as folder:
        yield folder


def whole(*words: str) -> Command:
    return Command("a page", words, True)


def test_every_command_of_the_documents_is_one() -> None:
    assert {str(command): said for command in commands() if (said := fault(command))} == {}


def test_every_verb_is_in_the_documents() -> None:
    named = {command.words[1] for command in commands() if command.words[0] == "ether"}
    assert set(ETHER.verbs) - named == set()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ether sampel runs/dog", "no verb sampel"),
        ("ether sample runs/dog --strength 1 --seeds 0", "no flag --strength"),
        ("ether sample runs/dog --seeds many", "many"),
        ("ether train --config dreambooth_sd15 --output_dir runs/dog --max_steps 3", "max_steps"),
        ("ether train --config dreambooth_sd99 --output_dir runs/dog", "dreambooth_sd99"),
        ("accelerate launch --number 2 train_dreambooth.py --output_dir a", "unrecognized arguments: --number"),
        ("accelerate launch --cpu train_dreamboth.py --output_dir a", "there is no train_dreamboth.py"),
        ("accelerate launch -m ether_diffusion.cli bench --shards 1/2", "shards"),
        ("python -m eval.report runs --watched", "watched"),
        ("python benchmarks/step.py --model nothing", "nothing"),
        ("make coffee", "no target of make coffee"),
        ("pip install -e .[everything]", "no extra everything"),
        ("sudo rm -rf runs", "the command sudo is not known here"),
    ],
)
def test_a_command_that_is_wrong_is_found(words: str, said: str) -> None:
    assert said in str(fault(whole(*words.split())))


def test_a_command_with_placeholders_has_its_flags_looked_at() -> None:
    line = ("ether", "sample", "RUN", "--seeds", "…")
    assert fault(Command("a page", line, False)) is None
    assert fault(Command("a page", (*line, "--strength", "…"), False)) == "no flag --strength"


def test_commands_of_a_block_are_told_apart() -> None:
    block = """A=1 make demo    # a comment
srun bash -c 'ether train --seed "$SEED" \\
  --output_dir $(pwd)/run && make test'
"""
    assert list(split(block)) == [
        ["make", "demo"],
        ["ether", "train", "--seed", "1", "--output_dir", "1/run"],
        ["make", "test"],
    ]
