"""How PEFT learns of a tuner that is not its own: the only place that touches its enum of types.

PEFT has no official way in. Its registration, ``register_peft_method``, is public, but takes only members of the enum
``PeftType``; so a real member is added first. Tests fail when either moves.
"""

from __future__ import annotations

from peft import PeftConfig, PeftType, __version__
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

NAME = "ETHER"
PREFIX = "ether_"
"""Of the parameters' names; transformers derives it from the type's name."""
TRIED_WITH = "0.21.2"
OVERRIDDEN = (
    "_prepare_model",
    "_create_and_replace",
    "_cast_adapter_dtype",
    "_check_merge_allowed",
    "_unload_and_optionally_merge",
    "_remove_adapter_name_from_key",
    "_remap_adapter_state_dict_for_load",
)
"""Methods of ``BaseTuner`` that PEFT calls and the tuner has its own of; without a public name."""

LISTS_LINEARS = "_maybe_include_all_linear_layers"
"""Of PEFT: what "all-linear" names in a model."""


def peft_type() -> PeftType:
    """The member ``PeftType.ETHER``, added if it is not there.

    Raises:
        RuntimeError: the enum of the installed PEFT is built in another way.
    """
    if NAME not in PeftType.__members__:
        _add_member()
    return PeftType[NAME]


def _add_member() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    found = [PeftType(NAME), PeftType[NAME], getattr(PeftType, NAME, None), list(PeftType)[-1]]
    if any(each is not member for each in found):
        raise RuntimeError(
            f"PEFT {__version__} keeps its types in another way than {TRIED_WITH}, which this was tried with: "
            f"PeftType.{NAME} could not be added; install peft=={TRIED_WITH}"
        )


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Tell PEFT which classes stand for the type; a second call with the same ones does nothing.

    Raises:
        RuntimeError: PEFT, or another package, has a tuner of this name; or PEFT lacks what the tuner overrides.
    """
    if missing := [name for name in OVERRIDDEN if not hasattr(BaseTuner, name)]:
        raise RuntimeError(
            f"PEFT {__version__} has no BaseTuner.{missing[0]}, which the ETHER tuner overrides: install "
            f"peft=={TRIED_WITH}, which this was tried with"
        )
    if not hasattr(tuners_utils, LISTS_LINEARS):
        raise RuntimeError(
            f"PEFT {__version__} has no tuners_utils.{LISTS_LINEARS}, which the ETHER tuner calls: install "
            f"peft=={TRIED_WITH}, which this was tried with"
        )
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model, prefix=PREFIX)
    elif known is not config:
        raise RuntimeError(
            f"PEFT {__version__} has a tuner {NAME} already, {known.__module__}.{known.__qualname__}: "
            "this one cannot be registered beside it"
        )
