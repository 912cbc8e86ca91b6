"""Devices, their memory, and the precisions that training takes on them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup/memory.max")
"""Where Linux says how much memory a container may use; it is less than the machine has."""


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as torch names it, such as cuda:0.
        title: of the product.
        memory: bytes in all.
        free: bytes that are not in use.
        precisions: values of ``mixed_precision`` that it takes.
    """

    name: str
    title: str
    memory: int
    free: int
    precisions: tuple[str, ...]

    @property
    def is_cpu(self) -> bool:
        """Whether it is the machine's own processor."""
        return self.name == "cpu"


def devices() -> list[Device]:
    """The devices that torch sees, accelerators first, the CPU last."""
    found = [_cuda(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        free = memory - torch.mps.driver_allocated_memory()
        found.append(Device("mps", platform.processor() or platform.machine(), memory, free, ("no", "fp16", "bf16")))
    if torch.xpu.is_available():
        found += [_xpu(number) for number in range(torch.xpu.device_count())]
    return [*found, _cpu()]


def _cuda(number: int) -> Device:
    free, memory = torch.cuda.mem_get_info(number)
    with torch.cuda.device(number):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precisions = ("no", "fp16", "bf16") if bf16 else ("no", "fp16")
    return Device(f"cuda:{number}", torch.cuda.get_device_name(number), memory, free, precisions)


def _xpu(number: int) -> Device:
    properties = torch.xpu.get_device_properties(number)
    memory = properties.total_memory
    free = memory - torch.xpu.memory_reserved(number)
    return Device(f"xpu:{number}", properties.name, memory, free, ("no", "fp16", "bf16"))


def _cpu() -> Device:
    """The processor; Accelerate has no fp16 for it."""
    machine = psutil.virtual_memory()
    limit = CGROUP.read_text().strip() if CGROUP.is_file() else "max"
    memory = min(machine.total, int(limit)) if limit.isdigit() else machine.total
    title = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return Device("cpu", title, memory, min(machine.available, memory), ("no", "bf16"))
