"""Two adapters in one picture: accelerate launch eval/two_adapters.py --config FILE --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.mixing.study import main

if __name__ == "__main__":
    main()
