"""Learn, draw and score many subjects with many methods: accelerate launch eval/dreambench.py --config FILE …"""

from ether_diffusion.cli import run_script

if __name__ == "__main__":
    run_script("bench")
