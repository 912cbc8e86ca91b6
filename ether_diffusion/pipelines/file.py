"""The adapter file: safetensors with metadata, strict when it is read, atomic when it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ether_diffusion.config import EtherConfig
from ether_diffusion.core.state import state_problems
from ether_diffusion.files import atomic_path
from ether_diffusion.pipelines.learned_embeds import (
    LEARNED_EMBEDS,
    LearnedEmbeds,
    read_embeds,
)
from ether_diffusion.pipelines.schema import (
    CONTROL,
    EMBEDS,
    LORA_FILE,
    Description,
    EmbedsSettings,
    SchemaError,
    describe,
    format_version,
)

if TYPE_CHECKING:
    from ether_diffusion.pipelines.control_encoder import ControlEncoder

FILE_NAME = "ether_weights.safetensors"
ADAPTER_FILES = (FILE_NAME, LEARNED_EMBEDS)
"""What an adapter is saved as in a folder; the second is there where it has a placeholder token."""
SINGLE_FILE = ".safetensors"
"""Ending of a base in one file."""
MESSAGE_LIMIT, SHOWN_PROBLEMS = 2000, 8


class AdapterFileError(ValueError):
    """An adapter file that cannot be read, or does not fit the model that it is loaded into."""


@dataclass(frozen=True)
class Hub:
    """How a repository of the Hub is read, as ``huggingface_hub.hf_hub_download`` takes it.

    Attributes:
        revision: branch, tag or commit.
        subfolder: in which the adapter is; of a folder here as well.
        token: of the Hub; True for the one that is stored, False for none.
        cache_dir: folder of downloads.
        local_files_only: take what was downloaded before, and ask nobody.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def fetch(self, repository: str, name: str) -> Path:
        """Download a file; raises what huggingface_hub raises."""
        return Path(
            hf_hub_download(
                repository,
                name,
                subfolder=self.subfolder,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
            )
        )


@dataclass(frozen=True)
class AdapterFile:
    """The content of ``ether_weights.safetensors``.

    Attributes:
        states: vectors of every component, as :meth:`Adapter.state_dict` gives them.
        configs: the adapter's settings for every component.
        base_model: name of the base that the adapter was trained on, "" if unknown.
        base_hash: :func:`ether_diffusion.pipelines.fingerprint.base_hash` of every component, where it could be read.
        control: the control encoder, where the adapter was trained with one.
        embeds: the placeholder token that was trained with it, which is kept in a file beside.
    """

    states: dict[str, dict[str, Tensor]]
    configs: dict[str, EtherConfig]
    base_model: str = ""
    base_hash: Mapping[str, str] | None = None
    control: ControlEncoder | None = None
    embeds: LearnedEmbeds | None = None

    def write(self, path: str | Path) -> Path:
        """Write the file atomically; ``path`` is a folder (then it gets the standard name) or ends in .safetensors.

        The embeddings of a placeholder token are written before it, beside it.

        Raises:
            ValueError: a vector is not finite or of length zero; an existing file stays as it is.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / FILE_NAME
        states = self.states | ({} if self.control is None else {CONTROL: self.control.state_dict()})
        tensors = {
            f"{component}.{key}": value.detach().to("cpu", torch.float32).contiguous()
            for component, state in states.items()
            for key, value in state.items()
        }
        if problems := state_problems(tensors, tensors):
            raise ValueError(f"not saved: {len(problems)} vectors are broken, the first:\n{problems[0]}")
        if self.embeds is not None:
            self.embeds.check()
        metadata = {
            "format_version": format_version(
                (key for state in self.states.values() for key in state), self.embeds is not None
            ),
            "ether_config": json.dumps({component: config.to_dict() for component, config in self.configs.items()}),
            "base_model": self.base_model,
            "base_hash": json.dumps(dict(self.base_hash or {})),
            "library_version": version("ether-diffusion"),
        }
        if self.control is not None:
            metadata[CONTROL] = json.dumps(self.control.config.to_dict())
        if self.embeds is not None:
            named = EmbedsSettings(self.embeds.token, tuple(self.embeds.rows), self.embeds.hash)
            metadata[EMBEDS] = json.dumps(asdict(named))
            self.embeds.write(embeds_beside(path))
        with atomic_path(path) as temporary:
            temporary.write_bytes(serialize(tensors, metadata=metadata))
        return path

    @classmethod
    def read(cls, source: str | Path, hub: Hub | None = None) -> AdapterFile:
        """Read a folder, a file, or a repository of the Hugging Face Hub.

        Raises:
            FileNotFoundError: there is nothing under that name.
            ValueError: ``hub`` has a revision, or for a file a subfolder, and ``source`` is here.
            AdapterFileError: the file is damaged, or is no adapter file of this format.
        """
        path = find_file(source, hub)
        try:
            described = describe(path)
            control = _new_encoder(path, described)
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in described.tensors}
        except SchemaError as error:
            raise AdapterFileError(f"{path} {_printable(error)}") from error
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(
                f"{path} cannot be read as safetensors; it is damaged or cut off ({_printable(error)})"
            ) from error
        states: dict[str, dict[str, Tensor]] = {component: {} for component in described.configs}
        states |= {CONTROL: {}} if control is not None else {}
        for key, tensor in tensors.items():
            component, _, rest = key.partition(".")
            states[component][rest] = tensor
        if control is not None:
            encoder_state = states.pop(CONTROL)
            if problems := state_problems(encoder_state, control.state_dict()):
                raise AdapterFileError(
                    f"the control encoder in {path} is broken:\n" + "\n".join(problems[:SHOWN_PROBLEMS])
                )
            control.load_state_dict(encoder_state)
        embeds = None if described.embeds is None else _read_embeds(path, described.embeds, source, hub)
        return cls(states, described.configs, described.base_model, described.base_hash, control, embeds)


def embeds_beside(adapter: Path) -> Path:
    """Where the embeddings of an adapter or LoRA are: of ``dog.safetensors`` in ``dog.learned_embeds.safetensors``.

    Beside the standard name of either they have theirs, ``learned_embeds.safetensors``.
    """
    standard = adapter.name in (FILE_NAME, LORA_FILE)
    return adapter.with_name(LEARNED_EMBEDS if standard else f"{adapter.stem}.{LEARNED_EMBEDS}")


def _read_embeds(path: Path, described: EmbedsSettings, source: str | Path, hub: Hub | None) -> LearnedEmbeds:
    """The embeddings of an adapter's placeholder token, from the file beside it.

    Raises:
        FileNotFoundError: it is not there.
        AdapterFileError: it is damaged, or not the one that the adapter was saved with.
    """
    beside, token = embeds_beside(path), described.placeholder_token
    try:
        if not Path(source).exists():
            beside = (hub or Hub()).fetch(str(source), LEARNED_EMBEDS)
        embeds = read_embeds(beside)
    except SchemaError as error:
        raise AdapterFileError(f"{beside} {_printable(error)}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source} was trained with the new token {token}, whose embeddings are not beside it: put {beside.name} "
            f"there, from the folder that the adapter was saved in ({first_line(error)})"
        ) from error
    if (embeds.token, tuple(embeds.rows), embeds.hash) != (token, described.components, described.hash):
        raise AdapterFileError(
            f"{beside} is not the file that {path.name} was saved with: it has other embeddings of {token}, of another "
            "step or run, or those of another token; take both files from one folder"
        )
    return embeds


def _new_encoder(path: Path, described: Description) -> ControlEncoder | None:
    """The control encoder that a file describes, without its weights; it is made only if the file has them.

    Raises:
        AdapterFileError: keys or shapes of the weights are not those of the encoder that the metadata describe.
    """
    if described.control is None:
        return None
    from ether_diffusion.pipelines.control_encoder import (  # imports the ControlNets
        ControlEncoder,
        ControlEncoderConfig,
    )

    config = ControlEncoderConfig(**asdict(described.control))
    with torch.device("meta"):
        expected = {
            f"{CONTROL}.{key}": tuple(value.shape) for key, value in ControlEncoder(config).state_dict().items()
        }
    found = {key: tensor.shape for key, tensor in described.tensors.items() if key.startswith(f"{CONTROL}.")}
    problems = [
        f"  {key}: {found.get(key, 'nothing')} in the file, {expected.get(key, 'nothing')} by its settings"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    ]
    if problems:
        raise AdapterFileError(f"the control encoder in {path} is broken:\n" + "\n".join(problems[:SHOWN_PROBLEMS]))
    return ControlEncoder(config)


def _printable(error: Exception) -> str:
    """An error's message, which may hold what a stranger wrote: not endless, without control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error)[:MESSAGE_LIMIT])


def find_file(source: str | Path, hub: Hub | None = None) -> Path:
    """The adapter file that ``source`` (folder, file or Hub id) names, downloaded if need be.

    Raises:
        FileNotFoundError: it is none of the three, or the Hub cannot be reached.
        ValueError: ``hub`` has a revision, or for a file a subfolder, and ``source`` is here.
    """
    path, hub = Path(source), hub or Hub()
    if path.exists():
        if hub.revision is not None:
            raise ValueError(f"revision={hub.revision!r} is for repositories of the Hub, and {source} is a path here")
        if path.is_dir():
            folder = path / (hub.subfolder or "")
            if not (folder / FILE_NAME).is_file():
                raise FileNotFoundError(f"{folder} holds no {FILE_NAME}: {_instead_of_adapter(folder)}")
            return folder / FILE_NAME
        if hub.subfolder is not None:
            raise ValueError(f"subfolder={hub.subfolder!r} is for folders and repositories, and {source} is a file")
        return path
    if is_local_name(source):
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    try:
        return hub.fetch(str(source), FILE_NAME)
    except HFValidationError:
        reason = "there is no such file or folder"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"there is no such file or folder, and as a Hub id it could not be fetched ({_why(error, hub)})"
    raise FileNotFoundError(f"{source}: {reason}")


def _why(error: Exception, hub: Hub) -> str:
    """Why the Hub gave nothing, and what to do, in one line."""
    if isinstance(error, LocalEntryNotFoundError) and hub.local_files_only:
        return "it was not downloaded before, and local_files_only keeps from asking the Hub"
    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page, and log in with `hf auth login` or pass token=…"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {hub.revision!r}"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        place = "" if hub.subfolder is None else f" in {hub.subfolder}"
        return f"it has no {FILE_NAME}{place}: if it holds a LoRA, pipe.load_lora_weights loads that"
    return first_line(error)


def is_hub_id(base: str) -> bool:
    """Whether ``base`` reads as ``owner/name`` on the Hub and is no folder here and no file."""
    name = r"[A-Za-z0-9_][\w.-]*"
    if base.endswith(SINGLE_FILE):
        return False
    return re.fullmatch(f"{name}/{name}", base, re.ASCII) is not None and not Path(base).exists()


def public_name(base: str) -> str:
    """What a file may call a base: its id on the Hub, or the last part of its path on this machine."""
    return base if not base or is_hub_id(base) else Path(base).absolute().name


def is_local_name(source: str | Path) -> bool:
    """Whether a name under which nothing is found is a path and no Hub id: ./dog, a/b/c, runs/dog beside runs/."""
    text, parent = str(source), Path(source).parent
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or (parent != Path() and parent.is_dir())


def _instead_of_adapter(folder: Path) -> str:
    """What a folder without adapter file is good for."""
    if folder.name == "best" and (folder.parent / FILE_NAME).is_file():
        return "the run had no judges, --dino and --clip, or none of its steps was scored; leave subfolder out"
    if subjects := sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}")):
        names = ", ".join(subjects[:SHOWN_PROBLEMS]) + (", …" if len(subjects) > SHOWN_PROBLEMS else "")
        return f"it holds the runs of {len(subjects)} subjects, {names}; load one of them: {folder / subjects[0]}"
    if (folder / "pytorch_lora_weights.safetensors").is_file():
        return f'it holds a LoRA, which pipe.load_lora_weights("{folder}") loads'
    if (folder / "model_index.json").is_file():
        return f'it holds a whole pipeline, which DiffusionPipeline.from_pretrained("{folder}") loads'
    return "has its training finished?"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one-line reports."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
