"""Hold pictures against their conditions: python -m eval.control_accuracy --data DIR --generated DIR --task TASK …"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "control_accuracy")
