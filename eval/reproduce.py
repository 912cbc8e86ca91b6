"""Run rows of a committed table again: python eval/reproduce.py TABLE --arms ARM --seeds 0 --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "reproduce")
