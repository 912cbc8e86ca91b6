"""Run a benchmark over two nodes, kill one of them amid its jobs, and compare what comes out with one process.

    python tests/nodes.py

Two launchers of two processes each share a folder, as on two nodes of a cluster. When three trainings are done, the
second launcher and its processes are killed with SIGKILL; it comes back as a launch of one process. Nothing that was
done may be done again, nothing may be missing, and the summary must be that of one process, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
ARMS = {"ether": {"method": "ether"}, "ether_plus": {"method": "ether_plus"}}
SUBJECTS = ("gift-box", "striped-robot")
TRAINED_BEFORE_THE_KILL = 3
PATIENCE = 900.0
"""Seconds that a launch may take."""


def written_config(folder: Path) -> Path:
    """Two methods with two seeds each, four steps long, and the anchors of two subjects."""
    config = yaml.safe_load((ROOT / "configs" / "eval_playground.yaml").read_text())
    config["training"] |= {"max_train_steps": 4, "checkpointing_steps": 2}
    config["arms"], config["seeds"] = ARMS, [0, 1]
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def launch(config: Path, folder: Path, launcher: Sequence[str] = (), log: str = "one") -> subprocess.Popen[bytes]:
    """Start the benchmark, in a group of its own; what it prints goes to a file beside the folder."""
    arguments = ["--config", str(config), "--output_dir", str(folder), f"--subjects=[{','.join(SUBJECTS)}]"]
    arguments += ["--images_per_prompt", "1", "--num_inference_steps", "2"]
    command = [sys.executable, *launcher, str(ROOT / "eval" / "dreambench.py"), *arguments]
    with (config.parent / f"{log}.log").open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def node(rank: int, port: int) -> list[str]:
    """The launcher of one of two nodes."""
    return [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"),
        *("--node_rank", str(rank), "--master_addr", "localhost", "--master_port", str(port)),
    ]


def results(folder: Path) -> list[Path]:
    return sorted((folder / "results").rglob("*.json"))


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a launcher and all that it started."""
    for group in {process.pid, *children(process.pid)}:
        try:
            os.kill(group, number)
        except ProcessLookupError:
            continue
    process.wait()


def children(process: int) -> list[int]:
    """All processes below one, from the system's own table."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(status.parent.name)] = int(fields[1])
    found: list[int] = []
    waiting = [process]
    while waiting:
        parent = waiting.pop()
        below = [child for child, above in parents.items() if above == parent]
        found, waiting = found + below, waiting + below
    return found


def wait_for_trainings(count: int, folder: Path, processes: Sequence[subprocess.Popen[bytes]]) -> list[Path]:
    """The results once so many are of trainings, while the processes run."""
    began = time.monotonic()
    while True:
        found = results(folder)
        if sum(path.relative_to(folder / "results").parts[0] in ARMS for path in found) >= count:
            return found
        if time.monotonic() - began > PATIENCE or all(process.poll() is not None for process in processes):
            raise SystemExit(f"only {len(found)} results, or too few of trainings; see the logs beside {folder}")
        time.sleep(0.05)


def whole(config: Path, folder: Path, log: str) -> float:
    """Run to the end as one process; returns the seconds."""
    began = time.monotonic()
    if code := launch(config, folder, log=log).wait(PATIENCE):
        raise SystemExit(f"one process ended with {code}: see {config.parent / log}.log")
    return time.monotonic() - began


def stamps(paths: Sequence[Path]) -> dict[Path, tuple[int, bytes]]:
    """When files were written, and what is in them."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where everything stays; default: a temporary one")
    given = parser.parse_args()
    place = given.keep or Path(tempfile.mkdtemp(prefix="ether-nodes-"))
    place.mkdir(parents=True, exist_ok=True)
    config = written_config(place)
    print(f"one process: {whole(config, place / 'one', 'one'):.0f} s, {len(results(place / 'one'))} jobs", flush=True)

    shared, port = place / "shared", free_port()
    nodes = [launch(config, shared, node(rank, port), f"node-{rank}") for rank in range(2)]
    done = wait_for_trainings(TRAINED_BEFORE_THE_KILL, shared, nodes)
    before = stamps(done)
    end(nodes[1], signal.SIGKILL)
    print(f"two nodes: {len(done)} jobs done, then the second node was killed", flush=True)
    seconds = whole(config, shared, "back")
    print(f"it came back as one process: {seconds:.0f} s, {len(results(shared))} jobs", flush=True)
    end(nodes[0], signal.SIGKILL)  # the launcher waits for its dead peer when its own processes are done

    after = stamps(list(before))
    problems = [f"done again: {path.relative_to(shared)}" for path in before if before[path] != after[path]]
    names = [{path.relative_to(folder) for path in results(folder)} for folder in (place / "one", shared)]
    problems += [f"not in both: {path}" for path in sorted(names[0] ^ names[1])]
    for name in ("summary.md", "summary.json"):
        if (place / "one" / name).read_bytes() != (shared / name).read_bytes():
            problems.append(f"{name} differs")
    for problem in problems:
        print(problem)
    print(f"{len(before)} finished jobs untouched, {len(names[1])} jobs in both, {len(problems)} wrong")
    if not given.keep and not problems:
        shutil.rmtree(place)
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
