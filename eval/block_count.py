"""Quality, time and memory against the number of blocks: python eval/block_count.py --config FILE --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "block_count")
