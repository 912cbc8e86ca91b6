"""Naive made to keep the energy: accelerate launch eval/energy_intervention.py --config FILE --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.paper.intervention import main

if __name__ == "__main__":
    main()
