"""A terminal that is closed while a program writes to it."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ether_diffusion import terminal
from ether_diffusion.terminal import Closable, may_close

ROOT = Path(__file__).parents[1]


class Broken(io.StringIO):
    """A stream whose calls fail."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


def test_a_closed_terminal_is_left_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setattr(terminal, "leave_terminal", lambda: left.append(True))
    stream = Closable(Broken(errno.EIO))
    assert stream.write("told") == 4
    stream.flush()
    assert left == [True, True]


def test_any_other_error_is_told() -> None:
    stream = Closable(Broken(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        stream.write("told")
    with pytest.raises(OSError, match="No space left"):
        stream.flush()


def test_files_and_pipes_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with may_close():
        assert (sys.stdout, sys.stderr) == before
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no terminals")
@pytest.mark.parametrize("guard", ["may_close", "nullcontext"])
def test_print_bars_and_messages_go_on_without_the_terminal(guard: str, tmp_path: Path) -> None:
    """Without the guard the same program dies, so the test can fail."""
    code = (
        "import sys\n"
        "from contextlib import nullcontext\n"
        "from tqdm import tqdm\n"
        "from ether_diffusion.logs import logging, show_logs\n"
        "from ether_diffusion.terminal import may_close\n"
        "show_logs()\n"
        f"with {guard}():\n"
        "    with may_close(): pass  # nested, as a program within the command\n"
        "    print('ready', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    for number in tqdm(range(3), mininterval=0):\n"
        "        print(number, flush=True)\n"
        "        logging.getLogger('ether_diffusion').info('step %d', number)\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\n"
    )
    outer, inner = os.openpty()
    command = ["env", "--ignore-signal=HUP", sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=inner, stderr=inner, cwd=ROOT, start_new_session=True
    )
    os.close(inner)
    assert process.stdin is not None
    while b"ready" not in os.read(outer, 4096):
        pass
    os.close(outer)
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert (process.wait(timeout=100) == 0) == (guard == "may_close")
    assert (tmp_path / "done").exists() == (guard == "may_close")
