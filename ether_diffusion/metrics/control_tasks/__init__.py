"""The kinds of control, each with its measures: semantic maps, canny, soft edges, depth, landmarks."""

from ether_diffusion.metrics.control_tasks.base import ControlTask, MeanTask, Measure, Pair, Row, read_grey
from ether_diffusion.metrics.control_tasks.depth import Depth
from ether_diffusion.metrics.control_tasks.edges import Canny, SoftEdges
from ether_diffusion.metrics.control_tasks.landmarks import Landmarks
from ether_diffusion.metrics.control_tasks.segmentation import Segmentation

__all__ = [
    "Canny",
    "ControlTask",
    "Depth",
    "Landmarks",
    "MeanTask",
    "Measure",
    "Pair",
    "Row",
    "Segmentation",
    "SoftEdges",
    "read_grey",
]
