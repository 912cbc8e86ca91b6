"""One picture of a benchmark to show around: python -m eval.sheet RUN PICTURE"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.overview import sheet_main

if __name__ == "__main__":
    sheet_main()
