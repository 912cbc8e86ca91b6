"""The programs of the verbs: the words of a command line, then the imports that take seconds, then the work.

``--help`` and a mistake in the settings are answered before torch and diffusers are imported. The work is done by rooms
below. The programs of ``train`` and ``control``, which ``accelerate launch`` runs too, are in
:mod:`ether_diffusion.training.launch`.
"""
