"""The verbs on a diffusers pipeline: load, save, set_adapters, enable, disable, fuse, unfuse, unload."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.host import Host, attach_made
from ether_diffusion.core.plan import check_mixable
from ether_diffusion.families.parts import DENOISERS, denoiser_name, denoiser_of
from ether_diffusion.families.registry import control_place
from ether_diffusion.pipelines.control_hook import Control, attach_control, first_layer
from ether_diffusion.pipelines.file import AdapterFile, Hub, public_name
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.pipelines.fitting import fit, warn_if_other_base
from ether_diffusion.pipelines.loaded import (
    adapters,
    changeable_hosts,
    control_in,
    hosts_of,
    is_enabled,
    known_name,
    switches_of,
)
from ether_diffusion.pipelines.new_tokens import add_new_token, new_tokens, remove_new_token

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


def load(
    pipe: DiffusionPipeline,
    source: str | Path,
    name: str = "default",
    strength: float = 1.0,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> None:
    """Load an adapter into a pipeline and make it active, besides those that are active already.

    While each sample has an adapter of its own (``set_adapters(pipe, per_sample=…)``), the new one is loaded but does
    not act, whatever its strength.

    A control encoder that was trained with the adapter is loaded with it; images are then drawn with
    :class:`ether_diffusion.StableDiffusionControlPipeline` or within :func:`ether_diffusion.controlled`.

    A placeholder token that was trained with the adapter is loaded with it, from the ``learned_embeds.safetensors``
    beside the adapter: the tokenizers and text encoders know it until the adapter is unloaded. It acts on prompts that
    have it, whatever the adapter's strength, and after :func:`disable`, too.

    Everything is checked before anything is attached: unknown or missing keys, shapes, values, components.

    Args:
        pipe: any diffusers pipeline with the components that the adapter was trained on: text to image, img2img,
            inpaint, ControlNet, of every family in docs/families.md.
        source: run folder, ``.safetensors`` file, or Hub id.
        name: name to give it in this pipeline.
        strength: s of W + s ΔW; 1 is what was trained.
        revision: branch, tag or commit of the repository on the Hub.
        subfolder: of the repository or folder, in which the adapter is.
        token: of the Hub, for private and gated repositories; True for the stored one, which is also the default.
        cache_dir: folder of downloads, in place of the Hub's own.
        local_files_only: take what was downloaded before, and ask nobody.

    Raises:
        FileNotFoundError: there is no such adapter, or the embeddings of its placeholder token are not beside it.
        AdapterFileError: the file is damaged or does not fit this pipeline; the pipeline is as before.
        ValueError: the name is taken, the strength is not finite, or a revision is given for a path; the pipeline is
            as before.
        RuntimeError: adapters are fused into the pipeline's weights.
    """
    if not math.isfinite(strength):
        raise ValueError(f"the strength of {name!r} must be a finite number, not {strength}")
    hub = Hub(revision, subfolder, token, cache_dir, local_files_only)
    file = AdapterFile.read(source, hub)
    fitted = fit(pipe, file, source, name)
    if name in adapters(pipe):
        raise ValueError(f"an adapter {name!r} is loaded already: unload it, or pass another name")
    changeable_hosts(pipe, "load another adapter")
    switches, enabled = switches_of(pipe), is_enabled(pipe)
    sampled = any(host.per_sample is not None for host in hosts_of(pipe).values())
    warn_if_other_base(pipe, file, source)
    attached: list[Adapter] = []
    try:
        for component, (adapter, targets) in fitted.items():
            attached.append(attach_made(getattr(pipe, component), adapter, targets))
        if file.control is not None:
            denoiser = denoiser_of(pipe)
            place, _ = control_place(pipe)
            device = first_layer(denoiser, place).weight.device
            encoder = file.control if device.type == "meta" else file.control.to(device)
            attach_control(denoiser, encoder.requires_grad_(False), name, place)
        if file.embeds is not None:
            for rows in add_new_token(pipe, name, file.embeds).values():
                rows.requires_grad_(False)
    except BaseException:  # an interrupt, too, leaves the pipeline as before
        for adapter in attached:
            adapter.detach()
        if (control := control_in(pipe)) and name in control.encoders:
            control.remove(name)
        raise
    for each in switches_of(pipe):
        if each not in switches:
            each.enable(enabled)  # components that had no adapter so far join the others
    if sampled:
        _leave_samples(pipe, name)
    elif strength != 1.0:
        _set_strength(pipe, name, strength)


def _set_strength(pipe: DiffusionPipeline, name: str, strength: float) -> None:
    """Change the strength of one adapter that acts, and of no other."""
    for host in hosts_of(pipe).values():
        if name in host.adapters:
            host.set_active({**host.strengths, name: strength})
    if (control := control_in(pipe)) and not strength:
        control.active.discard(name)


def _leave_samples(pipe: DiffusionPipeline, name: str) -> None:
    """Keep an adapter that was just loaded from acting, since each sample has an adapter of its own."""
    for host in hosts_of(pipe).values():
        if name in host.adapters and host.per_sample is None:
            host.set_active({n: s for n, s in host.strengths.items() if n != name})
    if control := control_in(pipe):
        control.active.discard(name)
    logger.warning("%r is loaded but does not act: each sample has an adapter of its own; call set_adapters", name)


def save(pipe: DiffusionPipeline, path: str | Path, name: str | None = None) -> Path:
    """Save an adapter of the pipeline, all components in one file, and return the file's path.

    The embeddings of its placeholder token, if it has one, are saved beside it in ``learned_embeds.safetensors``.

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
    return adapter_file(pipe, known_name(pipe, name)).write(path)


def adapter_file(pipe: DiffusionPipeline, name: str, base_model: str | None = None) -> AdapterFile:
    """The file content for adapter ``name``; ``base_model`` defaults to where the pipeline came from.

    Of a path on this machine the last part is told.
    """
    found = {c: host.adapters[name] for c, host in hosts_of(pipe).items() if name in host.adapters}
    control = control_in(pipe)
    encoder = control.encoders.get(name) if control else None
    controlled = [part for part in DENOISERS if encoder and part == denoiser_name(pipe)]
    embeds = new_tokens(pipe).get(name)
    based_on = dict.fromkeys([*found, *controlled, *(embeds.rows if embeds else ())])
    hashes = {component: base_hash(getattr(pipe, component)) for component in based_on}
    return AdapterFile(
        states={component: adapter.state_dict() for component, adapter in found.items()},
        configs={component: adapter.config for component, adapter in found.items()},
        base_model=public_name(base_model if base_model is not None else str(pipe.config.get("_name_or_path") or "")),
        base_hash={component: value for component, value in hashes.items() if value is not None},
        control=encoder,
        embeds=embeds,
    )


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
    chosen = {known_name(pipe, name): strength for name, strength in zip(names, strengths, strict=True)}
    if infinite := [name for name, strength in chosen.items() if not math.isfinite(strength)]:
        raise ValueError(f"strengths must be finite numbers; that of {infinite[0]!r} is {chosen[infinite[0]]}")
    for host in changeable_hosts(pipe, "change which adapters are active"):
        host.set_active({name: strength for name, strength in chosen.items() if name in host.adapters})
    if control := control_in(pipe):
        control.active = {name for name, strength in chosen.items() if strength and name in control.encoders}


def _set_per_sample(pipe: DiffusionPipeline, names: list[str | None], images_per_prompt: int) -> None:
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, not {images_per_prompt}")
    changeable_hosts(pipe, "change which adapters are active")
    known = {name: known_name(pipe, name) for name in names if name is not None}
    if (control := control_in(pipe)) and (controlled := [name for name in known if name in control.encoders]):
        raise ValueError(f"{controlled[0]!r} has a control, which acts on a whole batch and not on single samples")
    chosen = {
        component: [name if name is not None and name in host.adapters else None for name in names]
        for component, host in hosts_of(pipe).items()
    }
    for host in hosts_of(pipe).values():
        check_mixable({name: host.adapters[name] for name in known if name in host.adapters})
    for component, host in hosts_of(pipe).items():
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
    hosts = [host for host in hosts_of(pipe).values() if host.enabled and any(host.strengths.values())]
    if not hosts:
        raise ValueError("there is no active adapter to fuse: load one, or call set_adapters or enable")
    done: list[Host] = []
    try:
        for host in hosts:
            host.fuse()
            done.append(host)
    except BaseException:  # an interrupt, too, leaves the pipeline as before
        for host in done:
            host.unfuse()
        raise


def unfuse(pipe: DiffusionPipeline, force: bool = False) -> None:
    """Restore the base weights bit for bit; the adapters act unfused again. Does nothing if none is fused.

    Args:
        pipe: the pipeline.
        force: restore them even where something else, such as a LoRA, has changed them since; its change is lost.

    Raises:
        RuntimeError: something else has changed a weight since; the pipeline is as before.
        ValueError: a weight is offloaded; the pipeline is as before.
    """
    hosts = [host for host in hosts_of(pipe).values() if host.fused]
    for host in hosts:
        host.check_unfuse(force)
    for host in hosts:
        host.unfuse(force=True)


def unload(pipe: DiffusionPipeline, name: str | None = None) -> None:
    """Remove an adapter, or all of them, and its placeholder token; the last one leaves no trace in the pipeline.

    Raises:
        ValueError: there is no such adapter.
        RuntimeError: adapters are fused, or other tokens were added to a tokenizer since; the pipeline is as before.
    """
    for chosen in [known_name(pipe, name)] if name is not None else list(adapters(pipe)):
        hosts = changeable_hosts(pipe, f"unload {chosen!r}")
        remove_new_token(pipe, chosen)
        if any(host.per_sample is not None and chosen in host.per_sample.adapters for host in hosts):
            for host in hosts:  # no sample goes on with another adapter, in no component
                host.set_active({})
        for host in hosts:
            if chosen in host.adapters:
                host.remove(chosen)
        if (control := control_in(pipe)) and chosen in control.encoders:
            control.remove(chosen)


def _switch(pipe: DiffusionPipeline, enabled: bool) -> list[Host | Control]:
    """Turn the pipeline's adapters on or off, controls with them; returns what was the other way."""
    switched = [each for each in switches_of(pipe) if each.enabled != enabled]
    if switched:
        changeable_hosts(pipe, "turn adapters on or off")
    for each in switched:
        each.enable(enabled)
    return switched
