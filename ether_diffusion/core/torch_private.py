"""The parts of torch that have no public name; a test fails when they move."""

from __future__ import annotations

import torch
from torch import nn


def saves_through_hooks() -> bool:
    """Whether what autograd saves now goes through hooks, as within a checkpoint that is not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_function_transform() -> bool:
    """Whether ``torch.func`` (grad, vmap, …) is at work, which does not take our autograd functions."""
    return bool(torch._C._are_functorch_transforms_active())


def others_see_output(module: nn.Module) -> bool:
    """Whether forward hooks of others, on the module or global, may hold its output or have made it."""
    return len(module._forward_hooks) > 1 or bool(nn.modules.module._global_forward_hooks)


def alone(module: nn.Module) -> bool:
    """Whether nobody but we, who have one hook on each side, and no compiler or transform can see what goes through."""
    return not (
        torch.compiler.is_compiling()
        or in_function_transform()
        or len(module._forward_hooks) + len(module._forward_pre_hooks) > 2
        or module._backward_hooks
        or module._backward_pre_hooks
        or _global_hooks()
    )


def _global_hooks() -> bool:
    of_all = nn.modules.module
    return bool(
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )
