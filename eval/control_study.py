"""Control accuracy of several methods: python -m eval.control_study --config configs/eval_control.yaml …"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "control_study")
