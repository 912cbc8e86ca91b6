"""How often intervals over few subjects hold the truth: python eval/coverage.py --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.statistics import main

if __name__ == "__main__":
    main()
