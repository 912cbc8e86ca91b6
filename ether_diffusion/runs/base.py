"""Which base a run starts from, wherever it is loaded again: the name alone would be the Hub's newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SETTINGS = ("pretrained_model_name_or_path", "revision", "variant", "base_config")
"""The settings of a training that name its base."""


@dataclass(frozen=True)
class Base:
    """A base by its name and what tells its versions apart.

    Attributes:
        name: a diffusers folder, a Hub id, a single file, or playground.
        revision: branch, tag or commit on the Hub; its main branch where there is none.
        variant: of the files, such as fp16.
        config: of a single file the folder that has its settings.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Base:
        """The base that the settings of a training name."""
        name, *versions = (settings.get(key) for key in SETTINGS)
        return cls(str(name), *(None if version is None else str(version) for version in versions))

    @property
    def version(self) -> dict[str, str]:
        """``revision`` and ``variant`` as arguments of ``from_pretrained``, as far as they are given."""
        given = {"revision": self.revision, "variant": self.variant}
        return {key: value for key, value in given.items() if value}

    @property
    def described_by(self) -> str:
        """Folder, Hub id or name of what has the base's settings."""
        return self.config or self.name

    def __str__(self) -> str:
        """The name, and in brackets what tells the version."""
        version = ", ".join(f"{key} {value}" for key, value in self.version.items())
        return f"{self.name} ({version})" if version else self.name
