"""Teach Stable Diffusion a subject: accelerate launch train_dreambooth.py --config configs/dreambooth_sd15.yaml …"""

from ether_diffusion.training.dreambooth import main

if __name__ == "__main__":
    main()
