"""Quality, time and memory against the number of blocks: python eval/block_count.py --config FILE --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.paper.blocks import main

if __name__ == "__main__":
    main()
