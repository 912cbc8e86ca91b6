"""The chosen step and the last one: accelerate launch eval/chosen_step.py --config FILE --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "chosen_step")
