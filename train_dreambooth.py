"""Teach Stable Diffusion a subject: accelerate launch train_dreambooth.py --config configs/dreambooth_sd15.yaml …"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.training.launch import dreambooth

if __name__ == "__main__":
    dreambooth()
