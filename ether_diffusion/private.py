"""The parts of other libraries that have no public name, all in one place; tests fail when they move.

Torch's autograd, hooks and compiler; the state and the hooks of Accelerate; the device of a diffusers pipeline and
its fused attention processors; the backend of a tokenizer. (The exchange of two folders, a system call that Python has
no name for, is in ``files.py``.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def saves_through_hooks() -> bool:
    """Whether what autograd saves now goes through hooks, as within a checkpoint that is not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_function_transform() -> bool:
    """Whether ``torch.func`` (grad, vmap, …) is at work, which does not take our autograd functions."""
    return bool(torch._C._are_functorch_transforms_active())


def others_see_output(module: nn.Module, ours: int = 1) -> bool:
    """Whether forward hooks of others than ``ours``, on the module or global, may hold its output or have made it."""
    return len(module._forward_hooks) > ours or bool(nn.modules.module._global_forward_hooks)


def alone(module: nn.Module, ours: int = 1) -> bool:
    """Whether nobody but we, who have ``ours`` hooks on each side, and no compiler or transform can see the output."""
    return not (
        torch.compiler.is_compiling()
        or in_function_transform()
        or len(module._forward_hooks) + len(module._forward_pre_hooks) > 2 * ours
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


def same_id(handle: RemovableHandle) -> None:
    """Give a forward hook an id that hooks on other modules have, too.

    The compiler compares ids when it asks whether the code of one block fits another: with numbers that torch counts
    up, every block of a model would be compiled for itself (``compile_repeated_blocks``).
    """
    hooks = [reference() for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref)]
    new = -1
    while new in hooks[0]:
        new -= 1
    for each in hooks:
        if each is not None and handle.id in each:
            each[new] = each.pop(handle.id)
    handle.id = new


def run_while_tracing(method: Callable[..., Any]) -> None:
    """Let torch.compile call a method when it traces a call of it, in place of tracing into it.

    ``torch.compiler.assume_constant_result`` does the same, and imports the whole compiler.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]


def hooks_changed(model: nn.Module) -> None:
    """Let code that was compiled with the model or parts of it be traced again, for hooks within have changed.

    The compiler does not look at the hooks of modules within the one that it is given, unless it is told to. It is told
    so here for all that it compiles from now on; and what it has compiled until now of classes of the model it forgets,
    once. A function of the user's that was compiled around the model before its first adapter is not among it.
    """
    if "torch._dynamo" not in sys.modules:
        return
    dynamo: Any = sys.modules["torch._dynamo"]
    if dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        classes = {type(each) for each in model.modules()}
        files = {getattr(each.forward, "__code__", hooks_changed.__code__).co_filename for each in classes}
        files -= {nn.Linear.forward.__code__.co_filename, nn.Sequential.forward.__code__.co_filename}
        for reference in list(dynamo.convert_frame.input_codes.seen):
            code = reference()
            if code is not None and code.co_filename in files:
                dynamo.reset_code(code)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which torch.compile, FSDP and activation checkpointing keep the module that they wrap."""


def has_fused_processor(attention: nn.Module) -> bool:
    """Whether the processor of a diffusers ``Attention`` calls one fused projection for q, k and v."""
    return "Fused" in type(attention.processor).__name__


def execution_device(pipe: DiffusionPipeline) -> torch.device:
    """Where a pipeline computes, which under offloading is not where its weights are."""
    device: torch.device = pipe._execution_device
    return device


def input_device(module: nn.Module) -> torch.device:
    """Where a module takes its inputs, which under Accelerate's offloading is not where its weights are."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), None)
    return next(module.parameters()).device if found is None else torch.device(found)


def tokenizer_backend(tokenizer: Any) -> Any | None:
    """The ``tokenizers.Tokenizer`` that a tokenizer of transformers works with; None where it has none."""
    return getattr(tokenizer, "_tokenizer", None)


def use_tokenizer_backend(tokenizer: Any, backend: Any, tokens: list[str]) -> None:
    """Let a tokenizer work with a copy of a backend that has more tokens; without any, with the backend itself."""
    tokenizer._tokenizer = type(backend).from_str(backend.to_str()) if tokens else backend
    if tokens:
        tokenizer.add_tokens(tokens)


def forget_accelerator() -> None:
    """Let the next ``Accelerator`` of this process have settings of its own: Accelerate keeps the first one's."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
