"""Control accuracy of several methods: python -m eval.control_study --config configs/eval_control.yaml …"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.controls.study import main

if __name__ == "__main__":
    main()
