"""Break the core on purpose, and see which tests notice: a random sample of cosmic-ray's mutants.

It needs cosmic-ray and coverage, which the project does not depend on: install them into the environment by hand.

    python tests/mutants.py --seed 0 --count 120 --out mutants.jsonl
    python tests/mutants.py --seed 0 --count 120 --out mutants.jsonl --survivors   # these once more

Everything runs in a copy of the repository. A first run of the tests without mutants tells which tests execute which
lines. Each mutant meets those that execute its lines, and then, if it survives, the tests of compiled models, which the
first run leaves out because a tracer disturbs the compiler. A mutant that runs into the time limit counts as killed.
docs/testing.md says what was found.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parent.parent
TARGET = "ether_diffusion/core"
TESTS = ("tests/core", "tests/pipelines", "tests/test_private.py")
COMPILED = "compil"
"""Part of the names of the tests that compile a model."""
SLOW = "test_state_machine"
"""It runs last: it takes half a minute."""
SETTINGS = f"""
[cosmic-ray]
module-path = "{TARGET}"
timeout = 10.0
excluded-modules = []
test-command = "true"
[cosmic-ray.distributor]
name = "local"
"""


@dataclass
class Mutant:
    """One change of one place, as cosmic-ray names it, and what became of it."""

    file: str
    operator: str
    occurrence: int
    line: int
    column: int
    diff: str = ""
    outcome: str = ""
    test: str = ""
    seconds: float = 0.0

    def key(self) -> tuple[str, str, int]:
        return self.file, self.operator, self.occurrence


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this environment in the copy of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True)


def left_out(source: str) -> Iterator[ast.AST]:
    """What no test is to notice: type hints and aliases, imports for them, and the texts of errors."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr):
            yield node
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(hint, ast.AST):
                yield hint


def all_mutants(folder: Path) -> list[list[Mutant]]:
    """What cosmic-ray can do to the core: at every place the variants of one kind of change."""
    (folder / "cosmic.toml").write_text(SETTINGS, encoding="utf-8")
    command(folder, "cosmic_ray.cli", "init", "cosmic.toml", "cosmic.sqlite").check_returncode()
    places: dict[tuple[object, ...], list[Mutant]] = defaultdict(list)
    spans = {
        str(path.relative_to(folder)): [
            ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))  # type: ignore[attr-defined]
            for node in left_out(path.read_text(encoding="utf-8"))
        ]
        for path in (folder / TARGET).glob("*.py")
    }
    columns = "module_path, operator_name, occurrence, start_pos_row, start_pos_col"
    with sqlite3.connect(folder / "cosmic.sqlite") as session:
        for found in session.execute(f"SELECT {columns} FROM mutation_specs ORDER BY {columns}"):
            mutant = Mutant(*found)
            place = mutant.line, mutant.column
            if not any(start <= place <= end for start, end in spans[mutant.file]):
                kind = mutant.operator.split("/")[1].split("_")[0]
                places[mutant.file, place, kind].append(mutant)
    return list(places.values())


def covering(folder: Path) -> dict[tuple[str, int], set[str]]:
    """The test functions that execute each line of the core."""
    arguments = ("-q", "-p", "no:cacheprovider", "-k", f"not {COMPILED}", *TESTS)
    (folder / "coverage.ini").write_text(f"[run]\nsource = {TARGET}\ndynamic_context = test_function\n")
    done = command(folder, "coverage", "run", "--rcfile=coverage.ini", "-m", "pytest", *arguments)
    if done.returncode:
        raise SystemExit(f"the tests fail without mutants:\n{done.stdout[-3000:]}")
    command(folder, "coverage", "json", "--rcfile=coverage.ini", "--show-contexts", "-o", "coverage.json")
    files = json.loads((folder / "coverage.json").read_text(encoding="utf-8"))["files"]
    return {
        (file, int(line)): {name for name in names if name}
        for file, found in files.items()
        for line, names in found["contexts"].items()
    }


def statement(source: str, line: int) -> range:
    """The lines of the innermost statement around a line, without the bodies of compound ones."""
    best = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if isinstance(body, list) and line < body[0].lineno else node.end_lineno
            best = range(node.lineno, (end or line) + 1)
    return best


def in_order(tests: set[str], file: str) -> list[str]:
    """Tests as pytest is to run them: first those of the file that has the name of the mutant's, one per test file."""

    nodes = [
        "{}.py::{}".format(module.replace(".", "/"), test) for module, _, test in (n.rpartition(".") for n in tests)
    ]
    return sorted(nodes, key=lambda node: (SLOW in node, f"test_{Path(file).stem}.py" not in node, node))


def import_libraries(folder: Path) -> None:
    """Import all that the package imports, so that the forks of this process need to import the package alone."""
    sys.path.insert(0, str(folder))
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    from diffusers import StableDiffusionXLPipeline  # noqa: F401

    import ether_diffusion.playground.tiny  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "ether_diffusion"]:
        del sys.modules[name]
    sys.path.remove(str(folder))
    gc.freeze()  # so that memory stays shared


def pytest_code(folder: Path, words: list[str], limit: float) -> tuple[int | None, str]:
    """Exit status and output of pytest in a fork of this process, which has imported what takes long; None if late."""
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        os.setsid()  # so that what the tests start ends with them
        os.chdir(folder)
        sys.dont_write_bytecode = True
        os.environ["PYTHONPATH"] = str(folder)
        sys.path.insert(0, str(folder))
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *words])
        sys.stdout.flush()
        os._exit(code)
    end, status = time.monotonic() + limit, None
    while status is None and time.monotonic() < end:
        time.sleep(0.05)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status, output.read_text(encoding="utf-8", errors="replace")


def meet(folder: Path, mutant: Mutant, tests: list[str], limit: float) -> None:
    """Apply a mutant, run tests until one fails, and put the file back."""
    path = folder / mutant.file
    before, start = path.read_text(encoding="utf-8"), time.monotonic()
    after = mutate_code(before.encode(), get_operator(mutant.operator)(), mutant.occurrence)
    lines = difflib.unified_diff(before.splitlines(), str(after).splitlines(), lineterm="", n=0)
    mutant.diff = "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
    path.write_text(str(after), encoding="utf-8")
    mutant.outcome, compiled = "survived", [TESTS[0], "-k", COMPILED]
    for words in [tests, compiled] if tests else [compiled, list(TESTS)]:
        status, output = pytest_code(folder, words, limit)
        if status is None or status != 0:
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
            mutant.outcome = "killed by timeout" if status is None else "killed"
            mutant.test = failed.group(1) if failed else output.strip()[-200:]
            break
    path.write_text(before, encoding="utf-8")
    mutant.seconds = round(time.monotonic() - start, 1)


def report(mutants: list[Mutant]) -> str:
    """How many were killed, and a table of the survivors for docs/testing.md."""
    killed = sum(mutant.outcome.startswith("killed") for mutant in mutants)
    late = sum(mutant.outcome == "killed by timeout" for mutant in mutants)
    rows = ["| where | what | |", "|---|---|---|"]
    for mutant in sorted(mutants, key=lambda mutant: (mutant.file, mutant.line)):
        if mutant.outcome == "survived":
            old, new = (" ".join(re.findall(rf"^[{sign}]\s*(.*)$", mutant.diff, re.MULTILINE)) for sign in "-+")
            rows.append(f"| {Path(mutant.file).name}:{mutant.line} | `{old}` → `{new}` | |")
    return "\n".join([f"{len(mutants)} mutants, {killed} killed ({late} by timeout)", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--limit", type=float, default=300, help="seconds that the tests of one mutant may take")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per mutant; those in it are not run")
    parser.add_argument("--survivors", action="store_true", help="run those in the file that survived once more")
    options = parser.parse_args()
    lines = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    done = {mutant.key(): mutant for mutant in (Mutant(**json.loads(line)) for line in lines)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        places, rng = all_mutants(folder), random.Random(options.seed)
        sample = [rng.choice(variants) for variants in rng.sample(places, min(options.count, len(places)))]
        tests = covering(folder)
        import_libraries(folder)
        for number, mutant in enumerate(sample, 1):
            known = done.get(mutant.key())
            if known is None or (options.survivors and known.outcome == "survived"):
                source = (folder / mutant.file).read_text(encoding="utf-8")
                names = set().union(*(tests.get((mutant.file, n), set()) for n in statement(source, mutant.line)))
                meet(folder, mutant, in_order(names, mutant.file), options.limit)
                done[mutant.key()] = mutant
                print(f"{number}: {mutant.file}:{mutant.line} {mutant.outcome} {mutant.test}", flush=True)
                text = "\n".join(json.dumps(asdict(each)) for each in done.values())
                options.out.write_text(text + "\n", encoding="utf-8")
        print(report([done[mutant.key()] for mutant in sample]))


if __name__ == "__main__":
    main()
