"""Change of the hyperspherical energy: python eval/hyperspherical_energy.py RUN … --output_dir DIR"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "hyperspherical_energy")
