"""One picture of a benchmark to show around: python -m eval.sheet RUN PICTURE"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "sheet")
