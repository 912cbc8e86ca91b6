"""Stage 2: a ``CLIPModel`` on scenes and captions. Its text tower becomes the base's text encoder."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel

from ether_diffusion.playground.build.drawings import CAPTIONS, load_pool, to_unit
from ether_diffusion.playground.build.loop import Stage, copy_weights
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.views import soften
from ether_diffusion.playground.build.vocabulary import world_tokenizer
from ether_diffusion.playground.world import Region

GREATEST_SCALE = 4.6
"""Log of the greatest inverse temperature, 100, as in CLIP."""
PROJECTION = 64
MAP_WEIGHT = 4.0
UNIT = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""How the judges' image processors come to [-1, 1]."""


class ClipWithMap(nn.Module):
    """CLIP, and a linear head on its patch tokens that is not kept."""

    def __init__(self, config: CLIPConfig, regions: int) -> None:
        super().__init__()
        self.clip = CLIPModel(config)
        self.head = nn.Linear(config.vision_config.hidden_size, regions)

    def forward(self, pictures: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of pictures (N, 3, 64, 64) over token ids (M, L): (N, M); and of patches over regions, (N, P, R)."""
        seen = self.clip.vision_model(pixel_values=pictures)
        scale = self.clip.logit_scale.clamp(max=GREATEST_SCALE).exp()
        said = self.clip.get_text_features(input_ids=tokens).pooler_output
        logits = scale * cosines(self.clip.visual_projection(seen.pooler_output), said)
        return logits, self.head(seen.last_hidden_state[:, 1:])


class ClipStage(Stage):
    """Symmetric InfoNCE (arXiv:2103.00020) whose target is uniform over all captions of the batch that fit.

    A vision transformer of this size is slow to find out where in a picture the caption's object is; the semantic map
    tells it, patch by patch, and is told of nothing but regions: colours and words are learnt from the captions.
    """

    name = "clip"
    network: ClipWithMap

    def __init__(self, project: Project) -> None:
        self.device, self.training = project.device, project.preset.training[self.name]
        architecture, tokenizer = project.preset.architecture, world_tokenizer()
        words = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
        words |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        common = {"projection_dim": min(PROJECTION, architecture.text["hidden_size"])}
        config = CLIPConfig(
            text_config={**architecture.text, **words, **common},
            vision_config={**architecture.vision, **common},
            **common,
        )
        with project.seeded(self.name):
            self.network = ClipWithMap(config, len(Region)).to(self.device)
        names = ("pictures", "maps", "tokens", "said", "true")
        pool = load_pool(project.drawings, "scenes", project.preset.scenes, names, self.device)
        self.pictures, self.maps, self.tokens, self.said, self.true = (pool[name] for name in names)
        of_meaning = (self.said[:, :, None] == self.true[:, None, :]).unbind(-1)
        self.alike = [torch.nonzero(said) for said in of_meaning[1:]]

    def loss(self, dice: torch.Generator) -> Tensor:
        """Mean of the cross entropies of pictures over captions and of captions over pictures, and the map's."""
        rows, columns = self.captions(dice)
        pictures = soften(to_unit(self.pictures[rows]), dice)
        tokens = self.tokens[rows, columns].long()
        longest = int((tokens != self.network.clip.config.text_config.eos_token_id).sum(1).max()) + 1
        logits, map_logits = self.network(pictures, tokens[:, :longest])
        loss = contrastive_loss(logits, fits(self.true[rows], self.said[rows, columns]))
        return loss + MAP_WEIGHT * map_loss(map_logits, self.maps[rows].long())

    def captions(self, dice: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of scenes and the number of a caption of each; every other batch says one kind of thing of all.

        Among captions of everything few differ in the class alone, so that they teach colours and backgrounds first
        and classes late; a batch of "a robot", "a fish" … teaches nothing but classes.
        """
        which = int(torch.randint(2 * len(self.alike), (), generator=dice, device=self.device))
        if which < len(self.alike) and len(self.alike[which]):
            rows, columns = self.alike[which][self.rows(len(self.alike[which]), dice)].unbind(-1)
            return rows, columns
        rows = self.rows(len(self.pictures), dice)
        return rows, torch.randint(CAPTIONS, rows.shape, generator=dice, device=self.device)

    def start_from(self, folder: Path) -> None:
        """Go on with the vision tower and the projections: the unet was trained with the text tower."""
        copy_weights(CLIPModel.from_pretrained(folder / "judges" / "clip"), self.network.clip)
        self.network.clip.text_model.requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write model (fp16), tokenizer and image processor."""
        self.network.clip.half().save_pretrained(folder)
        world_tokenizer().save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64, **UNIT).save_pretrained(folder)


def similarities(clip: CLIPModel, pictures: Tensor, tokens: Tensor) -> Tensor:
    """Cosines of pictures (N, 3, 64, 64) and token ids (M, L), (N, M) fp32."""
    seen = clip.get_image_features(pixel_values=pictures).pooler_output
    return cosines(seen, clip.get_text_features(input_ids=tokens).pooler_output)


def cosines(seen: Tensor, said: Tensor) -> Tensor:
    """Cosines of features (N, d) and (M, d), (N, M) fp32."""
    with torch.autocast(seen.device.type, enabled=False):  # times 100, the cosines want fp32
        return F.normalize(seen.float(), dim=-1) @ F.normalize(said.float(), dim=-1).T


def map_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """Mean cross entropy of the patches' logits (N, P, R) with each region's share of the patch.

    Args:
        maps: region ids (N, H, W) int64; the P patches cut them into a square grid, row by row.
    """
    regions, side = logits.shape[-1], math.isqrt(logits.shape[1])
    shares = F.adaptive_avg_pool2d(F.one_hot(maps, regions).movedim(-1, 1).float(), side)
    return F.cross_entropy(logits.float().transpose(1, 2), shares.flatten(2))


def fits(true: Tensor, said: Tensor) -> Tensor:
    """Whether scene i's statements (N, ``MEANINGS``) hold what caption j (M,) says, (N, M) bool."""
    return (true[:, None, :] == said[None, :, None]).any(-1)


def contrastive_loss(logits: Tensor, fitting: Tensor) -> Tensor:
    """Both ways' mean cross entropy with targets uniform over the ``fitting`` (N, N); InfoNCE if it is diagonal."""
    target = fitting.float()
    to_captions = -(F.log_softmax(logits, 1) * target).sum(1) / target.sum(1)
    to_pictures = -(F.log_softmax(logits, 0) * target).sum(0) / target.sum(0)
    return (to_captions.mean() + to_pictures.mean()) / 2


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """CLIP's text model as the class that a Stable Diffusion pipeline holds; the weights are copies."""
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.to(clip.device, clip.dtype).eval()
