"""ETHER, ETHER+, Naive and two variants, with one interface: what a method does to the sides of a frozen projection.

arXiv 2405.20271, Sec. 3.2, 3.3 and 4; :class:`Anchored` and :class:`EtherPlusFree` are not the paper's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.functional import (
    ANCHORED,
    FREE_LENGTHS,
    REFLECTION,
    RELAXED,
    Formula,
    Rows,
    block_matmul_delta,
    block_rows,
    row_update,
)
from ether_diffusion.core.layout import Layout


class Method(nn.Module, ABC):
    """A transform of one frozen Linear with weight (out_features, in_features).

    The transformed projection is y = (I + E_out) weight ((I + E_in) x) + bias: the bias is never transformed.
    Parameters are fp32; a subclass says which sides it has. Of a fused Linear each part has parameters of its own, and
    E is block-diagonal over the parts; parts that the layout does not name have no E.

    Args:
        inputs: the layout of the input side, or the number of features of a whole one.
        outputs: likewise of the output side.
    """

    two_sided: bool = False
    """Whether there is an E_out."""

    def __init__(self, inputs: Layout | int, outputs: Layout | int) -> None:
        super().__init__()
        self.inputs, self.outputs = Layout.of(inputs), Layout.of(outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the vectors as ``fn`` says, but keep them in fp32 where it would make them half precision."""

        def kept(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            half = changed.is_floating_point() and changed.dtype.itemsize < torch.float32.itemsize
            return tensor.to(changed.device) if half else changed

        return super()._apply(kept, recurse)

    @abstractmethod
    def input_delta(self, x: Tensor) -> Tensor:
        """E_in x for x (..., in_features), in the dtype of x."""

    def output_delta(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """E_out (y - bias) for y (..., out_features), in the dtype of y."""
        raise TypeError(f"{type(self).__name__} does not transform the output side")

    @torch.no_grad()
    def delta_weight(self, weight: Tensor) -> Tensor:
        """W' - W = (I + E_out) W (I + E_in) - W, (out_features, in_features), of W in any dtype; in fp32 at least."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        delta = self._weight_times_input(weight)
        if self.two_sided:
            delta = delta + self.output_delta((weight + delta).mT, None).mT
        return delta

    @abstractmethod
    def _weight_times_input(self, weight: Tensor) -> Tensor:
        """Weight E_in, (out_features, in_features): the rows of the weight meet E_inᵀ."""


Sides = tuple[Rows, ...]
"""The rows of E_in and, for a two-sided method, of E_out."""
Pair = tuple[Tensor, Tensor | None]
"""u and v (None for ETHER, the frozen u₀ for its anchored variant) of one part."""
Vectors = tuple[tuple[Pair, ...], ...]
"""The pairs of every part of the input side and, if two-sided, of the output side; a whole side is one part."""


def rows_of_side(layout: Layout, parts: Sequence[Rows]) -> Rows:
    """The rows of one side from those of its parts."""
    analysis, synthesis = zip(*parts, strict=True)
    return Rows(layout.spread(analysis), layout.spread(synthesis))


class Reflection(Method):
    """A method whose E_in and E_out are made of unit vectors.

    Attributes:
        formula: how.
    """

    formula: Formula

    @abstractmethod
    def vectors(self) -> Vectors:
        """u and v of every part of every side."""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of the sides that are transformed."""
        return (self.inputs, self.outputs) if self.two_sided else (self.inputs,)

    @property
    def rank(self) -> int:
        """What the rank of W' - W is at most: n_blocks (ETHER) or 2 n_blocks for every part of every side."""
        return sum(u.shape[0] * (1 if v is None else 2) for pairs in self.vectors() for u, v in pairs)

    def sides(self) -> Sides:
        """Rows of all sides, made for this projection alone."""
        return tuple([self._rows(side) for side in range(len(self.layouts))])

    def _rows(self, side: int) -> Rows:
        return rows_of_side(self.layouts[side], [block_rows(self.formula, u, v) for u, v in self.vectors()[side]])

    def input_delta(self, x: Tensor) -> Tensor:
        """E_in x for x (..., in_features), in the dtype of x."""
        return row_update(x, self._rows(0), keep=False)

    def output_delta(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """E_out (y - bias) for y (..., out_features), in the dtype of y."""
        if not self.two_sided:
            return super().output_delta(y, bias)
        return row_update(y, self._rows(1), bias, keep=False)

    def _weight_times_input(self, weight: Tensor) -> Tensor:
        """Weight E_in."""
        return row_update(weight, self._rows(0).transposed, keep=False)


Trained = nn.Parameter | nn.ParameterDict
"""What is trained of one side: of a whole one a parameter, of a fused one a parameter for each part, by its name."""


def trained(layout: Layout, values: Sequence[Tensor]) -> Trained:
    """Parameters of a side from the values of its parts."""
    if not layout.parts[0].name:
        return nn.Parameter(values[0])
    pairs = zip(layout.parts, values, strict=True)
    return nn.ParameterDict([(part.name, nn.Parameter(v)) for part, v in pairs])  # of a dict it would sort the keys


def frozen(layout: Layout, values: Sequence[Tensor]) -> nn.Buffer | nn.Module:
    """Buffers of a side from the values of its parts, with the keys that :func:`trained` gives parameters."""
    if not layout.parts[0].name:
        return nn.Buffer(values[0])
    holder = nn.Module()
    for part, value in zip(layout.parts, values, strict=True):
        setattr(holder, part.name, nn.Buffer(value))
    return holder


def of_parts(layout: Layout, side: Tensor | nn.Module) -> list[Tensor]:
    """What :func:`trained` or :func:`frozen` has made for the parts of a side, in their order."""
    return [side] if isinstance(side, Tensor) else [getattr(side, part.name) for part in layout.parts]


def directions(n_blocks: int, layout: Layout, generator: torch.Generator) -> list[Tensor]:
    """Random unit vectors (n_blocks, width / n_blocks) in fp32 for every part of a side."""
    shapes = [(n_blocks, part.width // n_blocks) for part in layout.parts]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]
    return [torch.nn.functional.normalize(vectors, dim=-1) for vectors in drawn]


class Ether(Reflection):
    """y = weight (H x) + bias with H = I - 2 û ûᵀ per block; ``u``: (n_blocks, in_features / n_blocks).

    Not the identity at the start: the distance ‖H - I‖_F is 2 √n_blocks whatever u is.
    """

    formula = REFLECTION

    def __init__(self, inputs: Layout | int, outputs: Layout | int, n_blocks: int, generator: torch.Generator) -> None:
        super().__init__(inputs, outputs)
        self.u = trained(self.inputs, directions(n_blocks, self.inputs, generator))

    def vectors(self) -> Vectors:
        """u of the input side."""
        return (tuple([(u, None) for u in of_parts(self.inputs, self.u)]),)


class EtherPlus(Reflection):
    """y = H⁺_out (weight (H⁺ x)) + bias with H⁺ = I - û ûᵀ + v̂ v̂ᵀ per block.

    ``u``, ``v``: (n_blocks, in_features / n_blocks); two-sided also ``u_out``, ``v_out``: (n_blocks,
    out_features / n_blocks). Starts as the identity, since v = u; ‖H⁺ - I‖_F stays at most √2 per block.
    """

    formula = RELAXED

    def __init__(
        self,
        inputs: Layout | int,
        outputs: Layout | int,
        n_blocks: int,
        generator: torch.Generator,
        two_sided: bool = True,
    ) -> None:
        super().__init__(inputs, outputs)
        self.two_sided = two_sided
        self.u, self.v = self._pair(self.inputs, n_blocks, generator)
        if two_sided:
            self.u_out, self.v_out = self._pair(self.outputs, n_blocks, generator)

    def _pair(self, layout: Layout, n_blocks: int, generator: torch.Generator) -> tuple[Trained, Trained]:
        """Random u, and v = u."""
        drawn = directions(n_blocks, layout, generator)
        return trained(layout, drawn), trained(layout, [u.clone() for u in drawn])

    def vectors(self) -> Vectors:
        """(u, v) of the parts of the input side and, if two-sided, (u_out, v_out) of those of the output side."""
        own = [(self.inputs, self.u, self.v)] + ([(self.outputs, self.u_out, self.v_out)] if self.two_sided else [])
        return tuple([tuple(zip(of_parts(side, u), of_parts(side, v), strict=True)) for side, u, v in own])


class EtherPlusFree(EtherPlus):
    """ETHER+ with u and v themselves in place of û and v̂: I - u uᵀ + v vᵀ per block, at any distance from I.

    A variant that is not the paper's, to see what the unit length does. It starts as the identity, too.
    """

    formula = FREE_LENGTHS


class Anchored(Reflection):
    """y = weight (H₀ H x) + bias with ETHER's H of u and H₀ of a frozen u₀: a variant that is not the paper's.

    ``u``: (n_blocks, in_features / n_blocks), trained; ``anchor``: u₀, likewise, a buffer. Starts as the identity,
    since u = u₀, with ETHER's number of parameters. H₀ H turns the plane of û₀ and û by twice their angle θ, so that
    ‖H₀ H - I‖_F = 2 √2 |sin θ| per block.
    """

    formula = ANCHORED

    def __init__(self, inputs: Layout | int, outputs: Layout | int, n_blocks: int, generator: torch.Generator) -> None:
        super().__init__(inputs, outputs)
        drawn = directions(n_blocks, self.inputs, generator)
        self.u = trained(self.inputs, drawn)
        self.anchor = frozen(self.inputs, [u.clone() for u in drawn])

    def vectors(self) -> Vectors:
        """(u, u₀) of the parts of the input side."""
        return (tuple(zip(of_parts(self.inputs, self.u), of_parts(self.inputs, self.anchor), strict=True)),)


class Naive(Method):
    """y = weight (N x) + bias, N = I at the start; ``blocks``: (n, d / n, d / n) with n blocks of d in_features."""

    def __init__(self, inputs: Layout | int, outputs: Layout | int, n_blocks: int, generator: torch.Generator) -> None:
        super().__init__(inputs, outputs)
        widths = [part.width // n_blocks for part in self.inputs.parts]
        eyes = [torch.eye(width, dtype=torch.float32).repeat(n_blocks, 1, 1) for width in widths]
        self.blocks = trained(self.inputs, eyes)

    def input_delta(self, x: Tensor) -> Tensor:
        """(N - I) x."""
        return self._times(x, of_parts(self.inputs, self.blocks))

    def _weight_times_input(self, weight: Tensor) -> Tensor:
        """Weight (N - I): rows of the weight meet Nᵀ."""
        return self._times(weight, [blocks.mT for blocks in of_parts(self.inputs, self.blocks)])

    def _times(self, x: Tensor, of_part: Sequence[Tensor]) -> Tensor:
        """x with the blocks of each part multiplied into the features of that part, less x."""
        placed = zip(self.inputs.parts, of_part, strict=True)
        deltas = [block_matmul_delta(x.narrow(-1, part.start, part.width), blocks) for part, blocks in placed]
        first, *rest = self.inputs.place(deltas)
        return sum(rest, first)


def build_method(
    config: EtherConfig, inputs: Layout | int, outputs: Layout | int, generator: torch.Generator
) -> Method:
    """The transform that ``config`` asks for, for one Linear with these sides: layouts, or features of whole ones."""
    if config.method == "ether":
        return Ether(inputs, outputs, config.n_blocks, generator)
    if config.method == "anchored":
        return Anchored(inputs, outputs, config.n_blocks, generator)
    if config.method == "naive":
        return Naive(inputs, outputs, config.n_blocks, generator)
    kind = EtherPlusFree if config.method == "ether_plus_free" else EtherPlus
    two_sided = config.two_sided and bool(Layout.of(outputs).parts)
    return kind(inputs, outputs, config.n_blocks, generator, two_sided)
