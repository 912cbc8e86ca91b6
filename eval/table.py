"""All scores and settings of a benchmark in one small file: python eval/table.py FOLDER FILE"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("study", "table")
