"""One page of many runs: python -m eval.report RUN [RUN …]"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("report")
