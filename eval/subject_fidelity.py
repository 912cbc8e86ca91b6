"""Score images that exist: python -m eval.subject_fidelity --generated DIR --references DIR …"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "subject_fidelity")
