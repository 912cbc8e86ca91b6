"""Atomic files and folders: the old content or the new, nothing else, nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ether_diffusion import files
from ether_diffusion.files import atomic_path, write_text


def content(path: Path) -> dict[str, str] | str:
    return {p.name: p.read_text() for p in path.iterdir()} if path.is_dir() else path.read_text()


def write(path: Path, kind: str, text: str) -> None:
    with atomic_path(path) as temporary:
        fill(temporary, kind, text)


def fill(temporary: Path, kind: str, text: str) -> None:
    if kind == "file":
        temporary.write_text(text)
    else:
        temporary.mkdir()
        (temporary / text).write_text(text)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_success_replaces_the_old_content_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing" / "target"
    for text in ("old", "new"):
        write(path, kind, text)
        assert content(path) == (text if kind == "file" else {text: text})
        assert os.listdir(path.parent) == ["target"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_in_the_body_keeps_the_old_content(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    path = tmp_path / "target"
    write(path, kind, "old")
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        fill(temporary, kind, "half")
        raise error
    assert content(path) == ("old" if kind == "file" else {"old": "old"})
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_at_the_path_before_the_body_is_done(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    with atomic_path(path) as temporary:
        fill(temporary, kind, "new")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system, or the rename would be a copy
    assert path.exists()


@pytest.mark.parametrize("exchanges", [True, False])
def test_folders_are_replaced_with_and_without_the_systems_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    path = tmp_path / "target"
    write(path, "folder", "old")
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    write(path, "folder", "new")
    assert content(path) == {"new": "new"}
    assert os.listdir(tmp_path) == ["target"]


def test_a_folder_is_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no moment at which the path names neither: no rename happens at all."""
    path = tmp_path / "target"
    write(path, "folder", "old")
    if not files._exchange(path, path):
        pytest.skip("this file system cannot exchange names")
    monkeypatch.setattr(os, "replace", lambda *names: pytest.fail(f"renamed {names}"))
    write(path, "folder", "new")
    assert content(path) == {"new": "new"}


def test_a_failure_between_the_two_renames_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target"
    write(path, "folder", "old")
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    replace, calls = os.replace, []

    def fails_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(KeyboardInterrupt):
        write(path, "folder", "new")
    assert content(path) == {"old": "old"}
    assert os.listdir(tmp_path) == ["target"]


def test_everything_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "target", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with atomic_path(path) as temporary:
        fill(temporary, "folder", "weights")
    assert events == ["weights", temporary.name, "rename to target", tmp_path.name]


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "target"
    write(path, "folder", "old")
    with pytest.raises(OSError):
        write(path, "file", "new")
    assert content(path) == {"old": "old"}
    assert os.listdir(tmp_path) == ["target"]


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "note.txt", "‖H - I‖ = 2√n")
    assert (tmp_path / "new" / "note.txt").read_bytes() == "‖H - I‖ = 2√n".encode()
