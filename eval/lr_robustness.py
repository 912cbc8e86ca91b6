"""Quality against the learning rate: accelerate launch eval/lr_robustness.py --config FILE --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.paper.learning_rates import main

if __name__ == "__main__":
    main()
