"""Our adapter file and PEFT's folder, each made from the other; the numbers are the same bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import delete_adapter
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.state import StateMismatchError
from ether_diffusion.core.targets import ONE_SIDED_GEGLU, canonical
from ether_diffusion.families.parts import TEXT_ENCODERS
from ether_diffusion.files import atomic_path
from ether_diffusion.peft_tuner.config import VARIANTS, EtherPeftConfig
from ether_diffusion.peft_tuner.model import NESTED
from ether_diffusion.peft_tuner.registration import NAME, PREFIX
from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.pipelines.learned_embeds import LEARNED_EMBEDS
from ether_diffusion.pipelines.schema import COMPONENTS, VECTOR_PARTS, vector_shapes
from ether_diffusion.reading import check_regular, parse_json

logger = logging.getLogger(__name__)

PEFT_ROOT = "base_model.model."
"""What PEFT's keys begin with."""
METHODS = ".ether_methods."
"""Between a projection's path and its vector's name."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def to_peft(source: str | Path, folder: str | Path) -> dict[str, Path]:
    """Write an adapter of ``ether.save`` as folders that ``PeftModel.from_pretrained`` loads.

    A new token that was trained with it is left out, with a warning.

    Args:
        source: a folder, a file, or a repository of the Hugging Face Hub.
        folder: where to write: into itself if the adapter has one component, else into a folder for each, by name.

    Returns:
        The folder of each component.

    Raises:
        FileNotFoundError: there is nothing under ``source``.
        ValueError: the adapter is Naive's, or has a control encoder; or its file is damaged.
    """
    file = AdapterFile.read(source)
    if file.control is not None:
        raise ValueError(f"{source} has a control encoder, which a PEFT folder cannot hold")
    for component, config in file.configs.items():
        if config.method not in VARIANTS:
            raise ValueError(f"{component} of {source} is of {config.method}; the tuner has {', '.join(VARIANTS)}")
    settings = {component: _settings(component, file) for component in file.configs}
    if file.embeds is not None:
        logger.warning(
            "the new token %s is not in the PEFT folder: its embeddings are in %s beside the adapter",
            file.embeds.token,
            LEARNED_EMBEDS,
        )
    places = {name: Path(folder) / name if len(file.configs) > 1 else Path(folder) for name in file.configs}
    for component, place in places.items():
        state = file.states[component]
        place.mkdir(parents=True, exist_ok=True)
        tensors = {PEFT_ROOT + _peft_key(key): value.float().contiguous() for key, value in state.items()}
        with atomic_path(place / WEIGHTS) as temporary:
            temporary.write_bytes(serialize(tensors, metadata={"format": "pt"}))
        settings[component].save_pretrained(str(place))
    return places


def from_peft(folders: Mapping[str, str | Path], path: str | Path) -> Path:
    """Write ETHER folders of PEFT as the adapter file that ``ether.load`` reads.

    Args:
        folders: for each component of the pipeline ("unet", "transformer", "text_encoder", …) its folder.
        path: a folder, which gets the file's standard name, or a name that ends in .safetensors.

    Returns:
        The file.

    Raises:
        FileNotFoundError: a folder has no ``adapter_config.json`` or ``adapter_model.safetensors``.
        ValueError: a folder is of another type, is damaged, or has what no adapter file holds, such as
            ``modules_to_save``; or a component is unknown.
    """
    if not folders:
        raise ValueError('no folder is given: name one for each component, such as {"unet": "runs/peft-dog"}')
    if unknown := sorted(set(folders) - set(COMPONENTS)):
        raise ValueError(f"unknown component {unknown[0]!r}; there are: {', '.join(COMPONENTS)}")
    states, configs, names, hashes = {}, {}, set(), {}
    for component, folder in folders.items():
        settings = _read_settings(Path(folder))
        states[component] = _read_state(Path(folder), component, settings)
        origin = settings.origin or {}
        configs[component] = _ether_config(settings, states[component])
        names.add(origin.get("base_model") or settings.base_model_name_or_path or "")
        if origin.get("base_hash"):
            hashes[component] = origin["base_hash"]
    base_model = names.pop() if len(names) == 1 else ""
    return AdapterFile(states, configs, base_model, hashes).write(path)


def save(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Write an adapter of a model that is no ``PeftModel``, after ``unet.add_adapter`` or ``inject_adapter_in_model``.

    Args:
        model: a model of diffusers or transformers, or any with injected layers.
        folder: what :func:`load`, ``PeftModel.from_pretrained`` and :func:`from_peft` read.
        adapter_name: which adapter.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no ETHER adapter of this name.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, EtherPeftConfig):
        raise ValueError(f"{type(model).__name__} has no ETHER adapter {adapter_name!r}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    keys = {key: PEFT_ROOT + key.removeprefix(PEFT_ROOT) for key in state}
    tensors = {keys[key]: value.detach().cpu().contiguous() for key, value in state.items()}
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with atomic_path(place / WEIGHTS) as temporary:
        temporary.write_bytes(serialize(tensors, metadata={"format": "pt"}))
    settings = copy(config)
    settings.inference_mode = True
    settings.save_pretrained(str(place))
    return place


def load(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Put the adapter of a folder on a model of diffusers or transformers, or any other, and make it active.

    Args:
        model: which is no ``PeftModel``; that has ``load_adapter``.
        folder: of :func:`save`, :func:`to_peft` or ``PeftModel.save_pretrained``.
        adapter_name: by which it is set, scaled and deleted.

    Raises:
        FileNotFoundError: the folder has no settings or no weights.
        ValueError: it is of another type, or damaged; the name is taken, or the model is a ``PeftModel``.
        StateMismatchError: its vectors do not fit the model, which then is left without the adapter.
    """
    if isinstance(model, PeftModel):
        raise ValueError("this is a PeftModel: call model.load_adapter(folder, adapter_name)")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"an adapter {adapter_name!r} is there already: delete it first, or choose another name")
    config, tensors = _read_settings(Path(folder)), _read_tensors(Path(folder))
    if hasattr(model, "add_adapter"):
        model.add_adapter(config, adapter_name)  # type: ignore[operator]
    else:
        inject_adapter_in_model(config, model, adapter_name)
    try:
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    except StateMismatchError:
        delete_adapter(model, adapter_name, PREFIX)
        del model.peft_config[adapter_name]  # type: ignore[union-attr, operator]
        raise


def _peft_key(key: str) -> str:
    """``path.u`` to ``path.ether_methods.u``; of a part, ``path.u.q`` to ``path.ether_methods.u.q``."""
    *parents, last = key.split(".")
    of_part = last in VECTOR_PARTS.get(parents[-1], ())
    vectors = [parents.pop(), last] if of_part else [last]
    return ".".join(parents) + METHODS + ".".join(vectors)


def _settings(component: str, file: AdapterFile) -> EtherPeftConfig:
    """Of a component, with all that the file says of it.

    Raises:
        ValueError: the adapter has both sides of some projections and one of others, which the tuner's settings cannot
            say.
    """
    config = file.configs[component]
    if config.targets == ONE_SIDED_GEGLU and config.acts_on_outputs:
        raise ValueError(
            f'an adapter with targets="{ONE_SIDED_GEGLU}" is one-sided on some projections only, and the settings of '
            "PEFT's tuner have one two_sided for all: use the adapter file itself, by ether.load, or its exact LoRA, "
            "by ether export"
        )
    keys = [_peft_key(key) for key in file.states[component]]
    paths = sorted({key.partition(METHODS)[0] for key in keys})
    parts = {key.partition(METHODS)[2].partition(".")[2] for key in keys} - {""}
    origin: dict[str, Any] = {"component": component, "ether_config": config.to_dict(), "base_model": file.base_model}
    origin |= {"base_hash": (file.base_hash or {}).get(component, "")}
    return EtherPeftConfig(
        variant=config.method,
        n_blocks=config.n_blocks,
        two_sided=config.two_sided,
        target_modules=paths,
        exclude_parts=["mlp"] if parts and "mlp" not in parts else None,
        seed=config.seed,
        origin=origin,
        base_model_name_or_path=file.base_model or None,
        inference_mode=True,
    )


def _read_settings(folder: Path) -> EtherPeftConfig:
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {SETTINGS}: it is no folder of PEFT")
    check_regular(path)
    values = parse_json(path.read_bytes())
    if not isinstance(values, dict) or values.get("peft_type") != NAME:
        found = values.get("peft_type") if isinstance(values, dict) else None
        raise ValueError(f"{path} is of the type {found!r}, not {NAME}: only ETHER adapters have an adapter file")
    known = EtherPeftConfig.__dataclass_fields__
    return EtherPeftConfig(**{key: value for key, value in values.items() if key in known and key != "peft_type"})


def _read_state(folder: Path, component: str, settings: EtherPeftConfig) -> dict[str, Tensor]:
    """The vectors by canonical path."""
    path, tensors = folder / WEIGHTS, _read_tensors(folder)
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        place, found, vector = key.removeprefix(PEFT_ROOT).partition(METHODS)
        if not found:
            raise ValueError(f"{path} holds {key}, which is no vector of ETHER: an adapter file cannot hold it")
        place = canonical(place)
        state[f"{place.removeprefix(NESTED) if component in TEXT_ENCODERS else place}.{vector}"] = value
    _check(state, settings, path)
    return state


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; files that must be unpickled are not read")
    check_regular(path)
    try:
        found: dict[str, Tensor] = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors; it is damaged or cut off ({error})") from error
    return found


def _check(state: Mapping[str, Tensor], settings: EtherPeftConfig, path: Path) -> None:
    """Raise ValueError unless every projection has exactly the vectors of the settings, of one width a side."""
    expected = set(vector_shapes(settings.ether_config(), settings.n_blocks, settings.n_blocks))
    found: dict[str, set[str]] = {}
    for key, value in state.items():
        place, _, vectors = _peft_key(key).partition(METHODS)
        found.setdefault(place, set()).add(vectors.partition(".")[0])
        if value.ndim != 2 or len(value) != settings.n_blocks:
            raise ValueError(
                f"{path}: {key} is {tuple(value.shape)}; with n_blocks={settings.n_blocks} it has as many rows"
            )
    for place, given in found.items():
        if given != expected:
            raise ValueError(f"{path}: {place} has the vectors {sorted(given)}; its settings need {sorted(expected)}")


def _ether_config(settings: EtherPeftConfig, state: Mapping[str, Tensor]) -> EtherConfig:
    """The settings that the vectors came with, if they are still true; else those of exactly these projections."""
    paths = tuple(sorted({_peft_key(key).partition(METHODS)[0] for key in state}))
    stored = (settings.origin or {}).get("ether_config")
    if stored is not None:
        config = EtherConfig.from_dict(stored)
        known = (config.method, config.n_blocks, config.two_sided)
        if known == (settings.variant, settings.n_blocks, settings.two_sided):
            return config
    return settings.ether_config(paths)
