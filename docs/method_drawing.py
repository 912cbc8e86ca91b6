"""The drawing of ``docs/how.md``: both transforms in the plane, and how far they are from the identity.

``python docs/method_drawing.py`` writes ``docs/pictures/reflections.svg``. Every point is computed by
``ether_diffusion.core.functional``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ether_diffusion.core.functional import dense_reflection, dense_relaxed_reflection
from ether_diffusion.files import atomic_path
from ether_diffusion.page.palette import LIGHT, styles

PICTURE = Path(__file__).parent / "pictures" / "reflections.svg"
ETHER, PLUS = (LIGHT[style.number] for style in styles(["ETHER", "ETHER+"]).values())
GREY, NORMALS = LIGHT[-1], LIGHT[4]
X = (1.25, 0.35)
"""The input that both panels transform."""


def direction(degrees: float) -> torch.Tensor:
    """A unit vector of the plane as one block of width 2, shape (1, 2)."""
    angle = np.deg2rad(degrees)
    return torch.tensor([[np.cos(angle), np.sin(angle)]])


def distances(angles: np.ndarray) -> dict[str, list[float]]:
    """‖T − I‖ (Frobenius) of ETHER, and of ETHER+ by the angle between û and v̂ in degrees."""
    eye, u = torch.eye(2, dtype=torch.float64), direction(0)
    ether = torch.linalg.norm(dense_reflection(u) - eye).item()
    plus = [torch.linalg.norm(dense_relaxed_reflection(u, direction(each)) - eye).item() for each in angles]
    return {"ETHER": [ether] * len(angles), "ETHER+": plus}


def arrow(axes: Axes, end: torch.Tensor | tuple[float, float], colour: str, label: str) -> None:
    """An arrow from the origin, with its name beyond its head."""
    x, y = (float(each) for each in end)
    axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8})
    length = float(np.hypot(x, y))
    axes.text(x * (1 + 0.17 / length), y * (1 + 0.17 / length), label, color=colour, ha="center", va="center")


def mirror(axes: Axes, normal: torch.Tensor, colour: str) -> None:
    """The line whose normal is given."""
    a, b = (float(each) for each in normal[0])
    axes.plot([-1.6 * -b, 1.6 * -b], [-1.6 * a, 1.6 * a], linestyle="--", linewidth=1, color=colour)


def plane(axes: Axes, title: str) -> None:
    """An empty plane around the origin."""
    axes.set(xlim=(-1.5, 1.6), ylim=(-1.3, 1.55), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11)


def main() -> None:
    """Draw."""
    matplotlib.rcParams |= {"svg.hashsalt": "ether", "font.size": 10}
    figure = Figure(figsize=(11.4, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x, u, v = torch.tensor(X, dtype=torch.float64), direction(65), direction(100)
    plane(left, "ETHER: H = I − 2ûûᵀ, a reflection")
    mirror(left, u, GREY)
    arrow(left, x, "black", "x")
    arrow(left, u[0], NORMALS, "û")
    arrow(left, dense_reflection(u) @ x, ETHER, "H x")
    plane(middle, "ETHER+: H⁺ = I − ûûᵀ + v̂v̂ᵀ")
    arrow(middle, x, "black", "x")
    arrow(middle, u[0], NORMALS, "û")
    arrow(middle, v[0], NORMALS, "v̂")
    arrow(middle, dense_relaxed_reflection(u, v) @ x, PLUS, "H⁺ x")
    angles = np.linspace(0, 180, 91)
    for (name, values), colour in zip(distances(angles).items(), (ETHER, PLUS), strict=True):
        right.plot(angles, values, color=colour, label=name, linewidth=1.8)
    right.set(xlabel="angle between û and v̂, degrees", ylim=(0, 2.2), xticks=range(0, 181, 45))
    right.set_title("distance from the identity, ‖T − I‖", fontsize=11)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.05))
    with atomic_path(PICTURE) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
