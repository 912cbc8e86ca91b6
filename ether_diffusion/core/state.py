"""What keeps a state from being loaded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ether_diffusion.core.functional import EPSILON


class StateMismatchError(ValueError):
    """A state is not that of the adapter; ``problems`` has one line for each reason."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__(f"the state does not fit adapter {name!r}:\n" + "\n".join(problems))
        self.problems = problems


def state_problems(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], unit_vectors: bool = True) -> list[str]:
    """What keeps ``state`` from being loaded where ``expected`` is, one line per problem; empty if it fits.

    ``unit_vectors``: the rows of matrices are to be normalised, so none may be zero.
    """
    problems = [f"  unknown key: {key}" for key in sorted(set(state) - set(expected))]
    problems += [f"  missing key: {key}" for key in sorted(set(expected) - set(state))]
    for key in sorted(set(state) & set(expected)):
        value = state[key]
        if value.shape != expected[key].shape:
            problems.append(
                f"  wrong shape: {key} is {tuple(value.shape)}, the model needs {tuple(expected[key].shape)}"
            )
        elif not value.is_floating_point():
            problems.append(f"  wrong dtype: {key} is {value.dtype}, no floating dtype")
        elif not value.isfinite().all():
            problems.append(f"  not finite: {key} holds NaN or infinity")
        elif unit_vectors and value.ndim == 2 and (value.float().norm(dim=-1) < EPSILON).any():
            problems.append(f"  zero vector: {key} has a row of length zero, which no reflection can have")
    return problems
