"""One page of many runs: python -m eval.report RUN [RUN …]"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of a missing torchvision, which nothing here needs

from ether_diffusion.evaluation.overview import main

if __name__ == "__main__":
    main()
