"""What differs between families of base models: one file for each, one protocol for all.

:mod:`~ether_diffusion.families.protocol` says what a family answers, :mod:`~ether_diffusion.families.registry` which
family a pipeline is of. No other room knows which family it serves.
"""
