"""Quality against the learning rate: accelerate launch eval/lr_robustness.py --config FILE --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "lr_robustness")
