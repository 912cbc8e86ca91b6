"""The console: what it prints, once, from which process; and messages of libraries that are silenced by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from ether_diffusion.bars import progress
from ether_diffusion.logs import (
    PACKAGE,
    SILENCED,
    TRAINING,
    Silenced,
    informs,
    show_logs,
    show_study_logs,
    silence_libraries,
)

OURS = logging.getLogger(f"{PACKAGE}.somewhere")
LIBRARY = logging.getLogger("some.package")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, package, training = (logging.getLogger(name) for name in (None, PACKAGE, TRAINING))
    handlers, levels = list(root.handlers), (package.level, training.level)
    yield
    root.handlers[:], (package.level, training.level) = handlers, levels
    logging.getLogger().manager._clear_cache()  # type: ignore[attr-defined]


def speak() -> None:
    OURS.debug("detail")
    OURS.info("told")
    OURS.warning("odd")
    OURS.error("wrong")
    LIBRARY.info("chatter")
    LIBRARY.warning("careful")


@pytest.mark.parametrize(
    ("level", "quiet", "lines"),
    [
        ("debug", False, ["debug: detail", "told", "warning: odd", "error: wrong"]),
        ("info", False, ["told", "warning: odd", "error: wrong"]),
        ("warning", False, ["warning: odd", "error: wrong"]),
        ("error", False, ["error: wrong"]),
        ("debug", True, ["warning: odd", "error: wrong"]),
        ("error", True, ["error: wrong"]),
    ],
)
def test_a_level_says_what_is_printed(
    level: str, quiet: bool, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    show_logs(level, quiet)
    speak()
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in [*lines, "warning: careful"]))


def test_a_message_is_printed_once_in_a_program_and_again_in_the_next(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    for name in ("a", "a", "b"):
        OURS.warning("skipping %s", name)
    assert capsys.readouterr().err == "warning: skipping a\nwarning: skipping b\n"
    show_logs()
    OURS.warning("skipping a")
    assert capsys.readouterr().err == "warning: skipping a\n"


def test_another_process_prints_errors_alone_and_shows_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    show_logs()
    speak()
    assert capsys.readouterr().err == "error: wrong\n"
    assert not informs()


def say_as_study_and_training() -> None:
    speak()
    logging.getLogger(f"{TRAINING}.loop").info("step 1")
    logging.getLogger(f"{TRAINING}.loop").warning("a prompt is cut")


@pytest.mark.parametrize(("rank", "lines"), [("0", ["told", "warning: odd"]), ("1", ["warning: odd"])])
def test_a_study_prints_warnings_of_every_process_and_no_information_of_trainings(
    rank: str, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    show_study_logs()
    say_as_study_and_training()
    expected = [*lines, "error: wrong", "warning: careful", "warning: a prompt is cut"]
    assert capsys.readouterr().err == "".join(f"{line}\n" for line in expected)
    assert informs() == (rank == "0")


def test_a_training_after_a_study_informs_again(capsys: pytest.CaptureFixture[str]) -> None:
    show_study_logs()
    show_logs()
    say_as_study_and_training()
    assert "step 1\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("level", "quiet", "bars"), [("info", False, True), ("warning", False, False), ("info", True, False)]
)
def test_bars_are_for_those_who_want_information(level: str, quiet: bool, bars: bool) -> None:
    show_logs(level, quiet)
    assert informs() == bars


def test_a_bar_before_the_training_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    show_logs()
    assert list(progress([1, 2], "class images")) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("silenced", SILENCED, ids=lambda each: each.logger)
def test_a_message_is_silenced_by_its_logger_and_its_text(
    silenced: Silenced, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, text = silenced.logger, silenced.text
    silence_libraries()
    silence_libraries()
    logger = logging.getLogger(name)
    assert len(logger.filters) == 1
    for parent in [name.rpartition(".")[0], name.partition(".")[0]]:
        monkeypatch.setattr(logging.getLogger(parent), "propagate", True)
    with caplog.at_level(logging.WARNING, name):
        logger.warning("first %s last", text)
        logger.warning("another")
        logging.getLogger("some.other").warning("first %s last", text)
    said = {(record.name, record.getMessage()) for record in caplog.records}
    assert said == {(name, "another"), ("some.other", f"first {text} last")}


@pytest.mark.parametrize("silenced", SILENCED, ids=lambda each: each.logger)
def test_the_library_still_says_it(silenced: Silenced) -> None:
    """An entry for a message that is not there any more silences nothing: remove it."""
    name, text = silenced.logger, silenced.text
    pytest.importorskip(name.partition(".")[0])
    assert text in Path(str(import_module(name).__file__)).read_text(encoding="utf-8")
