"""The chosen step and the last one: accelerate launch eval/chosen_step.py --config FILE --output_dir DIR"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.subjects.choosing import main

if __name__ == "__main__":
    main()
