"""Teach Stable Diffusion a control: accelerate launch train_controlnet.py --config configs/controlnet_sd15.yaml …"""

from ether_diffusion.training.launch import control

if __name__ == "__main__":
    control()
