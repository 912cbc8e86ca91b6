"""Two adapters in one picture: accelerate launch eval/two_adapters.py --config FILE --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "two_adapters")
