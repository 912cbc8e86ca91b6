"""A base in one file: a checkpoint with the names of the authors' own code, as most tools and sites have it.

The file has weights and no settings. A diffusers folder of the same architecture has the settings and tokenizers, and
the weights of those parts that the file has not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import nn

from ether_diffusion.families.parts import left_out
from ether_diffusion.families.protocol import Family
from ether_diffusion.families.registry import family_named
from ether_diffusion.logs import errors_only
from ether_diffusion.pipelines.file import SINGLE_FILE, first_line

logger = logging.getLogger(__name__)

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that would be unpickled, which runs what is in them."""
AUTOENCODER = ("first_stage_model.", "vae.")
UNET = "model.diffusion_model."
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
"""What the names of the parts beside the denoiser begin with."""
QUANTIZED = (".scale_weight", ".weight_scale", "scaled_fp8", ".absmax", ".quant_map")
"""Endings of names that stand beside weights which mean something only together with them."""
EDM = ("edm_mean", "edm_vpred.sigma_max")
VELOCITY = "v_pred"
"""Names in the files of models that were trained on other noise, or predict velocities."""
SMALL = 0.01
"""Share of a transformer's weights that diffusers may leave out, such as norms that act on nothing."""


class SingleFileError(ValueError):
    """A base in a single file that cannot be loaded; the message says what to do."""


@dataclass(frozen=True)
class Header:
    """What a file says without its weights being read.

    Attributes:
        sizes: numbers in every tensor, by its name.
        metadata: the header's own.
    """

    sizes: dict[str, int]
    metadata: dict[str, str]

    def has(self, *beginnings: str) -> bool:
        """Whether the name of a tensor begins with one of them."""
        return any(name.startswith(beginnings) for name in self.sizes)


def is_single_file(name: str) -> bool:
    """Whether a base's name means a file; of one that is not there, by its ending."""
    path = Path(name)
    return path.is_file() or (path.suffix in (SINGLE_FILE, *PICKLED) and not path.is_dir())


def load_single_file(
    file: str | Path,
    config: str | Path,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
) -> DiffusionPipeline:
    """Load a base of one file as a pipeline, from what is on this machine alone, without a safety checker.

    Args:
        file: safetensors, with the names of the authors' code: the whole base (SD 1.x and 2.x, SDXL, SD3), or the
            denoiser alone.
        config: a diffusers folder of the same architecture. Of the parts that the file has it needs no weights.
        dtype: of all parts, or by component with a ``default``.

    Raises:
        FileNotFoundError: ``file`` or ``config`` is not there.
        SingleFileError: it cannot be read, or is not what ``config`` describes.
    """
    file, config = Path(file), Path(config)
    header = read_header(file)
    index = _index(file, config)
    family = family_named(str(index.get("_class_name")))
    _refuse(file, header, config)
    dtypes = {"default": dtype} if isinstance(dtype, torch.dtype) else dict(dtype)
    absent = left_out(index, family.UNUSED)
    try:
        modules = dict(_modules(file, header, index, family, config, dtypes))
        inside = [part for part, place in family.SINGLE_FILE_TEXT.items() if header.has(place)]
        if header.has(*TEXT) and not inside:
            logger.warning("%s has text encoders, which diffusers does not read: those of %s are used", file, config)
        if inside:
            kind: Any = getattr(diffusers, str(index["_class_name"]))
            beside = [part for part in ("vae", *family.TEXT_ENCODERS) if part not in {*modules, *inside, *absent}]
            modules |= _from_folder(file, index, beside, config, dtypes)
            own = {"config": str(config), "dtype": dtypes.get(inside[0], dtypes["default"]), "local_files_only": True}
            pipe = kind.from_single_file(str(file), **own, **modules, **absent)
        else:
            pipe = DiffusionPipeline.from_pretrained(
                str(config), dtype=dtypes, use_safetensors=True, **modules, **absent
            )
    except (SingleFileComponentError, OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        if isinstance(error, SingleFileError):
            raise
        raise SingleFileError(f"{file.name} is not what {config} describes: {_why(error)}") from error
    _check_whole(file, config, pipe, header, family)
    pipe.register_to_config(_name_or_path=str(file))
    return pipe


def read_header(file: Path) -> Header:
    """What a file says without its weights being read.

    Raises:
        FileNotFoundError: it is not there.
        SingleFileError: it is no file of safetensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} with a base model: check the path")
    if file.suffix != SINGLE_FILE:
        raise SingleFileError(
            f"{file} is no {SINGLE_FILE} file: files of other kinds would be run, not only read; take the "
            f"{SINGLE_FILE} file that most sites have beside it, or convert it with a tool that you trust"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            sizes = {name: prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            return Header(sizes, dict(opened.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise SingleFileError(f"{file} is damaged or cut off: {first_line(error)}") from error


def _index(file: Path, config: Path) -> dict[str, Any]:
    """The ``model_index.json`` of the folder with the settings.

    Raises:
        FileNotFoundError: there is none.
    """
    if not (config / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{config} is no diffusers folder: it has no model_index.json; {file.name} needs one of its architecture"
        )
    found: dict[str, Any] = DiffusionPipeline.load_config(str(config))
    return found


def _refuse(file: Path, header: Header, config: Path) -> None:
    """Refuse what would be loaded or trained as something that it is not.

    Raises:
        SingleFileError: quantised weights, other noise than the folder's scheduler says, or another prediction.
    """
    if quantized := next((name for name in header.sizes if name.endswith(QUANTIZED)), None):
        raise SingleFileError(
            f"{file.name} has quantised weights ({quantized}), which only tools that know their scales can read; take "
            "the file in bf16 or fp16, and --base_quantization for less memory"
        )
    if edm := next((name for name in EDM if name in header.sizes), None):
        raise SingleFileError(f"{file.name} was trained on the noise of EDM ({edm}), which nothing here trains")
    scheduler = diffusers.DDPMScheduler.load_config(str(config), subfolder="scheduler")
    if "beta_start" not in scheduler:  # of flow models, which predict one thing
        return
    predicts, said = scheduler.get("prediction_type", "epsilon"), header.metadata.get("modelspec.prediction_type", "")
    velocity = VELOCITY in header.sizes or said in ("v", "v_prediction")
    if velocity and predicts == "epsilon":
        raise SingleFileError(
            f"{file.name} says that it predicts velocities, and the scheduler of {config} says epsilon: take the "
            'folder of such a base, or set "prediction_type": "v_prediction" in its scheduler_config.json'
        )
    if said == "epsilon" and predicts == "v_prediction":
        raise SingleFileError(
            f"{file.name} says that it predicts epsilon, and the scheduler of {config} says v_prediction: take the "
            "folder of such a base"
        )


def _modules(
    file: Path,
    header: Header,
    index: Mapping[str, Any],
    family: type[Family],
    config: Path,
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, nn.Module]]:
    """The denoiser and, where the file has it, the autoencoder.

    Raises:
        SingleFileError: diffusers cannot read files of that denoiser.
    """
    for part in (family.DENOISER, *(["vae"] if header.has(*AUTOENCODER) else [])):
        kind: Any = getattr(diffusers, str(index[part][1]))
        if not hasattr(kind, "from_single_file"):
            raise SingleFileError(f"diffusers reads no single files of {family.TITLE}: take a diffusers folder")
        dtype = dtypes.get(part, dtypes["default"])
        settings = {"config": str(config), "subfolder": part, "local_files_only": True}
        with errors_only("diffusers.models.modeling_utils"):  # it warns of the cast that it makes itself
            module = kind.from_single_file(str(file), dtype=dtype, **settings)
        yield part, module


def _from_folder(
    file: Path, index: Mapping[str, Any], parts: Iterable[str], config: Path, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, nn.Module]]:
    """Parts that the file has not.

    Raises:
        SingleFileError: the folder has no weights of one either.
    """
    for part in (part for part in parts if part in index):
        library, name = index[part]
        kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        dtype = dtypes.get(part, dtypes["default"])
        settings = {"subfolder": part, "local_files_only": True, "use_safetensors": True}
        try:
            yield part, kind.from_pretrained(str(config), dtype=dtype, **settings)
        except OSError:
            raise SingleFileError(f"neither {file.name} nor {config} has weights of the {part}") from None


def _why(error: Exception) -> str:
    """What diffusers' loading stopped at, in words."""
    if isinstance(error, NotImplementedError):  # of torch, about weights that nothing was loaded into
        return "weights are missing in it"
    return f"it has no {error}" if isinstance(error, KeyError) else first_line(error)


def _check_whole(file: Path, config: Path, pipe: DiffusionPipeline, header: Header, family: type[Family]) -> None:
    """See that every weight of the pipeline is there, and that the denoiser has all that the file has of one.

    Raises:
        SingleFileError: weights are missing, or of a UNet some would be left out.
    """
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, module in modules.items():
        tensors = chain(module.named_parameters(), module.named_buffers())
        if missing := [key for key, tensor in tensors if tensor.is_meta]:
            raise SingleFileError(
                f"{file.name} is not what {config} describes: of the {name} it has no {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}"
            )
    whole = family.DENOISER == "unet"  # diffusers gives each of its weights another name, and leaves none out
    inside = UNET if whole or header.has(UNET) else ""
    mine = {name: size for name, size in header.sizes.items() if name.startswith(inside)}
    held = sum(size for name, size in mine.items() if not name.startswith((*AUTOENCODER, *TEXT)))
    taken = sum(tensor.numel() for tensor in modules[family.DENOISER].state_dict().values())
    if held == taken or (not whole and abs(held - taken) <= SMALL * taken):
        return
    told = f"{file.name} has {held:,} numbers of a denoiser, and that of {config} has {taken:,}"
    if whole:
        raise SingleFileError(f"{told}: take a folder of the file's own architecture")
    logger.warning("%s: some of it is left out; take a folder of the file's own architecture", told)
