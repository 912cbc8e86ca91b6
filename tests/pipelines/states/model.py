"""What a pipeline with adapters and LoRAs should compute, kept as plain data and computed by dense fp64 matrices.

The state machine in ``test_state_machine.py`` holds every verb against this model. It knows the documented semantics
and nothing of the package but :class:`~ether_diffusion.EtherConfig`:

- an adapter that acts unfused transforms the projection's own weight W, whatever that holds now: W + Σ s (T(W) - W);
- a LoRA that is not merged adds weight · B A beside it, untransformed; merged, it is a part of W;
- ``fuse`` writes W + Σ s (T(W) - W) into W, and ``unfuse`` puts the W of before back, bit for bit;
- each component of the pipeline has its own strengths, its own samples and its own switch.

Weights that were computed in floating point (fused, merged, unmerged) are compared with the model once, when they are
written, and then taken over: from there on they are bits, which must not change unless a verb changes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from helpers import dense_weight
from torch import Tensor, nn
from torch.func import functional_call

from ether_diffusion import EtherConfig

BATCH = 4
COPIES = 3
"""A batch may be one, two or three times as large as ``per_sample``."""
PROJECTIONS = re.compile(r"(attn[12]\.(to_q|to_k|to_v|to_out\.0)|self_attn\.(q|k|v|out)_proj)$")
BYPASSED = re.compile(r"(attn1\.to_[qkv]|attn2\.to_[kv])$")
"""Projections that ``fuse_qkv_projections`` puts aside."""

Weights = dict[str, Tensor]
Vectors = dict[str, dict[str, Tensor]]
"""By path of the projection and name of the vector."""


class Refusal(NamedTuple):
    """An error that is documented for a state."""

    kind: type[Exception]
    pattern: str

    def fits(self, error: Exception) -> bool:
        return isinstance(error, self.kind) and re.search(self.pattern, str(error)) is not None


MERGED_BENEATH = Refusal(RuntimeError, r"PEFT has merged .* call pipe\.unfuse_lora\(\), or ether\.fuse\(pipe\) before")
QKV_FUSED = Refusal(RuntimeError, r"call unfuse_qkv_projections\(\), or ether\.fuse\(pipe\) before")
WRONG_BATCH = Refusal(ValueError, r"per_sample names \d+ adapters, but .* got a batch of")


@dataclass
class Attached:
    """One adapter in one component: settings and fp32 vectors."""

    config: EtherConfig
    vectors: Vectors = field(repr=False)


@dataclass
class Lora:
    """One LoRA in one component: A (r, in) and B (out, r) by path."""

    factors: dict[str, tuple[Tensor, Tensor]]

    def delta(self, path: str) -> Tensor | float:
        if path not in self.factors:
            return 0.0
        down, up = self.factors[path]
        return up.double() @ down.double()


def targeted(component: str, paths: Iterable[str], targets: str | tuple[str, ...]) -> list[str]:
    """The Linears that ``targets`` names, told apart by their names alone."""
    if not isinstance(targets, str):
        return [p for p in paths if any(fnmatchcase(p, t) or fnmatchcase(p, f"*.{t}") for t in targets)]
    found = [path for path in paths if PROJECTIONS.search(path)]
    if targets in ("self_attention", "cross_attention"):
        found = [path for path in found if ("attn2" in path) == (targets == "cross_attention")]
    if targets.startswith("attention+geglu") and component == "unet":
        found += [path for path in paths if path.endswith("ff.net.0.proj")]
    return found


@dataclass
class Component:
    """The state of one component of the pipeline.

    Attributes:
        name: the pipeline's name of it.
        twin: a plain fp64 model of the same class; its own weights are the base's of the beginning.
        base: what the weights are without a fused adapter, exactly.
        stored: what the weights are, exactly.
        dtype: of the component.
        left: projections whose last adapter was taken off while others were there.
        rounded: projections whose base weight PEFT has written to; all others' must be the beginning's in the end.
    """

    name: str
    twin: nn.Module
    dtype: torch.dtype = torch.float32
    base: Weights = field(init=False)
    stored: Weights = field(init=False)
    adapters: dict[str, Attached] = field(default_factory=dict)
    strengths: dict[str, float] = field(default_factory=dict)
    per_sample: tuple[str | None, ...] | None = None
    enabled: bool = True
    fused: bool = False
    fused_paths: frozenset[str] = frozenset()
    written: Weights = field(default_factory=dict)
    rounded_since_fuse: frozenset[str] = frozenset()
    recast_since_fuse: bool = False
    loras: dict[str, Lora] = field(default_factory=dict)
    lora_weights: dict[str, float] = field(default_factory=dict)
    merged: frozenset[str] = frozenset()
    rounded: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    qkv_fused: bool = False
    offload: str = ""

    def __post_init__(self) -> None:
        linears = {path: m for path, m in self.twin.named_modules() if isinstance(m, nn.Linear)}
        self.base = {path: module.weight.detach().clone() for path, module in linears.items()}
        self.stored = dict(self.base)

    # what acts

    def acting(self, sample: int = 0) -> dict[str, float]:
        """The adapters that act on one sample, unfused, with their strengths."""
        if not self.enabled or self.fused:
            return {}
        if self.per_sample is None:
            return {name: strength for name, strength in self.strengths.items() if strength != 0.0}
        entry = self.per_sample[sample % len(self.per_sample)]
        return {} if entry is None else {entry: 1.0}

    def all_acting(self) -> dict[str, float]:
        """The adapters that act on any sample."""
        return {n: s for sample in range(len(self.per_sample or "x")) for n, s in self.acting(sample).items()}

    def acting_paths(self) -> set[str]:
        """The projections that an adapter acts on, unfused."""
        return {path for name in self.all_acting() for path in self.adapters[name].vectors}

    def refusals(self, batch: int = BATCH, part: str = "") -> tuple[list[Refusal], list[Refusal]]:
        """The errors of which a forward, or one of the part at a path, must, and those of which it may raise one."""
        acting = {path for path in self.acting_paths() if path.startswith(part)}
        must: list[Refusal] = []
        may: list[Refusal] = []
        if acting & self.merged:
            must.append(MERGED_BENEATH)
        elif self.left & self.merged:
            may.append(MERGED_BENEATH)  # known defect: an adapter that was taken off still counts
        if self.qkv_fused and self.acting_paths():  # refusing all of them is allowed, computing wrongly is not
            (must if any(BYPASSED.search(path) for path in acting) else may).append(QKV_FUSED)
        if self.per_sample is not None and acting:
            copies, rest = divmod(batch, len(self.per_sample))
            if rest or copies > COPIES:
                must.append(WRONG_BATCH)
        return must, may

    # what it computes

    def weights(self, acting: Mapping[str, float], vectors: Mapping[str, Vectors] | None = None) -> Weights:
        """The weights that amount to the state, by path; differentiable in ``vectors``, if they are given."""
        of = vectors or {name: self.adapters[name].vectors for name in acting}
        found = {}
        for path, stored in self.stored.items():
            total = stored
            for name, strength in acting.items():
                if path in of[name]:
                    total = total + strength * (dense_weight(stored, of[name][path]) - stored)
            if path not in self.merged:
                for name, lora in self.loras.items():
                    total = total + self.lora_weights[name] * lora.delta(path)
            found[path] = total
        return found

    def output(
        self, given: Mapping[str, Tensor], part: str = "", vectors: Mapping[str, Vectors] | None = None
    ) -> Tensor:
        """What the component, or the part of it at a path, gives for a batch."""
        given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
        samples = len(next(iter(given.values())))
        if self.per_sample is None or not self.acting_paths():
            return self._run(given, part, self.weights(self.acting(), vectors))
        outputs = []
        for sample in range(samples):
            one = {key: value[sample : sample + 1] for key, value in given.items()}
            outputs.append(self._run(one, part, self.weights(self.acting(sample), vectors)))
        return torch.cat(outputs)

    def _run(self, given: Mapping[str, Tensor], part: str, weights: Weights) -> Tensor:
        prefix = f"{part}." if part else ""
        inside = {f"{path.removeprefix(prefix)}.weight": w for path, w in weights.items() if path.startswith(prefix)}
        return first_tensor(functional_call(self.twin.get_submodule(part), inside, (), dict(given)))

    # what is written into weights

    def take_over(self, present: Mapping[str, Tensor], expected: Weights) -> None:
        """Compare weights that were just computed with the model's, to rounding, and go on with their bits."""
        epsilon = torch.finfo(self.dtype if self.dtype != torch.float64 else torch.float32).eps
        for path, want in expected.items():
            got = present[path].detach().double()
            scale = want.abs() + want.square().mean().sqrt()
            worst = ((got - want).abs() / scale).max().item()
            # a row of W times a direction is a sum of up to 64 products; 9.4 was the worst of 3,000 sequences
            assert worst <= 16 * epsilon, f"{self.name}: the weight of {path} is off by {worst / epsilon:.1f} roundings"
            self.stored[path] = got.clone()

    def cast(self, dtype: torch.dtype) -> None:
        self.recast_since_fuse = self.fused and (self.recast_since_fuse or dtype != self.dtype)
        self.stored = {path: weight.to(dtype).double() for path, weight in self.stored.items()}
        self.written = {path: weight.to(dtype).double() for path, weight in self.written.items()}
        if not self.fused:
            self.base = dict(self.stored)
        self.dtype = dtype

    # adapters

    def add(self, name: str, attached: Attached, acts: bool = True) -> None:
        if not self.adapters:
            self.strengths, self.per_sample, self.enabled = {}, None, True
        self.adapters[name] = attached
        self.left -= attached.vectors.keys()
        if acts and self.per_sample is None:
            self.strengths[name] = 1.0

    def remove(self, name: str) -> None:
        gone = self.adapters.pop(name)
        kept = {path for attached in self.adapters.values() for path in attached.vectors}
        self.left = (self.left | gone.vectors.keys()) - kept if self.adapters else frozenset()
        if self.per_sample is not None and name in self.per_sample:
            self.strengths, self.per_sample = {}, None
        self.strengths.pop(name, None)
        if not self.adapters:
            self.strengths, self.per_sample, self.enabled = {}, None, True

    def lora_paths(self) -> frozenset[str]:
        """The projections that PEFT has a layer around."""
        return frozenset(path for lora in self.loras.values() for path in lora.factors)

    def tampered(self) -> bool:
        """Whether fused weights hold something else's update, which is no rounding."""
        rounding = 2**-6 if self.recast_since_fuse or self.dtype == torch.bfloat16 else 1e-4
        return any(
            (self.stored[path] - self.written[path]).abs().max() > rounding * self.written[path].abs().max()
            for path in self.fused_paths
        )


def first_tensor(output: object) -> Tensor:
    """The main tensor of what a model returns."""
    found = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found
