"""The verbs on a diffusers pipeline: load, save, set_adapters, enable, disable, fuse, unfuse, unload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from ether_diffusion.adapter import Adapter, Host, attach_made, host_of
from ether_diffusion.checkpoint import COMPONENTS, CONTROL, AdapterFile
from ether_diffusion.config import EtherConfig
from ether_diffusion.control import Control, attach_control, control_of
from ether_diffusion.fingerprint import base_hash
from ether_diffusion.fitting import fit, warn_if_other_base
from ether_diffusion.per_sample import check_mixable


@dataclass(frozen=True)
class AdapterInfo:
    """What :func:`adapters` tells of one adapter.

    Attributes:
        components: the pipeline's components that it is attached to.
        configs: its settings there.
        num_parameters: trained scalars in all components.
        active: whether it acts on the next image.
        strength: s of W + s ΔW; 0 while it is not set.
        fused: whether it is folded into the weights.
        control: whether it has a control encoder, which needs a control image: see :func:`controlled`.
    """

    components: tuple[str, ...]
    configs: dict[str, EtherConfig]
    num_parameters: int
    active: bool
    strength: float
    fused: bool
    control: bool = False


def load(pipe: DiffusionPipeline, source: str | Path, name: str = "default", strength: float = 1.0) -> None:
    """Load an adapter into a pipeline and make it active, besides those that are active already.

    A control encoder that was trained with the adapter is loaded with it; images are then drawn with
    :class:`ether_diffusion.StableDiffusionControlPipeline` or within :func:`ether_diffusion.controlled`.

    Everything is checked before anything is attached: unknown or missing keys, shapes, values, components.

    Args:
        pipe: any diffusers pipeline over Stable Diffusion 1.x, 2.x, XL (text to image, img2img, inpaint, ControlNet).
        source: run folder, ``.safetensors`` file, or Hub id.
        name: name to give it in this pipeline.
        strength: s of W + s ΔW; 1 is what was trained.

    Raises:
        FileNotFoundError: there is no such adapter.
        AdapterFileError: the file is damaged or does not fit this pipeline; the pipeline is as before.
        ValueError: the name is taken, or the strength is not finite; the pipeline is as before.
        RuntimeError: adapters are fused into the pipeline's weights.
    """
    if not math.isfinite(strength):
        raise ValueError(f"the strength of {name!r} must be a finite number, not {strength}")
    file = AdapterFile.read(source)
    fitted = fit(pipe, file, source, name)
    if name in adapters(pipe):
        raise ValueError(f"an adapter {name!r} is loaded already: unload it, or pass another name")
    _changeable_hosts(pipe, "load another adapter")
    enabled = _enabled(pipe)
    warn_if_other_base(pipe, file, source)
    attached: list[Adapter] = []
    try:
        for component, (adapter, targets) in fitted.items():
            attached.append(attach_made(getattr(pipe, component), adapter, targets))
        if file.control is not None:
            device = pipe.unet.conv_in.weight.device
            encoder = file.control if device.type == "meta" else file.control.to(device)
            attach_control(pipe.unet, encoder.requires_grad_(False), name)
    except Exception:
        for adapter in attached:
            adapter.detach()
        raise
    if not enabled:
        disable(pipe)  # components that had no adapter so far join the others
    if strength != 1.0:
        active = {n: info.strength for n, info in adapters(pipe).items() if info.strength}
        set_adapters(pipe, list({**active, name: strength}), list({**active, name: strength}.values()))


def save(pipe: DiffusionPipeline, path: str | Path, name: str | None = None) -> Path:
    """Save an adapter of the pipeline, all components in one file, and return the file's path.

    Args:
        pipe: the pipeline that the adapter is attached to.
        path: folder, or a name that ends in ``.safetensors``.
        name: which adapter; may be left out where there is only one.

    Raises:
        ValueError: there is no such adapter, or several and no name; or its vectors are not finite.
    """
    loaded = adapters(pipe)
    if name is None and len(loaded) == 1:
        name = next(iter(loaded))
    if name is None:
        raise ValueError(f"name the adapter to save, one of: {', '.join(loaded) or 'none is loaded'}")
    return adapter_file(pipe, _known(pipe, name)).write(path)


def adapter_file(pipe: DiffusionPipeline, name: str, base_model: str | None = None) -> AdapterFile:
    """The file content for adapter ``name``; ``base_model`` defaults to where the pipeline came from."""
    found = {c: host.adapters[name] for c, host in _hosts(pipe).items() if name in host.adapters}
    control = _control(pipe)
    encoder = control.encoders.get(name) if control else None
    based_on = dict.fromkeys([*found, *(["unet"] if encoder else [])])
    hashes = {component: base_hash(getattr(pipe, component)) for component in based_on}
    return AdapterFile(
        states={component: adapter.state_dict() for component, adapter in found.items()},
        configs={component: adapter.config for component, adapter in found.items()},
        base_model=base_model if base_model is not None else str(pipe.config.get("_name_or_path") or ""),
        base_hash={component: value for component, value in hashes.items() if value is not None},
        control=encoder,
    )


def adapters(pipe: DiffusionPipeline) -> dict[str, AdapterInfo]:
    """What is loaded in the pipeline, by name: components, settings, parameters, whether active, strength, fused."""
    hosts, control = _hosts(pipe), _control(pipe)
    names = dict.fromkeys(name for host in hosts.values() for name in host.adapters)
    names |= dict.fromkeys(control.encoders if control else ())
    return {
        name: _info(name, {c: host for c, host in hosts.items() if name in host.adapters}, control) for name in names
    }


def set_adapters(
    pipe: DiffusionPipeline,
    names: str | Sequence[str] | None = None,
    strengths: float | Sequence[float] = 1.0,
    *,
    per_sample: Sequence[str | None] | None = None,
    images_per_prompt: int = 1,
) -> None:
    """Make exactly these adapters active: W + Σ s ΔW, or one for each sample of a batch. The others stay loaded.

    With ``per_sample`` the i-th prompt of a call has the i-th adapter, None being the base; classifier-free guidance
    may double the batch. A batch of another size is refused when it comes. Where an adapter has no vectors for a
    component, its samples have the base there. It lasts until adapters are set anew, or one of these is unloaded.

    Args:
        pipe: the pipeline.
        names: adapters that act on every sample.
        strengths: one for all, or one each.
        per_sample: instead of ``names``, one for each prompt; all of the same settings (method, blocks, targets).
        images_per_prompt: the call's ``num_images_per_prompt``, with ``per_sample``.

    Raises:
        ValueError: an unknown name, a name given twice, another number of strengths than of names, or adapters that
            cannot share a batch.
        RuntimeError: adapters are fused.
    """
    if per_sample is not None:
        if names is not None or strengths != 1.0:
            raise ValueError("give names and strengths, or per_sample, whose adapters act at strength 1: not both")
        _set_per_sample(pipe, list(per_sample), images_per_prompt)
        return
    if names is None:
        raise ValueError("name the adapters to set, [] for none, or give per_sample")
    names = [names] if isinstance(names, str) else list(names)
    strengths = [float(strengths)] * len(names) if isinstance(strengths, int | float) else list(strengths)
    if len(names) != len(strengths):
        raise ValueError(f"{len(names)} adapters but {len(strengths)} strengths: give one each, or a single number")
    if len(set(names)) != len(names):
        raise ValueError(f"an adapter is named twice in {names}")
    chosen = {_known(pipe, name): strength for name, strength in zip(names, strengths, strict=True)}
    if infinite := [name for name, strength in chosen.items() if not math.isfinite(strength)]:
        raise ValueError(f"strengths must be finite numbers; that of {infinite[0]!r} is {chosen[infinite[0]]}")
    for host in _changeable_hosts(pipe, "change which adapters are active"):
        host.set_active({name: strength for name, strength in chosen.items() if name in host.adapters})
    if control := _control(pipe):
        control.active = {name for name, strength in chosen.items() if strength and name in control.encoders}


def _set_per_sample(pipe: DiffusionPipeline, names: list[str | None], images_per_prompt: int) -> None:
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, not {images_per_prompt}")
    _changeable_hosts(pipe, "change which adapters are active")
    known = {name: _known(pipe, name) for name in names if name is not None}
    if (control := _control(pipe)) and (controlled := [name for name in known if name in control.encoders]):
        raise ValueError(f"{controlled[0]!r} has a control, which acts on a whole batch and not on single samples")
    chosen = {
        component: [name if name is not None and name in host.adapters else None for name in names]
        for component, host in _hosts(pipe).items()
    }
    for host in _hosts(pipe).values():
        check_mixable({name: host.adapters[name].config for name in known if name in host.adapters})
    for component, host in _hosts(pipe).items():
        # pipelines encode each prompt once, and then repeat it for its images
        repeats = 1 if component.startswith("text_encoder") else images_per_prompt
        host.set_per_sample([name for name in chosen[component] for _ in range(repeats)])
    if control:
        control.active = set()


def enable(pipe: DiffusionPipeline) -> None:
    """Let the active adapters act again after :func:`disable`."""
    _switch(pipe, True)


def disable(pipe: DiffusionPipeline) -> None:
    """Run the pipeline as the base alone; adapters stay loaded and keep their strengths.

    Raises:
        RuntimeError: adapters are fused.
    """
    _switch(pipe, False)


@contextmanager
def disabled(pipe: DiffusionPipeline) -> Iterator[None]:
    """Within the context the pipeline is the base alone; afterwards it is as it was."""
    switched = _switch(pipe, False)
    try:
        yield
    finally:
        for each in switched:
            each.enable()


def fuse(pipe: DiffusionPipeline) -> None:
    """Fold the active adapters into the weights: the speed of the base. The base weights are kept for unfuse.

    Raises:
        ValueError: nothing is active, or a weight is quantised or offloaded; the pipeline is as before.
        RuntimeError: adapters are fused already.
    """
    hosts = [host for host in _hosts(pipe).values() if host.enabled and any(host.strengths.values())]
    if not hosts:
        raise ValueError("there is no active adapter to fuse: load one, or call set_adapters or enable")
    done: list[Host] = []
    try:
        for host in hosts:
            host.fuse()
            done.append(host)
    except Exception:
        for host in done:
            host.unfuse()
        raise


def unfuse(pipe: DiffusionPipeline) -> None:
    """Restore the base weights bit for bit; the adapters act unfused again. Does nothing if none is fused."""
    for host in _hosts(pipe).values():
        if host.fused:
            host.unfuse()


def unload(pipe: DiffusionPipeline, name: str | None = None) -> None:
    """Remove an adapter, or all of them; the last one leaves no trace in the pipeline.

    Raises:
        ValueError: there is no such adapter.
        RuntimeError: adapters are fused.
    """
    for chosen in [_known(pipe, name)] if name is not None else list(adapters(pipe)):
        for host in _changeable_hosts(pipe, f"unload {chosen!r}"):
            if chosen in host.adapters:
                host.remove(chosen)
        if (control := _control(pipe)) and chosen in control.encoders:
            control.remove(chosen)


def _hosts(pipe: DiffusionPipeline) -> dict[str, Host]:
    found = {component: getattr(pipe, component, None) for component in COMPONENTS}
    hosts = {c: host_of(module) for c, module in found.items() if isinstance(module, nn.Module)}
    return {component: host for component, host in hosts.items() if host is not None}


def _control(pipe: DiffusionPipeline) -> Control | None:
    """The control encoders of the pipeline's UNet."""
    unet = getattr(pipe, "unet", None)
    return control_of(unet) if isinstance(unet, nn.Module) else None


def _switches(pipe: DiffusionPipeline) -> list[Host | Control]:
    """All that can be turned on and off."""
    control = _control(pipe)
    return [*_hosts(pipe).values(), *([control] if control else [])]


def _enabled(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's adapters act, those that are active."""
    return all(each.enabled for each in _switches(pipe))


def _changeable_hosts(pipe: DiffusionPipeline, wish: str) -> list[Host]:
    """The pipeline's hosts, after making sure that none of them is fused: a verb changes all of them or none."""
    hosts = list(_hosts(pipe).values())
    for host in hosts:
        host.refuse_if_fused(wish)
    return hosts


def _switch(pipe: DiffusionPipeline, enabled: bool) -> list[Host | Control]:
    """Turn the pipeline's adapters on or off, controls with them; returns what was the other way."""
    switched = [each for each in _switches(pipe) if each.enabled != enabled]
    if switched:
        _changeable_hosts(pipe, "turn adapters on or off")
    for each in switched:
        each.enable(enabled)
    return switched


def _known(pipe: DiffusionPipeline, name: str) -> str:
    control = _control(pipe)
    places: list[Mapping[str, object]] = [host.adapters for host in _hosts(pipe).values()]
    places += [control.encoders] if control else []
    if not any(name in place for place in places):
        loaded = dict.fromkeys(known for place in places for known in place)
        raise ValueError(f"no adapter {name!r} is loaded; there are: {', '.join(loaded) or 'none'}")
    return name


def _info(name: str, hosts: dict[str, Host], control: Control | None) -> AdapterInfo:
    found: dict[str, Adapter] = {component: host.adapters[name] for component, host in hosts.items()}
    encoder = control.encoders.get(name) if control else None
    acts = control is not None and name in control.active
    strength = max([host.strengths.get(name, 0.0) for host in hosts.values()] or [float(acts)])
    switches: list[Host | Control] = [*hosts.values(), *([control] if control and encoder else [])]
    return AdapterInfo(
        components=(*found, *([CONTROL] if encoder else [])),
        configs={component: adapter.config for component, adapter in found.items()},
        num_parameters=sum(adapter.num_parameters() for adapter in found.values())
        + (sum(parameter.numel() for parameter in encoder.parameters()) if encoder else 0),
        active=strength != 0 and all(each.enabled for each in switches),
        strength=strength,
        fused=any(host.fused and host.strengths.get(name, 0.0) != 0.0 for host in hosts.values()),
        control=encoder is not None,
    )
