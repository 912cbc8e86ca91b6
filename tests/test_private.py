"""Parts of other libraries without a public name still mean what is taken from them."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from ether_diffusion.playground.tiny import tiny_pipeline, tiny_unet
from ether_diffusion.private import (
    WRAPPERS,
    alone,
    execution_device,
    forget_accelerator,
    has_fused_processor,
    hooks_changed,
    in_function_transform,
    others_see_output,
    run_while_tracing,
    same_id,
    saves_through_hooks,
    tokenizer_backend,
    use_tokenizer_backend,
)


def test_saved_tensors_go_through_hooks_within_a_checkpoint() -> None:
    seen: list[bool] = []

    def part(x: Tensor) -> Tensor:
        seen.append(saves_through_hooks())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    part(x)
    checkpoint(part, x, use_reentrant=False).sum().backward()
    assert seen == [False, True, True]  # and again where it is computed again
    checkpoint(part, x, use_reentrant=True).sum().backward()
    assert seen[3:] == [False, False]


def test_a_function_transform_is_known() -> None:
    seen: list[bool] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(in_function_transform())
        return x.square().sum()

    x = torch.ones(2)
    torch.func.grad(loss)(x)
    torch.func.vmap(loss)(torch.ones(3, 2))
    loss(x)
    assert seen == [True, True, False]


def test_hooks_of_others_are_seen() -> None:
    registrations = [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ]
    for register in registrations:
        linear = nn.Linear(2, 2)
        linear.register_forward_pre_hook(lambda *_: None)  # ours
        linear.register_forward_hook(lambda *_: None)
        assert alone(linear)
        assert not others_see_output(linear)
        register(linear, lambda *_: None)
        assert not alone(linear), register
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(nn.modules.module, f"register_module_{name}")(lambda *_: None)
        assert not alone(nn.Linear(2, 2)), name
        handle.remove()
    assert alone(nn.Linear(2, 2))


def test_a_method_may_run_while_a_call_of_it_is_traced() -> None:
    class Counts:
        calls = 0

        def count(self) -> None:
            self.calls += 1

        run_while_tracing(count)

    counts = Counts()

    def double(x: Tensor) -> Tensor:
        counts.count()
        return 2 * x

    torch.compiler.reset()
    compiled = torch.compile(double, backend="eager", fullgraph=True)
    for _ in range(3):
        compiled(torch.ones(2))
    assert counts.calls == 1
    torch.compiler.reset()


def test_code_that_was_compiled_with_a_model_is_traced_again_when_its_hooks_change() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        counter, model, x = CompileCounter(), Outer(), torch.ones(1, 2)
        compiled = torch.compile(model, backend=counter)
        before = compiled(x)
        handle = model.inner.register_forward_hook(lambda module, args, output: output + 1)
        hooks_changed(model)
        torch.testing.assert_close(compiled(x), before + 1)
        handle.remove()
        hooks_changed(model)
        torch.testing.assert_close(compiled(x), before)
        assert counter.frame_count in (2, 3)
    torch.compiler.reset()


def test_names_of_wrappers_and_of_fused_processors() -> None:
    assert "_orig_mod" in WRAPPERS
    assert torch.compile(nn.Linear(2, 2), backend="eager")._modules.keys() == {"_orig_mod"}
    unet = tiny_unet()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert not has_fused_processor(attention)
    unet.fuse_qkv_projections()
    assert has_fused_processor(attention)


def test_the_device_of_a_pipeline() -> None:
    assert execution_device(tiny_pipeline()) == torch.device("cpu")


def test_an_accelerator_may_be_forgotten() -> None:
    forget_accelerator()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    with pytest.raises(ValueError, match="mixed_precision"):
        Accelerator(cpu=True, mixed_precision="no")
    forget_accelerator()
    assert Accelerator(cpu=True, mixed_precision="no").mixed_precision == "no"
    forget_accelerator()


def test_hooks_of_two_modules_get_the_same_ids_and_are_removed_by_them() -> None:
    ids, calls = [], []
    for _ in range(2):
        module = nn.Linear(2, 2)
        handles = [
            module.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True),
            module.register_forward_pre_hook(lambda *_: calls.append("too")),
            module.register_forward_hook(lambda *_: calls.append("after"), always_call=True),
        ]
        for handle in handles:
            same_id(handle)
        ids.append([handle.id for handle in handles])
        module(torch.ones(1, 2))
        assert calls == ["before", "too", "after"]
        with pytest.raises(TypeError):
            module(None)
        assert calls.pop() == "after"  # called whatever happens
        calls.clear()
        handles[0].remove()
        module(torch.ones(1, 2))
        assert calls == ["too", "after"]
        calls.clear()
        for handle in handles[1:]:
            handle.remove()
        assert not module._forward_hooks_with_kwargs
        assert not module._forward_hooks_always_called
        assert not module._forward_pre_hooks
    assert ids[0] == ids[1]
    assert ids[0][0] != ids[0][1]


def test_a_tokenizer_works_with_a_copy_of_its_backend_that_has_more_tokens() -> None:
    tokenizer = tiny_pipeline().tokenizer
    before = tokenizer_backend(tokenizer)
    assert before is not None
    ids, size = tokenizer("a <dog>").input_ids, len(tokenizer)
    use_tokenizer_backend(tokenizer, before, ["<dog>", "<dog>_1"])
    assert tokenizer("a <dog> <dog>_1").input_ids[-3:-1] == [size, size + 1]
    assert before.get_vocab_size() == size
    use_tokenizer_backend(tokenizer, before, [])
    assert tokenizer_backend(tokenizer) is before
    assert tokenizer("a <dog>").input_ids == ids
    assert tokenizer_backend(object()) is None
