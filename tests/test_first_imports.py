"""First imports: the collector pauses for them alone, and Ctrl-C meanwhile ends the process."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ether_diffusion.first_imports import ended_by_ctrl_c, first_imports

ROOT = Path(__file__).parents[1]


def ended(code: str) -> subprocess.CompletedProcess[str]:
    """A new process that ran the code."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_collector_pauses_for_first_imports_alone_and_runs_again_after_them() -> None:
    code = (
        "import gc, sys\nfrom ether_diffusion.first_imports import first_imports\n"
        "with first_imports():\n    assert not gc.isenabled()\n    import json\n"
        "assert gc.isenabled() and gc.get_freeze_count() == 0, 'nothing heavy came'\n"
        "with first_imports():\n    assert not gc.isenabled()\n    import torch\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 10_000\n"
        "frozen = gc.get_freeze_count()\n"
        "with first_imports():\n    assert gc.isenabled()\n    kept = [[] for _ in range(1000)]\n"
        "assert gc.isenabled() and gc.get_freeze_count() <= frozen\n"
        "gc.unfreeze()\ngc.disable()\ndel sys.modules['torch']\n"
        "with first_imports():\n    pass\n"
        "assert not gc.isenabled(), 'the user turned it off'"
    )
    assert ended(code).returncode == 0, ended(code).stderr


def test_ctrl_c_cannot_be_swallowed_by_a_library() -> None:
    code = (
        "import signal\nfrom ether_diffusion.first_imports import first_imports\n"
        "with first_imports():\n"
        "    try:\n        signal.raise_signal(signal.SIGINT)\n    except KeyboardInterrupt:\n        pass\n"
        "print('half imported')"
    )
    done = ended(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_ctrl_c_is_as_before_afterwards_also_where_they_are_nested() -> None:
    with first_imports():
        inside = signal.getsignal(signal.SIGINT)
        with ended_by_ctrl_c():
            assert signal.getsignal(signal.SIGINT) is inside
        assert signal.getsignal(signal.SIGINT) is inside
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_handles_ctrl_c_already_goes_on_doing_so() -> None:
    def own(number: int, frame: object) -> None:
        """Somebody else's."""

    before = signal.signal(signal.SIGINT, own)
    try:
        with first_imports():
            assert signal.getsignal(signal.SIGINT) is own
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    with first_imports():  # an import that takes it over keeps it
        signal.signal(signal.SIGINT, own)
    assert signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, before)


def test_another_thread_may_import() -> None:
    seen: list[object] = []

    def work() -> None:
        with first_imports():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    assert gc.isenabled()
