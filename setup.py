"""The packages. All else is in pyproject.toml, which cannot say that a folder beside the package belongs into it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ether_diffusion*"]), "ether_diffusion.configs"],
    package_dir={"ether_diffusion.configs": "configs"},
)
