"""What pyproject.toml cannot say: a folder beside the package belongs into it, and README's links hold on any page."""

import sys
import tomllib
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "docs"))
from links import at_repository, relinked  # noqa: E402

URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]

setup(
    packages=[*find_packages(include=["ether_diffusion*"]), "ether_diffusion.configs"],
    package_dir={"ether_diffusion.configs": "configs"},
    long_description=relinked((ROOT / "README.md").read_text(encoding="utf-8"), at_repository(URLS.get("Repository"))),
    long_description_content_type="text/markdown",
)
