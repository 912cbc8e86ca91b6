"""Teach Stable Diffusion a control: accelerate launch train_controlnet.py --config configs/controlnet_sd15.yaml …"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.training.launch import control

if __name__ == "__main__":
    control()
