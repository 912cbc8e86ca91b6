"""The adapter as an exact LoRA file.

Each side of a transform is I + E with E of low rank, so W' - W is a product of thin factors.
"""

from ether_diffusion.export import lora

__all__ = ["lora"]
