"""The vectors of one adapter, beside the model that they act on."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.methods import Method, Reflection, build_method
from ether_diffusion.core.state import StateMismatchError, state_problems
from ether_diffusion.core.targets import Target

if TYPE_CHECKING:
    from ether_diffusion.core.host import Host

_SERIALS = itertools.count()


class Adapter(nn.Module):
    """The vectors of one adapter, beside the model that they act on.

    A plain module: ``parameters()`` are fp32, ``state_dict()`` has the keys ``<module path>.u`` and so on. It is not
    registered in the model, whose own parameters, state dict and dtype stay as they are. A copy of it, by deepcopy or
    pickle, has the vectors and not the model.
    """

    def __init__(self, config: EtherConfig, targets: list[Target], name: str) -> None:
        super().__init__()
        self.config = config
        self.adapter_name = name
        self.serial = next(_SERIALS)
        self.set_host(None)
        generator = torch.Generator().manual_seed(config.seed)
        for target in targets:
            method = build_method(config, target.inputs, target.outputs, generator)
            _set_submodule(self, target.path, method)
        self._scalars = sum(parameter.numel() for parameter in self.parameters())

    @property
    def host(self) -> Host | None:
        """The adapters of the model that it is attached to; None where it is not attached."""
        reference: weakref.ref[Host] | None = self.__dict__["_host"]
        return None if reference is None else reference()

    def set_host(self, host: Host | None) -> None:
        """Say which host has the adapter; its children may have any name, ``_host`` among them."""
        self.__dict__["_host"] = None if host is None else weakref.ref(host)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_host": None}

    def methods(self) -> dict[str, Method]:
        """The transform of every target, by module path."""
        return {path: module for path, module in self.named_modules() if isinstance(module, Method)}

    def ranks(self) -> dict[str, int]:
        """What the rank of W' - W is at most, by module path; Naive's is not bounded."""
        return {path: method.rank for path, method in self.methods().items() if isinstance(method, Reflection)}

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return self._scalars

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the vectors as ``fn`` says; each method keeps its own in fp32."""
        super()._apply(fn, recurse)
        self._changed()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load vectors after checking all of them; nothing changes if one does not fit.

        Raises:
            StateMismatchError: unknown or missing keys, wrong shapes, values that are not finite, zero vectors.
        """
        if problems := state_problems(state_dict, self.state_dict()):
            raise StateMismatchError(self.adapter_name, problems)
        state = {key: value.float() for key, value in state_dict.items()}
        result = super().load_state_dict(state, strict=True, assign=assign)
        self._changed()
        return result

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train the vectors, or leave them as they are."""
        super().requires_grad_(requires_grad)
        self._changed()
        return self

    def _changed(self) -> None:
        """Tell the host that vectors are other ones, for what it has made of them beforehand."""
        if self.host is not None:
            self.host.vectors_changed()

    def detach(self) -> None:
        """Take the adapter off its model, which is left as if it had never been there."""
        if self.host is not None:
            self.host.remove(self.adapter_name)


def check_blocks(targets: list[Target], config: EtherConfig) -> None:
    """Raise ValueError unless ``config.n_blocks`` divides every width that the adapter transforms.

    These are the features of a side or, of a fused Linear, those of each part.
    """
    two_sided = config.acts_on_outputs
    widths = set()
    for target in targets:
        for side, layout in (("input", target.inputs), ("output", target.outputs))[: 1 + two_sided]:
            for part in layout.parts:
                where = f"{target.path}, {side} part {part.name}" if part.name else target.path
                widths.add((where, part.width))
    for where, width in sorted(widths):
        if width % config.n_blocks:
            shared = math.gcd(*(width for _, width in widths))
            divisors = [n for n in range(1, shared + 1) if shared % n == 0]
            raise ValueError(
                f"n_blocks={config.n_blocks} does not divide the {width} features of {where}; "
                f"all targets share these divisors: {', '.join(map(str, divisors))}"
            )


def _set_submodule(module: nn.Module, path: str, child: nn.Module) -> None:
    """Register ``child`` under a dotted path, with plain modules on the way, so that keys are the model's own paths.

    ``add_module`` would refuse names that are attributes of modules, such as ``config``; models may have such children.
    """
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module._modules[parent] = nn.Module()
        module = module._modules[parent]  # type: ignore[assignment]
    module._modules[name] = child
