"""Finetune diffusion models with hyperplane reflections: ETHER and ETHER+ (arXiv 2405.20271)."""
