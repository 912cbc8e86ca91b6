"""Learn, draw and score many subjects with many methods: accelerate launch eval/dreambench.py --config FILE …"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.subjects.benchmark import main

if __name__ == "__main__":
    main()
