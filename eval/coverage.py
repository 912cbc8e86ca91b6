"""How often intervals over few subjects hold the truth: python eval/coverage.py --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "coverage")
