"""Score images that exist: python -m eval.subject_fidelity --generated DIR --references DIR …"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.subjects.folders import main

if __name__ == "__main__":
    main()
