"""The console command ``ether``: one table of verbs, and what calls them."""

from ether_diffusion.cli.dispatch import main, run_script

__all__ = ["main", "run_script"]
