"""Hold pictures against their conditions: python -m eval.control_accuracy --data DIR --generated DIR --task TASK …"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.controls.accuracy import main

if __name__ == "__main__":
    main()
