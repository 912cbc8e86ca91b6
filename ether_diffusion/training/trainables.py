"""What a run trains: adapters of this library, adapters of peft, or the weights themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save as serialize
from torch import Tensor, nn

from ether_diffusion.core.adapter import check_blocks
from ether_diffusion.core.host import attach, host_of
from ether_diffusion.core.targets import find_targets
from ether_diffusion.families.protocol import Family
from ether_diffusion.files import atomic_path, commit
from ether_diffusion.pipelines.schema import CONTROL
from ether_diffusion.pipelines.verbs import adapter_file
from ether_diffusion.runs.written import note_written
from ether_diffusion.training.sections import AdapterSection, SavingSection

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_NAME = "trained"
CONTROLNET_WEIGHTS = "controlnet_weights"
"""The component that stands for a ControlNet's own weights, beside an adapter of it."""


@dataclass(frozen=True)
class Trainable:
    """One component of the pipeline that is trained.

    Attributes:
        component: the denoiser or a text encoder; control_encoder, controlnet or controlnet_weights; ``tokens.`` and a
            text encoder for rows of a new token.
        module: owns the trained parameters: an adapter beside the component, or the component itself.
        set_active: turns the trained part on or off, so that the base can be sampled; None where it cannot.
        adapter: the adapter's name in the pipeline.
        last_step: the step after which it stays as it is, None where it learns to the end.
    """

    component: str
    module: nn.Module
    set_active: Callable[[bool], None] | None
    adapter: str = ADAPTER_NAME
    last_step: int | None = None

    def learns(self, step: int) -> bool:
        """Whether it is trained in optimisation step ``step``, counted from 1."""
        return self.last_step is None or step <= self.last_step

    @property
    def key(self) -> str:
        """Stands for it among all that a run trains: the component, under the adapter's name if there are several."""
        return self.component if self.adapter == ADAPTER_NAME else f"{self.adapter}.{self.component}"

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, fp32."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(parameter.numel() for parameter in self.parameters())


Components = dict[str, nn.Module]
"""Modules that a method acts on, by their name in the pipeline."""


def trained_components(family: Family, section: AdapterSection) -> Components:
    """The denoiser and, if asked for, the text encoders."""
    return {family.DENOISER: family.denoiser, **(family.text_encoders if section.train_text_encoder else {})}


def check_trainables(components: Components, section: AdapterSection) -> None:
    """Raise what :func:`make_trainables` would, before anything slow is done.

    Raises:
        ValueError: targets or n_blocks do not fit the model.
    """
    if section.entry.saved_as == "nothing":
        return
    check_peft_config(section)
    for component, module in components.items():
        try:
            targets = find_targets(module, section.targets_of(component))
            if section.entry.is_own:
                check_blocks(targets, section.ether_config(component))
        except ValueError as error:
            raise ValueError(f"{component}: {error}") from None


def check_peft_config(section: AdapterSection) -> None:
    """Let peft look at the settings of ``method=peft``, which it alone knows.

    Raises:
        ValueError: peft has no such type, or refuses a setting.
        ImportError: it is not installed.
    """
    if section.peft_config is not None and section.entry.build is not None:
        section.entry.build(section, [])


def make_trainables(components: Components, section: AdapterSection, adapter: str = ADAPTER_NAME) -> list[Trainable]:
    """Attach what the section names to each component; an adapter of this library gets the name ``adapter``.

    Raises:
        ValueError: targets or n_blocks do not fit the model.
        ImportError: the method comes from peft and that is not installed.
    """
    entry, build = section.entry, section.entry.build
    if entry.saved_as == "nothing":
        return []
    if entry.is_own:
        return [_ether(component, module, section, adapter) for component, module in components.items()]
    if build is not None:
        return [_peft(component, module, section, partial(build, section)) for component, module in components.items()]
    return [_full(component, module) for component, module in components.items()]


def trained_state(trainables: list[Trainable]) -> dict[str, Tensor]:
    """The trained parameters by name."""
    return {
        f"{trainable.key}.{name}": parameter
        for trainable in trainables
        for name, parameter in trainable.module.named_parameters()
        if parameter.requires_grad
    }


def save_trained(pipe: DiffusionPipeline, trainables: list[Trainable], saving: SavingSection) -> None:
    """Write the result into the run folder, in the format that the method's own loader reads.

    ETHER, ETHER+ and Naive: ``ether_weights.safetensors``; LoRA: diffusers' ``pytorch_lora_weights.safetensors``;
    the others of peft: one peft folder per component; full: the whole pipeline. A control encoder is written as
    ``ether_weights.safetensors`` whatever the method, a ControlNet's weights as the diffusers folder ``controlnet``.
    """
    folder = saving.output_dir
    adapted = [trainable for trainable in trainables if trainable.component not in (CONTROL, CONTROLNET_WEIGHTS)]
    for name in dict.fromkeys(trainable.adapter for trainable in trainables):
        save_adapter(pipe, name, saving.pretrained_model_name_or_path, folder)
    if any(trainable.component == CONTROLNET_WEIGHTS for trainable in trainables):
        with atomic_path(folder / "controlnet") as temporary:
            pipe.controlnet.save_pretrained(temporary)
            _note(folder, temporary, "controlnet")
    if saving.entry.saved_as == "pipeline":
        _save_pipeline(pipe, folder)
    elif saving.entry.saved_as == "lora" and not any(trainable.component == "controlnet" for trainable in adapted):
        _save_lora(pipe, adapted, folder)
    elif saving.entry.needs_peft:  # diffusers has no format for the LoRA of a ControlNet
        for trainable in adapted:
            _save_peft(trainable, folder)


def save_adapter(pipe: DiffusionPipeline, name: str, base_model: str, folder: Path) -> None:
    """Write ``ether_weights.safetensors``: an adapter's vectors and control encoder, where there are any.

    The embeddings of a placeholder token that was trained with it are written beside.
    """
    file = adapter_file(pipe, name, base_model)
    if file.configs or file.control is not None:
        file.write(folder)


def _ether(component: str, module: nn.Module, section: AdapterSection, name: str) -> Trainable:
    adapter = attach(module, section.ether_config(component), name)
    if section.entry.is_reflection:
        with torch.no_grad():
            for vectors in adapter.parameters():
                vectors.mul_(section.initial_length)
    return Trainable(component, adapter, partial(_set_active, module, name), name)


def _set_active(module: nn.Module, name: str, active: bool) -> None:
    """Turn an adapter that is trained on or off: it alone, or all that are trained side by side."""
    host = host_of(module)
    assert host is not None, f"{name} is attached"
    if host.per_sample is not None:
        host.enable(active)
        return
    others = {other: strength for other, strength in host.strengths.items() if other != name}
    host.set_active({**others, name: 1.0} if active else others)


def _full(component: str, module: nn.Module) -> Trainable:
    module.requires_grad_(True)
    return Trainable(component, module, None)


def _peft(
    component: str, module: nn.Module, section: AdapterSection, build: Callable[[list[str]], PeftConfig]
) -> Trainable:
    """Inject an adapter of peft into the same projections that ours would act on; ``build`` configures it for them."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    prefix = "text_model." if hasattr(module, "text_model") else ""
    names = [prefix + target.path for target in find_targets(module, section.targets_of(component))]
    before = _weight_sums(module, names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        try:
            peft.inject_adapter_in_model(build(names), module, ADAPTER_NAME)
        except (KeyError, TypeError) as error:
            told = f"method={section.entry.name} ({type(error).__name__}: {error})"
            raise ValueError(f"{component}: peft cannot make this adapter of {told}") from error
    if _weight_sums(module, names) != before:
        raise ValueError(
            f"{component}: this adapter begins by changing the base's own weights, as init_lora_weights of pissa and "
            "olora do: without it the base would not be the base; leave that setting out"
        )
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]

    def set_active(active: bool) -> None:
        for layer in layers:
            layer.enable_adapters(active)

    return Trainable(component, module, set_active)


def _weight_sums(module: nn.Module, paths: Sequence[str]) -> list[tuple[float, float] | None]:
    """Of the Linears at these paths, whatever is around them, sums of the weight and of its squares.

    A weight that an adapter holds in another form, or that is on the meta device, has None.
    """
    found: list[tuple[float, float] | None] = []
    for path in paths:
        layer: Any = module.get_submodule(path)
        weight = getattr(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.is_meta:
            found.append(None)
            continue
        wide = weight.detach().double()
        found.append((wide.sum().item(), wide.square().sum().item()))
    return found


def _save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Every component whole before it gets its name, and the index, which makes it a pipeline, last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pipeline-") as temporary:
        pipe.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "model_index.json"):
            _note(folder, path, path.name)
            commit(path, folder / path.name)


def _save_lora(pipe: DiffusionPipeline, trainables: list[Trainable], folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = {f"{t.component}_lora_layers": convert_state_dict_to_diffusers(_peft_state(t.module)) for t in trainables}
    name = "pytorch_lora_weights.safetensors"
    with atomic_path(folder / name) as temporary:
        pipe.save_lora_weights(temporary.parent, weight_name=temporary.name, **layers)


def _save_peft(trainable: Trainable, folder: Path) -> None:
    config = trainable.module.peft_config[ADAPTER_NAME]  # type: ignore[index]
    state = {
        f"base_model.model.{key}": value.clone(memory_format=torch.contiguous_format)
        for key, value in _peft_state(trainable.module).items()
    }
    with atomic_path(folder / trainable.component) as temporary:
        config.save_pretrained(temporary)  # type: ignore[union-attr]
        (temporary / "adapter_model.safetensors").write_bytes(serialize(state))
        _note(folder, temporary, trainable.component)


def _note(folder: Path, temporary: Path, name: str) -> None:
    """Record what is about to get its name in the run folder: a file, or a folder with all that is in it."""
    files = [file.relative_to(temporary) for file in temporary.rglob("*") if file.is_file()]
    note_written(folder, [folder / name / file for file in files] if temporary.is_dir() else [folder / name])


def _peft_state(module: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME)
    return {key: value.detach().cpu() for key, value in state.items()}
