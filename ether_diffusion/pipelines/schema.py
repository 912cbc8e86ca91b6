"""What an adapter file must look like (docs/format.md), checked before any tensor is read or made."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.layout import INPUT_PARTS, OUTPUT_PARTS, Layout
from ether_diffusion.families.parts import DENOISERS, TEXT_ENCODERS
from ether_diffusion.reading import check_regular, parse_json, shown

FORMAT_VERSIONS = ("1", "2", "3")
"""3 where a placeholder token belongs to the adapter; 2 where vectors belong to parts of a fused Linear; else 1, which
0.1 reads as well."""
VECTOR_PARTS = {
    **dict.fromkeys(("u", "v", "anchor", "blocks"), INPUT_PARTS),
    **dict.fromkeys(("u_out", "v_out"), OUTPUT_PARTS),
}
"""From the names of vectors to the parts of a fused Linear that they may belong to."""
COMPONENTS = (*DENOISERS, "controlnet", *TEXT_ENCODERS)
CONTROL = "control_encoder"
"""First part of the keys of a control encoder, and its key in the metadata."""
EMBEDS = "learned_embeds"
"""Key in the metadata of the placeholder token whose embeddings are in a file beside."""
HEADER_LIMIT = 16 * 2**20
"""Bytes of a header; one that names every projection of SDXL has half a megabyte."""
NAME_LIMIT = 512
"""Characters of a key, a name or a pattern."""
PATTERN_LIMIT = 4096
"""Patterns of an adapter; SDXL has some 800 projections."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name of a LoRA that diffusers looks for in a folder, or on the Hub."""
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per number of the dtypes that vectors may have. What we write is F32."""


class SchemaError(ValueError):
    """What is wrong with a file; the message goes on after the file's name."""


class TensorHeader(NamedTuple):
    """One tensor as the header of a safetensors file describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ControlSettings:
    """The shape of a control encoder, see :class:`ether_diffusion.pipelines.control_encoder.ControlEncoderConfig`."""

    out_channels: int
    channels: tuple[int, ...]
    condition: str
    kind: str | None = None
    classes: tuple[str, ...] | None = None
    thresholds: tuple[int, int] | None = None


@dataclass(frozen=True)
class EmbedsSettings:
    """The placeholder token of an adapter: its text encoders, and the hash of its embeddings, which are in a file."""

    placeholder_token: str
    components: tuple[str, ...]
    hash: str


@dataclass(frozen=True)
class Description:
    """All that a file says of itself.

    Attributes:
        tensors: header of every tensor by key.
        configs: the adapter's settings for every component.
        base_model: name of the base, "" if unknown.
        base_hash: of every component, where it could be read.
        control: the control encoder's settings, None where there is none.
        embeds: the placeholder token, None where there is none.
    """

    tensors: dict[str, TensorHeader]
    configs: dict[str, EtherConfig]
    base_model: str
    base_hash: dict[str, str]
    control: ControlSettings | None
    embeds: EmbedsSettings | None = None


def describe(path: Path) -> Description:
    """Read and check the header of an adapter file.

    Raises:
        SchemaError: the file is damaged, or is no adapter file of this format.
        OSError: the file cannot be read, or is a pipe or a device.
    """
    header, data_size = read_header(path)
    metadata = header.pop("__metadata__", {})
    tensors = tensor_headers(header, data_size)
    _require(isinstance(metadata, dict), "has broken metadata: they are no table")
    for key, value in metadata.items():
        _require(isinstance(value, str), f"has broken metadata: {shown(key)} is {shown(value)}, no text")
    found = metadata.get("format_version")
    if found is None and (lora := _lora(tensors, metadata)):
        raise SchemaError(lora)
    if found not in FORMAT_VERSIONS:
        why = f"but of format {found[:40]}: update ether-diffusion" if found else "(it has no format_version)"
        raise SchemaError(f"is no ETHER adapter of format {FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]} {why}")
    configs = _configs(metadata)
    control, embeds = _control(metadata.get(CONTROL)), _embeds(metadata.get(EMBEDS))
    fits = (embeds is not None) == (found == FORMAT_VERSIONS[2])
    _require(fits, f"has broken metadata: format {found} and {EMBEDS} do not go together")
    if not (configs or control) or not set(configs) <= set(COMPONENTS):
        raise SchemaError(
            f"has vectors for {', '.join(sorted(configs)) or 'nothing'}; "
            f"the components that an adapter can have are {', '.join(COMPONENTS)}"
        )
    _check_keys(tensors, configs, control is not None, found)
    base_model = metadata.get("base_model", "")
    _require(len(base_model) <= 4096, "has broken metadata: base_model has more than 4096 characters")
    based_on = {*configs, *(DENOISERS if control else []), *(embeds.components if embeds else [])}
    return Description(tensors, configs, base_model, _base_hash(metadata, based_on), control, embeds)


LORA_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".lora.down.weight")
ORIGIN = "ether_export"
"""Key of the JSON in the header of a LoRA file that was made from adapters of this library."""


def is_lora(path: Path) -> bool:
    """Whether the keys of a safetensors file are those of a LoRA.

    Raises:
        SchemaError: the file is damaged.
        OSError: the file cannot be read, or is a pipe or a device.
    """
    header, _ = read_header(path)
    return any(key.endswith(LORA_ENDS) for key in header)


def _lora(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    """That a file is a LoRA, from which adapter it was made, and which call loads it; None where it is none."""
    if not any(key.endswith(LORA_ENDS) for key in tensors):
        return None
    made = ""
    try:
        origin = json.loads(metadata.get(ORIGIN, "null"))
        names = ", ".join(f"{name} ({each['sha256'][:12]})" for name, each in origin["adapters"].items())
        made = f", made by ether.export_lora from {shown(names)} on {shown(origin['base_model']) or 'its base'}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return f"is a LoRA{made}, not an ETHER adapter: pipe.load_lora_weights loads it"


def vector_shapes(config: EtherConfig, inputs: Layout | int, outputs: Layout | int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the vectors of one projection; ``n_blocks`` divides the width of every part.

    Args:
        config: the adapter's settings.
        inputs: the layout of the input side, or the number of features of a whole one.
        outputs: likewise of the output side.
    """
    n = config.n_blocks
    found: dict[str, tuple[int, ...]] = {}
    sides = {"blocks": inputs} if config.method == "naive" else {"u": inputs}
    if config.method == "anchored":
        sides["anchor"] = inputs
    if config.is_relaxed:
        sides |= {"v": inputs} | ({"u_out": outputs, "v_out": outputs} if config.two_sided else {})
    for vector, side in sides.items():
        for part in Layout.of(side).parts:
            width = part.width // n
            found[part.key(vector)] = (n, width, width) if vector == "blocks" else (n, width)
    return found


def format_version(keys: Iterable[str], embeds: bool = False) -> str:
    """The version of a file with these keys, and with or without a placeholder token."""
    if embeds:
        return FORMAT_VERSIONS[2]
    parts = {f"{vector}.{part}" for vector, names in VECTOR_PARTS.items() for part in names}
    return FORMAT_VERSIONS[any(_last(key, 2) in parts for key in keys)]


def _last(key: str, number: int) -> str:
    """The last names of a key."""
    return ".".join(key.split(".")[-number:])


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as it stands, and how many bytes follow it."""
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise _damaged(f"a header of {length} bytes in a file of {size}")
        if length > HEADER_LIMIT:
            raise SchemaError(f"has a header of {length:,} bytes; that of an adapter has at most {HEADER_LIMIT:,}")
        content = file.read(length)
    try:
        header = parse_json(content)
    except ValueError as error:
        raise _damaged(str(error)[:200]) from error
    if not isinstance(header, dict):
        raise _damaged(f"its header is {shown(header)}, no table")
    return header, size - 8 - length


def tensor_headers(header: Mapping[str, Any], data_size: int) -> dict[str, TensorHeader]:
    """Check types, dtypes and sizes; the tensors must fill the file without gap or overlap."""
    tensors, places = {}, []
    for key, entry in header.items():
        what = f"{shown(key)} in the header"
        if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
            raise _damaged(f"{what} is no tensor")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (_is_list_of(shape, _is_size) and len(shape) <= 8 and _is_list_of(offsets, _is_size)):
            raise _damaged(f"{what} has no shape, or no place in the file")
        if not isinstance(dtype, str):
            raise _damaged(f"{what} has no dtype")
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
            raise _damaged(f"{what} lies outside of the file's {data_size} bytes")
        if dtype in ITEM_SIZES and math.prod(shape) * ITEM_SIZES[dtype] != offsets[1] - offsets[0]:
            raise _damaged(f"{what} has another size than its shape says")
        tensors[key] = TensorHeader(dtype, tuple(shape))
        places.append((offsets[0], offsets[1]))
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise _damaged("its tensors overlap, or leave gaps")
        end = last
    if end != data_size:
        raise _damaged(f"{data_size - end} bytes at the end belong to no tensor")
    return tensors


def _configs(metadata: Mapping[str, str]) -> dict[str, EtherConfig]:
    configs = {}
    for component, values in table(metadata, "ether_config").items():
        if component not in COMPONENTS:
            values = {}  # named by the caller, with all others
        where = f"has broken metadata: ether_config of {component}"
        _require(isinstance(values, dict), f"{where} is {shown(values)}, no table")
        for key, value in values.items():
            if key in SETTINGS:
                is_valid, words = SETTINGS[key]
                _require(is_valid(value), f"{where}: {key} is {shown(value)}, {words} is expected")
        try:
            configs[component[:NAME_LIMIT]] = EtherConfig.from_dict(values)
        except ValueError as error:
            raise SchemaError(f"{where}: {str(error)[:400]}") from error
    return configs


def _control(settings: str | None) -> ControlSettings | None:
    if settings is None:
        return None
    values = table({CONTROL: settings}, CONTROL)
    for key, (is_valid, words) in CONTROL_SETTINGS.items():
        value = values.get(key)
        where = f"has broken metadata: {CONTROL}"
        _require(is_valid(value), f"{where}: {key} is {shown(value)}, {words} is expected")
    optional = {key: values[key] for key in EXPECTED if values.get(key) is not None}
    for key, value in optional.items():
        is_valid, words = EXPECTED[key]
        where = f"has broken metadata: {CONTROL}"
        _require(is_valid(value), f"{where}: {key} is {shown(value)}, {words} is expected")
    more: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in optional.items()}
    return ControlSettings(values["out_channels"], tuple(values["channels"]), values["condition"], **more)


def _embeds(settings: str | None) -> EmbedsSettings | None:
    if settings is None:
        return None
    values = table({EMBEDS: settings}, EMBEDS)
    for key, (is_valid, words) in EMBEDS_SETTINGS.items():
        value = values.get(key)
        _require(is_valid(value), f"has broken metadata: {EMBEDS}: {key} is {shown(value)}, {words} is expected")
    return EmbedsSettings(values["placeholder_token"], tuple(values["components"]), values["hash"])


def _base_hash(metadata: Mapping[str, str], based_on: set[str]) -> dict[str, str]:
    values = table(metadata, "base_hash") if metadata.get("base_hash") else {}
    for component, value in values.items():
        where = f"has broken metadata: base_hash of {shown(component)}"
        _require(component in based_on, f"{where}, which the file has no vectors for")
        _require(_is_hash(value), f"{where} is {shown(value)}, 16 hexadecimal digits are expected")
    return values


def _check_keys(
    tensors: Mapping[str, TensorHeader], configs: Mapping[str, EtherConfig], control: bool, version: str
) -> None:
    """Every key belongs to a component that the config names, and is one of its method's vectors."""
    fused = [Layout.side_by_side(dict.fromkeys(names, 1)) for names in (INPUT_PARTS, OUTPUT_PARTS)]
    vectors, endings = {}, {}
    for component, config in configs.items():
        vectors[component] = {name: len(shape) for name, shape in vector_shapes(config, 1, 1).items()}
        parts = vector_shapes(config, *fused) if version != "1" else {}
        endings[component] = vectors[component] | {name: len(shape) for name, shape in parts.items()}
    for key, tensor in tensors.items():
        _require(len(key) <= NAME_LIMIT and key.isprintable(), f"holds a key that is no module path: {shown(key)}")
        component, _, rest = key.partition(".")
        if component not in configs and not (control and component == CONTROL):
            known = ", ".join([*configs, *([CONTROL] if control else [])])
            raise SchemaError(f"holds the key {key}, but its config names only {known}")
        if tensor.dtype not in ITEM_SIZES:
            known = ", ".join(ITEM_SIZES)
            raise SchemaError(f"holds {key} in {shown(tensor.dtype)}; the dtypes of a vector are {known}")
        if component in configs:
            of_method = endings[component]
            ending = next((_last(rest, number) for number in (2, 1) if _last(rest, number) in of_method), None)
            if ending is None or rest == ending:
                method, known = configs[component].method, ", ".join(vectors[component])
                of_parts = f", or of parts such as {next(reversed(of_method))}" if version != "1" else ""
                raise SchemaError(f"holds the key {key}; the vectors of {method} are {known}{of_parts}")
            if len(tensor.shape) != of_method[ending] or 0 in tensor.shape:
                raise SchemaError(f"holds {key} of shape {tensor.shape}; it has {of_method[ending]} dimensions")


def table(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The table that the metadata hold as JSON text under ``key``."""
    _require(key in metadata, f"has broken metadata: there is no {key}")
    try:
        values = parse_json(metadata[key])
    except ValueError as error:
        raise SchemaError(f"has broken metadata: {key}: {str(error)[:200]}") from error
    _require(isinstance(values, dict), f"has broken metadata: {key} is {shown(values)}, no table")
    found: dict[str, Any] = values
    return found


def _require(fulfilled: bool, otherwise: str) -> None:
    if not fulfilled:
        raise SchemaError(otherwise)


def _damaged(why: str) -> SchemaError:
    return SchemaError(f"cannot be read as safetensors; it is damaged or cut off ({why})")


def _is_count(value: object) -> bool:
    """Whether it is a whole number; the range is the config's own to check."""
    return isinstance(value, int) and not isinstance(value, bool) and value < 2**31


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_width(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**16


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= NAME_LIMIT


def _is_list_of(value: object, is_valid: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


def _is_pattern(value: object) -> bool:
    if not isinstance(value, str) or len(value) > NAME_LIMIT:
        return False
    try:
        fnmatchcase("", value)
    except re.error:  # a range such as [z-a], in some versions of Python
        return False
    return True


def _is_targets(value: object) -> bool:
    return _is_name(value) or (
        isinstance(value, list) and len(value) <= PATTERN_LIMIT and _is_list_of(value, _is_pattern)
    )


def _is_seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


Check = tuple[Callable[[object], bool], str]

SETTINGS: dict[str, Check] = {
    "method": (_is_name, "a name"),
    "n_blocks": (_is_count, "a whole number"),
    "two_sided": (lambda value: isinstance(value, bool), "true or false"),
    "targets": (_is_targets, f"a preset or a list of at most {PATTERN_LIMIT} patterns"),
    "seed": (_is_seed, "a whole number of 64 bits"),
}
KINDS = ("image", "map", "canny", "segmentation")
"""How the conditions of a training came to be, as ``--condition`` of train_controlnet.py names them."""
EXPECTED: dict[str, Check] = {
    "kind": (lambda value: value in KINDS, " or ".join(f'"{kind}"' for kind in KINDS)),
    "classes": (
        lambda value: isinstance(value, list) and 1 <= len(value) <= PATTERN_LIMIT and _is_list_of(value, _is_name),
        f"a list of up to {PATTERN_LIMIT} names",
    ),
    "thresholds": (
        lambda value: isinstance(value, list) and len(value) == 2 and _is_list_of(value, _is_size),
        "a list of two whole numbers",
    ),
}
"""What a control expects; files of 0.1 do not say it."""
CONTROL_SETTINGS: dict[str, Check] = {
    "out_channels": (_is_width, "a number of channels"),
    "channels": (
        lambda value: isinstance(value, list) and 1 <= len(value) <= 16 and _is_list_of(value, _is_width),
        "a list of up to 16 numbers of channels",
    ),
    "condition": (lambda value: value in ("image", "map"), '"image" or "map"'),
}
EMBEDS_SETTINGS: dict[str, Check] = {
    "placeholder_token": (_is_name, "a token"),
    "components": (
        lambda value: (
            isinstance(value, list) and bool(value) and _is_list_of(value, lambda each: each in TEXT_ENCODERS)
        ),
        "a list of text encoders",
    ),
    "hash": (_is_hash, "16 hexadecimal digits"),
}
