"""What is loaded in a pipeline: which adapters, where, active at which strength."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.host import Host, host_of
from ether_diffusion.families.parts import denoiser_name
from ether_diffusion.pipelines.control_hook import Control, control_of
from ether_diffusion.pipelines.learned_embeds import LearnedEmbeds
from ether_diffusion.pipelines.new_tokens import new_tokens
from ether_diffusion.pipelines.schema import COMPONENTS, CONTROL

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class AdapterInfo:
    """What :func:`adapters` tells of one adapter.

    Attributes:
        components: the pipeline's components that it is attached to.
        configs: its settings there.
        num_parameters: trained scalars in all components, embeddings of a placeholder token among them.
        active: whether it acts on the next image.
        strength: s of W + s ΔW; 0 while it is not set.
        fused: whether it is folded into the weights.
        control: whether it has a control encoder, which needs a control image: see :func:`controlled`.
        placeholder_token: the new token that came with it, None where there is none.
    """

    components: tuple[str, ...]
    configs: dict[str, EtherConfig]
    num_parameters: int
    active: bool
    strength: float
    fused: bool
    control: bool = False
    placeholder_token: str | None = None


def adapters(pipe: DiffusionPipeline) -> dict[str, AdapterInfo]:
    """What is loaded in the pipeline, by name: components, settings, parameters, whether active, strength, fused."""
    hosts, control = hosts_of(pipe), control_in(pipe)
    names = dict.fromkeys(name for host in hosts.values() for name in host.adapters)
    names |= dict.fromkeys(control.encoders if control else ())
    tokens = new_tokens(pipe)
    return {
        name: _info(name, {c: host for c, host in hosts.items() if name in host.adapters}, control, tokens.get(name))
        for name in names
    }


def hosts_of(pipe: DiffusionPipeline) -> dict[str, Host]:
    """The hosts of the pipeline's components that have adapters, by component."""
    found = {component: getattr(pipe, component, None) for component in COMPONENTS}
    hosts = {c: host_of(module) for c, module in found.items() if isinstance(module, nn.Module)}
    return {component: host for component, host in hosts.items() if host is not None}


def control_in(pipe: DiffusionPipeline) -> Control | None:
    """The control encoders of the pipeline's denoiser."""
    name = denoiser_name(pipe)
    return None if name is None else control_of(getattr(pipe, name))


def switches_of(pipe: DiffusionPipeline) -> list[Host | Control]:
    """All that can be turned on and off."""
    control = control_in(pipe)
    return [*hosts_of(pipe).values(), *([control] if control else [])]


def is_enabled(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's adapters act, those that are active."""
    return all(each.enabled for each in switches_of(pipe))


def changeable_hosts(pipe: DiffusionPipeline, wish: str) -> list[Host]:
    """The pipeline's hosts, after making sure that none of them is fused: a verb changes all of them or none."""
    hosts = list(hosts_of(pipe).values())
    for host in hosts:
        host.refuse_if_fused(wish)
    return hosts


def known_name(pipe: DiffusionPipeline, name: str) -> str:
    """The name, if there is such an adapter or control encoder in the pipeline.

    Raises:
        ValueError: there is none.
    """
    control = control_in(pipe)
    places: list[Mapping[str, object]] = [host.adapters for host in hosts_of(pipe).values()]
    places += [control.encoders] if control else []
    if not any(name in place for place in places):
        loaded = dict.fromkeys(known for place in places for known in place)
        raise ValueError(f"no adapter {name!r} is loaded; there are: {', '.join(loaded) or 'none'}")
    return name


def _info(name: str, hosts: dict[str, Host], control: Control | None, embeds: LearnedEmbeds | None) -> AdapterInfo:
    found: dict[str, Adapter] = {component: host.adapters[name] for component, host in hosts.items()}
    encoder = control.encoders.get(name) if control else None
    acts = control is not None and name in control.active
    strength = max([host.strengths.get(name, 0.0) for host in hosts.values()] or [float(acts)])
    switches: list[Host | Control] = [*hosts.values(), *([control] if control and encoder else [])]
    return AdapterInfo(
        components=(*found, *([CONTROL] if encoder else [])),
        configs={component: adapter.config for component, adapter in found.items()},
        num_parameters=sum(adapter.num_parameters() for adapter in found.values())
        + (sum(parameter.numel() for parameter in encoder.parameters()) if encoder else 0)
        + (sum(rows.numel() for rows in embeds.rows.values()) if embeds else 0),
        active=strength != 0 and all(each.enabled for each in switches),
        strength=strength,
        fused=any(host.fused and host.strengths.get(name, 0.0) != 0.0 for host in hosts.values()),
        control=encoder is not None,
        placeholder_token=None if embeds is None else embeds.token,
    )
