"""Random transforms of growing distance: python eval/perturbation.py --prompts … --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.paper.perturbation import main

if __name__ == "__main__":
    main()
