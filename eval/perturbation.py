"""Random transforms of growing distance: python eval/perturbation.py --prompts … --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "perturbation")
