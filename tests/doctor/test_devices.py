"""The devices that are told, with their memory and precisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ether_diffusion.doctor import devices as module
from ether_diffusion.doctor.devices import Device, devices

MEMINFO = Path("/proc/meminfo")


@pytest.mark.skipif(not MEMINFO.is_file(), reason="needs Linux")
def test_the_memory_of_the_machine_is_what_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path / "none")
    total = int(re.findall(r"MemTotal:\s+(\d+) kB", MEMINFO.read_text())[0]) * 1024
    cpu = devices()[-1]
    assert (cpu.name, cpu.memory, cpu.precisions) == ("cpu", total, ("no", "bf16"))
    assert 0 < cpu.free < total


@pytest.mark.parametrize(("limit", "memory"), [("1048576\n", 1048576), ("max\n", None)])
def test_a_container_has_no_more_than_its_limit(
    limit: str, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path / "none")
    whole = devices()[-1].memory
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(module, "CGROUP", tmp_path / "memory.max")
    found = devices()[-1]
    assert found.memory == (memory or whole)
    assert found.free <= found.memory


def test_accelerators_come_first_each_with_the_precisions_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards, of which the second computes bf16 by emulation only."""
    current = [0]

    class On:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            current[0] = self.number

        def __exit__(self, *error: object) -> None:
            current[0] = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (10 + number, 20 + number))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or current[0] == 0
    )
    assert devices()[:2] == [
        Device("cuda:0", "card 0", 20, 10, ("no", "fp16", "bf16")),
        Device("cuda:1", "card 1", 21, 11, ("no", "fp16")),
    ]
    assert devices()[2].is_cpu
