"""The old path of :mod:`ether_diffusion.runs.scores`: ``python -m ether_diffusion.training.scores RUN``."""

from ether_diffusion.runs.scores import main, score_run

__all__ = ["main", "score_run"]

if __name__ == "__main__":
    main()
