"""All scores and settings of a benchmark in one small file: python eval/table.py FOLDER FILE"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.subjects.compact import main

if __name__ == "__main__":
    main()
