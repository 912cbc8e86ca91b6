"""Change of the hyperspherical energy: python eval/hyperspherical_energy.py RUN … --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.paper.energy import main

if __name__ == "__main__":
    main()
