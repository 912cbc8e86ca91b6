"""Run rows of a committed table again: python eval/reproduce.py TABLE --arms ARM --seeds 0 --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.subjects.reproduce import main

if __name__ == "__main__":
    main()
