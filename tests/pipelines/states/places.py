"""Rules: the model is offloaded, cast, copied, and its q, k and v are fused."""

from __future__ import annotations

import copy
import tempfile

import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry
from hypothesis import strategies as st
from pipelines.states.machine import DATA, PipelineStates, step
from pipelines.states.world import TOLERANCE, shaken

from ether_diffusion.core.host import host_of


class PlaceRules(PipelineStates):
    """Where the model is, in which dtype, and in how many copies."""

    @step(lambda self: not all(part.offload for part in self.parts.values()), data=DATA)
    def offload(self, data: st.DataObject) -> None:
        component = data.draw(st.sampled_from([c for c, part in self.parts.items() if not part.offload]))
        part, module = self.parts[component], self.module(component)
        kind = data.draw(st.sampled_from(("accelerate", "group leaf", "group block", "group leaf disk", "group disk")))
        if component == "text_encoder":
            kind = "accelerate"
        if kind == "accelerate":
            cpu_offload(module, execution_device=torch.device("cpu"))
        else:
            leaf = "leaf" in kind
            module.enable_group_offload(
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level" if leaf else "block_level",
                num_blocks_per_group=None if leaf else 1,
                offload_to_disk_path=tempfile.mkdtemp(dir=self.folder) if kind.endswith("disk") else None,
            )
        part.offload = kind

    @step(lambda self: self.offloaded())
    def bring_back(self) -> None:
        self.remove_offloading()

    def remove_offloading(self) -> None:
        self.pipe.remove_all_hooks()
        for component, part in self.parts.items():
            if part.offload.startswith("group"):
                module = self.module(component)
                for inside in module.modules():  # diffusers has no verb for it
                    hooks = getattr(getattr(inside, "_diffusers_hook", None), "hooks", {})
                    for hook in hooks.values():
                        hook.group.onload_()
                HookRegistry.check_if_exists_or_initialize(module).remove_hook("group_offloading", recurse=True)
            part.offload = ""

    @step(lambda self: not self.offloaded(), dtype=st.sampled_from(tuple(TOLERANCE)))
    def cast(self, dtype: torch.dtype) -> None:
        self.pipe.to(dtype)
        for part in self.parts.values():
            part.cast(dtype)

    @step(lambda self: not self.parts["unet"].offload, goes_on=st.booleans())
    def copy_the_unet(self, goes_on: bool) -> None:
        part = self.parts["unet"]
        twin = copy.deepcopy(self.pipe.unet)
        if self.quiet("unet"):
            self.compare("unet", twin)
        original, kept = (self.pipe.unet, twin) if goes_on else (twin, self.pipe.unet)
        if (host := host_of(original)) is not None and not host.fused:
            for adapter in list(host.adapters.values()):
                adapter.detach()
            assert host_of(original) is None
        self.pipe.unet = kept
        self.compiled = None
        for name in part.adapters:
            assert self.adapter("unet", name).host is host_of(kept)

    @step(lambda self: self.names(), data=DATA)
    def copy_an_adapter(self, data: st.DataObject) -> None:
        component, name = data.draw(st.sampled_from([(c, n) for c, p in self.parts.items() for n in p.adapters]))
        adapter = self.adapter(component, name)
        twin = copy.deepcopy(adapter)
        assert twin.host is None
        assert twin.num_parameters() == adapter.num_parameters() == sum(p.numel() for p in twin.parameters())
        shaken(twin, 1)

    @step(lambda self: not self.loras() and not self.offloaded() and not self.parts["unet"].qkv_fused)
    def fuse_qkv(self) -> None:
        """Of attention layers without LoRA and offloading, which diffusers itself would leave out."""
        self.pipe.unet.fuse_qkv_projections()
        self.parts["unet"].qkv_fused = True

    @step(lambda self: self.parts["unet"].qkv_fused)
    def unfuse_qkv(self) -> None:
        self.pipe.unet.unfuse_qkv_projections()
        self.parts["unet"].qkv_fused = False
