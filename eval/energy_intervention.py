"""Naive made to keep the energy: accelerate launch eval/energy_intervention.py --config FILE --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "energy_intervention")
