"""Stage 2: a ``CLIPModel`` on scenes and captions. Its text tower becomes the base's text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel

from ether_diffusion.playground.build.drawings import CAPTIONS, load_pool, to_unit
from ether_diffusion.playground.build.loop import Stage
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.views import soften
from ether_diffusion.playground.build.vocabulary import world_tokenizer

GREATEST_SCALE = 4.6
"""Log of the greatest inverse temperature, 100, as in CLIP."""
PROJECTION = 64
UNIT = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""How the judges' image processors come to [-1, 1]."""


class ClipStage(Stage):
    """Symmetric InfoNCE (arXiv:2103.00020) whose target is uniform over all captions of the batch that fit."""

    name = "clip"
    network: CLIPModel

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
            self.network = CLIPModel(config).to(self.device)
        names = ("pictures", "tokens", "said", "true")
        pool = load_pool(project.drawings, "scenes", project.preset.scenes, names, self.device)
        self.pictures, self.tokens, self.said, self.true = (pool[name] for name in names)

    def loss(self, dice: torch.Generator) -> Tensor:
        """Mean of the cross entropies of pictures over captions and of captions over pictures."""
        rows = self.rows(len(self.pictures), dice)
        columns = torch.randint(CAPTIONS, rows.shape, generator=dice, device=self.device)
        pictures = soften(to_unit(self.pictures[rows]), dice)
        logits = similarities(self.network, pictures, self.tokens[rows, columns].long())
        logits = logits * self.network.logit_scale.clamp(max=GREATEST_SCALE).exp()
        return contrastive_loss(logits, fits(self.true[rows], self.said[rows, columns]))

    def save(self, folder: Path) -> None:
        """Write model (fp16), tokenizer and image processor."""
        self.network.half().save_pretrained(folder)
        world_tokenizer().save_pretrained(folder)
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64, **UNIT).save_pretrained(folder)


def similarities(clip: CLIPModel, pictures: Tensor, tokens: Tensor) -> Tensor:
    """Cosines of pictures (N, 3, 64, 64) and token ids (M, L), (N, M) fp32."""
    seen = clip.get_image_features(pixel_values=pictures).pooler_output.float()
    said = clip.get_text_features(input_ids=tokens).pooler_output.float()
    with torch.autocast(seen.device.type, enabled=False):  # times 100, the cosines want fp32
        return F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T


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
