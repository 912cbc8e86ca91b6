"""The drawn world: endless seeded scenes of 64 x 64 pixels, their captions and maps, and subjects to finetune on.

``scene = random_scene(seed, index)``, ``draw(scene)`` and ``random_caption(scene, seed, index)`` give one example;
``subject(name)`` and ``write_subject(name, folder)`` one individual that no random scene contains.
"""

from ether_diffusion.playground.world.backgrounds import BACKGROUNDS
from ether_diffusion.playground.world.captions import (
    background_phrase,
    full_captions,
    random_caption,
    short_captions,
    where_phrases,
)
from ether_diffusion.playground.world.company import true_company
from ether_diffusion.playground.world.individuals import INDIVIDUALS
from ether_diffusion.playground.world.looks import PARTS, PATTERNS, Look
from ether_diffusion.playground.world.objects import KINDS
from ether_diffusion.playground.world.palette import COLOURS, PALETTE
from ether_diffusion.playground.world.regions import Region
from ether_diffusion.playground.world.sampling import random_scene
from ether_diffusion.playground.world.scene import Drawing, Scene, SceneObject, draw
from ether_diffusion.playground.world.subjects import (
    Request,
    Subject,
    known_subject,
    request_of,
    subject,
    true_pictures,
    true_scene,
    write_subject,
)

SUBJECTS = tuple(INDIVIDUALS)
"""The names of the subjects."""

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "PALETTE",
    "PARTS",
    "PATTERNS",
    "SUBJECTS",
    "Drawing",
    "Look",
    "Region",
    "Request",
    "Scene",
    "SceneObject",
    "Subject",
    "background_phrase",
    "draw",
    "full_captions",
    "known_subject",
    "random_caption",
    "random_scene",
    "request_of",
    "short_captions",
    "subject",
    "true_company",
    "true_pictures",
    "true_scene",
    "where_phrases",
    "write_subject",
]
