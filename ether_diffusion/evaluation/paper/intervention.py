"""Hyperspherical energy as an intervention: what a trained Naive adapter draws once it is made to keep the energy.

Naive learns any blocks N, so W N has another energy than W. Two changes are made after the training, and nothing else:
"orthogonal" takes the nearest orthogonal blocks, which keep the energy and the norms of all neurons; "row norms" keeps
the directions, and with them the energy of W N, and gives each neuron the norm that it had in W.
docs/studies/energy.md has the plan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ether_diffusion import pipelines
from ether_diffusion.core.host import host_of
from ether_diffusion.core.methods import Method, Naive, of_parts
from ether_diffusion.core.targets import root_of
from ether_diffusion.evaluation.paper.settings import ORTHOGONAL, ROW_NORMS
from ether_diffusion.evaluation.runner import Job
from ether_diffusion.evaluation.subjects.arms import method_of
from ether_diffusion.evaluation.subjects.derived import DerivedBench
from ether_diffusion.evaluation.subjects.protocols import Subject
from ether_diffusion.families.registry import family_of
from ether_diffusion.runs.drawing import load_run


def orthogonal(weight: Tensor, method: Naive) -> Tensor:
    """W Q, (f, d) fp64, with the orthogonal block-diagonal Q that is nearest to N in Frobenius' norm.

    Of N = A S Bᵀ (singular values) that is Q = A Bᵀ.

    Args:
        weight: W, (f, d).
        method: with N; its blocks (n, d / n, d / n) are on the input side of a whole Linear.
    """
    (blocks,) = of_parts(method.inputs, method.blocks)
    left, _, right = torch.linalg.svd(blocks.detach().double())
    parts = weight.double().unflatten(1, (len(blocks), -1))
    return torch.einsum("fni,nij->fnj", parts, left @ right).flatten(1)


def with_row_norms(weight: Tensor, method: Method) -> Tensor:
    """W N with its rows, the neurons, scaled to the norms of those of W; (f, d) fp64."""
    changed = weight.double() + method.delta_weight(weight.double())
    return changed * (weight.double().norm(dim=1) / changed.norm(dim=1)).unsqueeze(1)


Change = Callable[[Tensor, Naive], Tensor]
"""From W and what was learnt to the weight that takes its place."""
CHANGES: dict[str, Change] = {ORTHOGONAL: orthogonal, ROW_NORMS: with_row_norms}


@torch.no_grad()
def change_weights(pipe: DiffusionPipeline, change: Change) -> None:
    """Take the pipeline's only adapter, a Naive one, off, and write what ``change`` makes of it into the denoiser."""
    model = family_of(pipe).denoiser
    host = host_of(model)
    assert host is not None, "a run of method=naive has one"
    (adapter,) = host.adapters.values()
    layers = {path: root_of(model).get_submodule(path) for path in adapter.methods()}
    changed = {path: change(layers[path].weight, method) for path, method in adapter.methods().items()}  # type: ignore[arg-type]
    pipelines.unload(pipe)
    for path, weight in changed.items():
        layers[path].weight.copy_(weight)  # type: ignore[operator]


class EnergyBench(DerivedBench):
    """The arms are drawn changed as well: ``naive, orthogonal`` and ``naive, row norms``."""

    def check_arm(self, job: Job[Subject]) -> None:
        """Raise ValueError unless it is Naive's."""
        if method_of(job).name != "naive":
            raise ValueError(f"arm {job.arm}: what is changed is Naive's, not {method_of(job).title}'s")

    def derived(self, origin: Job[Subject], way: str) -> DiffusionPipeline:
        """With changed weights."""
        pipe = load_run(self._path("runs", origin), self.device)
        change_weights(pipe, CHANGES[way])
        return pipe
