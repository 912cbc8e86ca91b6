"""ETHER and ETHER+ as a tuner of PEFT: importing this registers the type ``ETHER`` with PEFT.

The layer holds the methods, plans and projection of :func:`ether_diffusion.attach`; this room is what PEFT asks for
around them.
"""

from ether_diffusion.peft_tuner.config import EtherPeftConfig
from ether_diffusion.peft_tuner.files import from_peft, load, save, to_peft
from ether_diffusion.peft_tuner.layer import EtherLinear
from ether_diffusion.peft_tuner.model import EtherModel
from ether_diffusion.peft_tuner.registration import register

__all__ = ["EtherLinear", "EtherModel", "EtherPeftConfig", "from_peft", "load", "save", "to_peft"]

register(EtherPeftConfig, EtherModel)
