"""The studies of the paper (arXiv 2405.20271)."""
