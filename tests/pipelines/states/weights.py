"""Rules: adapters and LoRAs are written into the weights, and taken out of them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from pipelines.states.machine import DATA, FUSED, PipelineStates, step
from pipelines.states.model import MERGED_BENEATH, QKV_FUSED, WRONG_BATCH, Lora, Refusal, targeted
from pipelines.states.world import ATTENTION, COMPONENTS, LORA_NAMES, of_bits
from torch import Tensor

import ether_diffusion as ether


class WeightRules(PipelineStates):
    """Fusing, and the LoRAs of PEFT."""

    @step(lambda self: self.names())
    def fuse(self) -> None:
        parts = [part for part in self.hosts() if part.enabled and any(part.strengths.values())]
        must = [] if parts else [Refusal(ValueError, "there is no active adapter to fuse")]
        may: list[Refusal] = []
        beneath = Refusal(RuntimeError, r"cannot fuse: PEFT has merged .* call pipe\.unfuse_lora\(\)")
        for part in parts:
            if part.fused:
                must.append(FUSED)
                continue
            paths = part.acting_paths()
            if part.per_sample is not None:
                must.append(Refusal(ValueError, "call set_adapters first"))
            if part.qkv_fused:
                attention = any(ATTENTION.search(path) for path in paths)
                (must if attention else may).append(Refusal(ValueError, r"call unfuse_qkv_projections\(\)"))
            if part.offload.startswith("group"):
                must.append(Refusal(ValueError, "cannot fuse under group offloading"))
            if part.offload == "accelerate":
                must.append(Refusal(ValueError, r"offloaded weights: call pipe\.remove_all_hooks\(\)"))
            if part.merged & paths:
                must.append(beneath)
            elif part.merged & part.left:
                may.append(beneath)  # known defect: an adapter that was taken off still counts
        if not self.attempt(lambda: ether.fuse(self.pipe), must, may):
            return
        for part in parts:
            acting, paths = part.acting(), part.acting_paths()
            loras, part.loras = part.loras, {}
            expected = {path: weight for path, weight in part.weights(acting).items() if path in paths}
            part.loras = loras
            part.fused, part.fused_paths = True, frozenset(paths)
            part.rounded_since_fuse, part.recast_since_fuse = frozenset(), False
            self.take_over(part.name, expected)
            part.written = {path: part.stored[path] for path in paths}

    @step(lambda self: self.any_fused(), force=st.booleans())
    def unfuse(self, force: bool) -> None:
        must: list[Refusal] = []
        may: list[Refusal] = []
        changed = Refusal(RuntimeError, r"was changed since .* or call ether\.unfuse\(pipe, force=True\)")
        beneath = Refusal(RuntimeError, r"PEFT has merged .* call pipe\.unfuse_lora\(\) first, or .*force")
        parts = [part for part in self.hosts() if part.fused]
        for part in parts:
            if part.qkv_fused:
                attention = any(ATTENTION.search(p) for a in part.adapters.values() for p in a.vectors)
                (must if attention else may).append(Refusal(RuntimeError, r"call unfuse_qkv_projections\(\) first"))
            if part.offload.startswith("group"):
                must.append(Refusal(ValueError, "cannot unfuse under group offloading"))
            if part.offload == "accelerate":
                must.append(Refusal(ValueError, r"cannot unfuse offloaded weights: call pipe\.remove_all_hooks\(\)"))
            if force:
                continue
            if part.merged & part.left:
                may.append(beneath)  # known defect: an adapter that was taken off still counts
            if part.merged & part.fused_paths:
                must.append(beneath)
            elif part.tampered():
                must.append(changed)
            elif part.recast_since_fuse or (part.dtype == torch.bfloat16 and part.rounded_since_fuse):
                # known defect: a cast, a step of the vectors and, without PEFT's layer in bf16, PEFT's rounding since
                # fusing are taken for a change; force=True is the way out
                may.append(changed)
        if not self.attempt(lambda: ether.unfuse(self.pipe, force=force), must, may):
            return
        for part in parts:
            part.base = {path: weight.to(part.dtype).double() for path, weight in part.base.items()}
            for path in part.fused_paths:
                part.stored[path] = part.base[path]
            part.merged -= part.fused_paths
            part.fused, part.fused_paths, part.written = False, frozenset(), {}
            part.base = dict(part.stored)

    # LoRAs of PEFT

    @step(
        lambda self: len(self.loras()) < len(LORA_NAMES) and self.peft_may_change() and not self.lora_fused, data=DATA
    )
    def load_lora(self, data: st.DataObject) -> None:
        name = next(name for name in LORA_NAMES if name not in self.loras())
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        patterns = {
            "unet": data.draw(st.sampled_from((("to_q", "to_v"), ("attn?.to_k", "ff.net.2", "to_out.0"), ("to_v",)))),
            "text_encoder": data.draw(st.sampled_from(((), ("q_proj", "fc1")))),
        }
        state: dict[str, Tensor] = {}
        made: dict[str, Lora] = {}
        for component, part in self.parts.items():
            prefix = "unet" if component == "unet" else "text_encoder.text_model"
            lora = Lora({})
            for path in targeted(component, part.stored, patterns[component]):
                wide, narrow = part.stored[path].shape
                down, up = of_bits(generator, 2, narrow, scale=0.3), of_bits(generator, wide, 2, scale=0.1)
                lora.factors[path] = down, up
                state |= {f"{prefix}.{path}.lora_A.weight": down, f"{prefix}.{path}.lora_B.weight": up}
            if lora.factors:
                made[component] = lora
        self.pipe.load_lora_weights(state, adapter_name=name)
        for component, lora in made.items():
            self.parts[component].loras[name] = lora
        self.weigh_loras(data)
        if data.draw(st.booleans()):
            self.fuse_lora()

    def weigh_loras(self, data: st.DataObject) -> None:
        weights = {name: data.draw(st.sampled_from((1.0, 0.5, -0.5, 0.0))) for name in self.loras()}
        self.pipe.set_adapters(list(weights), list(weights.values()))
        for component, part in self.parts.items():
            part.lora_weights = weights
            self.module(component).to(part.dtype)  # PEFT makes fp32 factors in an fp64 model
            self.module(component).requires_grad_(False)

    @step(lambda self: self.loras() and self.peft_may_change() and not self.lora_fused, data=DATA)
    def set_loras(self, data: st.DataObject) -> None:
        self.weigh_loras(data)

    @step(lambda self: self.loras() and self.peft_may_change() and not self.lora_fused)
    def fuse_lora(self) -> None:
        self.pipe.fuse_lora(components=list(COMPONENTS))
        self.lora_fused = True
        for component, part in self.parts.items():
            paths = part.lora_paths()
            self.lora_written(component, paths, 1.0)
            part.merged = paths

    @step(lambda self: self.lora_fused and self.peft_may_change())
    def unfuse_lora(self) -> None:
        self.pipe.unfuse_lora(components=list(COMPONENTS))
        self.lora_fused = False
        for component, part in self.parts.items():
            self.lora_written(component, part.merged, -1.0)
            part.merged = frozenset()

    def lora_written(self, component: str, paths: frozenset[str], sign: float) -> None:
        part = self.parts[component]
        expected = {}
        for path in paths:
            added = [part.lora_weights[name] * lora.delta(path) for name, lora in part.loras.items()]
            expected[path] = part.stored[path] + sign * torch.as_tensor(sum(added))
        self.take_over(component, expected)
        part.rounded_since_fuse |= part.fused_paths & paths
        part.base |= {path: part.stored[path] for path in paths - part.fused_paths}
        part.rounded |= paths - part.fused_paths

    @step(lambda self: self.loras() and self.peft_may_change())
    def unload_lora(self) -> None:
        """Merged ones stay in the weights, as diffusers has it."""
        self.pipe.unload_lora_weights()
        self.lora_fused = False
        for part in self.parts.values():
            part.loras, part.lora_weights, part.merged = {}, {}, frozenset()

    @step(lambda self: self.refused(), data=DATA)
    def take_the_way_out(self, data: st.DataObject) -> None:
        """Do what the refused forward's message says."""
        wanted = [r for part in self.parts.values() for group in part.refusals() for r in group]
        refusal = data.draw(st.sampled_from(list(dict.fromkeys(wanted))))
        if refusal == MERGED_BENEATH and self.peft_may_change():
            self.pipe.unfuse_lora(components=list(COMPONENTS))
            self.lora_fused = False
            for component, part in self.parts.items():
                self.lora_written(component, part.merged, -1.0)
                part.merged = frozenset()
        elif refusal == QKV_FUSED:
            self.pipe.unet.unfuse_qkv_projections()
            self.parts["unet"].qkv_fused = False
        elif refusal == WRONG_BATCH:
            ether.set_adapters(self.pipe, [])
            for part in self.hosts():
                part.strengths, part.per_sample = {}, None
        assert all(refusal not in part.refusals()[0] for part in self.parts.values()) or not self.peft_may_change()
