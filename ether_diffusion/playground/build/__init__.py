"""Train the playground's base model and its judges from scratch on the drawn world.

``python -m ether_diffusion.playground.build FOLDER --preset cpu|gpu``: the README of the playground states the recipe.
"""
