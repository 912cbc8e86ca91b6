"""The names of judges and of kinds of control: what flags and settings offer, and what they are by default."""

from __future__ import annotations

DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-large-patch14"
"""The models of the papers that print these scores."""
LPIPS_SIZE = 512
"""Pixels of the squares that LPIPS compares."""
TASKS = ("segmentation", "canny", "edges", "depth", "landmarks")
"""The kinds of control."""
SEGMENTER = "nvidia/segformer-b4-finetuned-ade-512-512"
"""Of maps: ADE20K, as in OFT's table."""
IGNORE_INDEX = 255
"""The id of maps that is left out."""
DETECTORS = {"hed": "HEDdetector", "lineart": "LineartDetector", "lineart_anime": "LineartAnimeDetector"}
"""The detectors of soft edges: those of controlnet_aux that can be asked for."""
SCALES = 5
"""Of MS-SSIM."""
DEPTH = "Intel/dpt-large"
"""Of depth."""
INCEPTION = "inception"
"""The features of published FIDs; ``inception:FILE`` takes its weights from a file."""
