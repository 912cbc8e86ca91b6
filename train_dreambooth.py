"""Teach Stable Diffusion a subject: accelerate launch train_dreambooth.py --config configs/dreambooth_sd15.yaml …"""

from ether_diffusion.training.launch import dreambooth

if __name__ == "__main__":
    dreambooth()
