"""The settings of DreamBooth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ether_diffusion.data.options import TAG_ORDERS
from ether_diffusion.placeholder import VECTORS_LIMIT, check_placeholder
from ether_diffusion.ranges import AMOUNT, COUNT, POSITIVE, Range
from ether_diffusion.registry import METHODS
from ether_diffusion.training.config import TrainingConfig
from ether_diffusion.training.groups import DREAMBOOTH, Groups
from ether_diffusion.training.sections import TOKENS

NEW_TOKEN = ("placeholder_token", "initializer_token", "num_vectors", "token_lr", "token_steps")
"""Settings of a new token."""
TOKEN_RATE = 5e-4
"""The learning rate of textual inversion in diffusers' documentation."""


@dataclass
class DreamBoothConfig(TrainingConfig):
    """DreamBooth (arXiv 2208.12242): teach the model one subject from a folder of its photos.

    Attributes:
        instance_data_dir: folder with the photos of the subject. A .txt beside a photo holds its own captions, one a
            line, and so may a metadata.csv or metadata.jsonl in the folder; of several each sample takes one.
        subjects_dir: instead of instance_data_dir: a folder of such folders, whose subjects are all trained in one run:
            each gets its own adapter and its own run folder in output_dir, as if it were trained alone.
        instance_prompt: prompt of the photos, with a rare word for the subject: "a photo of qwe dog". With subjects_dir
            {subject} stands for the folder's name, and a prompt.txt in a folder is its own prompt.
        nested_folders: search the sub-folders of the folders of pictures, too.
        caption_column: column of the captions in metadata.csv and metadata.jsonl.
        caption_prefix: put before every caption of a photo, with a space, such as "a photo of qwe dog,".
        shuffle_tags: take comma-separated captions of the photos with their tags in other orders.
        keep_tags: so many tags at the start of a caption keep their places.
        tag_orders: at most so many orders of each caption, each of which is encoded once.
        with_prior_preservation: train on images of the class as well, so that the class is not forgotten.
        class_data_dir: folder with class images, filled up by the base itself; output_dir/class_images by default.
        class_prompt: prompt of the class images: "a photo of a dog".
        num_class_images: how many class images to have.
        prior_loss_weight: weight of the class images in the loss.
        sample_batch_size: class images generated at a time.
        center_crop: crop the middle of the photos instead of a random place.
        random_flip: mirror every other photo, for subjects without a left and right.
        placeholder_token: a new token such as <dog>, which stands for the subject in the prompts and is trained beside
            the adapter (pivotal tuning; SD, SDXL, FLUX.1 and Chroma, docs/tokens.md).
        initializer_token: word whose embedding the new token starts from, such as dog; random where it is not given.
        num_vectors: embeddings of the new token, each of which takes the place of a token in a prompt.
        token_lr: learning rate of the new token; 5e-4 where it is not given.
        token_steps: train the new token for so many optimisation steps, and from then on the adapter alone; all steps
            where it is not given.
        validation_data_dir: folder with held-out photos of the subject, on which the loss is compared at every step
            with samples (validation.jsonl, val/loss); the training photos where it is not given.
        dino: who scores the likeness of the samples at every step that has some, and with clip chooses the best step: a
            ViT such as facebook/dino-vits16, a folder, or playground.
        clip: who scores how well the samples follow their prompts: a CLIP such as openai/clip-vit-large-patch14, a
            folder, or playground.
        early_stopping: end the run after so many scored steps in a row without a better one; never where it is not
            given.
        aspect_ratio_buckets: keep the photos' shapes, rounded to one of some sizes, instead of squares.
    """

    GROUPS: ClassVar[Groups] = DREAMBOOTH

    RANGES: ClassVar[Mapping[str, Range]] = {
        **TrainingConfig.RANGES,
        "keep_tags": AMOUNT,
        "tag_orders": Range(1, 1000),
        "num_class_images": COUNT,
        "prior_loss_weight": AMOUNT,
        "sample_batch_size": COUNT,
        "early_stopping": COUNT,
        "num_vectors": Range(1, VECTORS_LIMIT),
        "token_lr": POSITIVE,
        "token_steps": COUNT,
    }

    LATER: ClassVar[frozenset[str]] = TrainingConfig.LATER | {
        "nested_folders",
        "caption_column",
        "caption_prefix",
        "shuffle_tags",
        "keep_tags",
        "tag_orders",
        "dino",
        "clip",
        "early_stopping",
        *NEW_TOKEN,
    }

    instance_data_dir: Path = Path()
    subjects_dir: Path | None = None
    instance_prompt: str = ""
    nested_folders: bool = False
    caption_column: str = "text"
    caption_prefix: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_orders: int = TAG_ORDERS
    with_prior_preservation: bool = False
    class_data_dir: Path | None = None
    class_prompt: str | None = None
    num_class_images: int = 200
    prior_loss_weight: float = 1.0
    sample_batch_size: int = 4
    center_crop: bool = False
    random_flip: bool = False
    aspect_ratio_buckets: bool = False
    placeholder_token: str | None = None
    initializer_token: str | None = None
    num_vectors: int = 1
    token_lr: float | None = None
    token_steps: int | None = None
    validation_data_dir: Path | None = None
    dino: str | None = None
    clip: str | None = None
    early_stopping: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "none":
            raise ValueError("method=none trains nothing here: it is for train_controlnet.py")
        self.instance_data_dir = Path(self.instance_data_dir)
        self.subjects_dir = None if self.subjects_dir is None else Path(self.subjects_dir)
        self.class_data_dir = None if self.class_data_dir is None else Path(self.class_data_dir)
        self.validation_data_dir = None if self.validation_data_dir is None else Path(self.validation_data_dir)
        if self.subjects_dir is not None:
            self._check_subjects()
        elif self.instance_data_dir == Path():
            raise ValueError("instance_data_dir is missing: name the folder with the photos of the subject")
        if not self.instance_prompt and self.subjects_dir is None:
            raise ValueError('instance_prompt is missing: describe the photos, such as "a photo of qwe dog"')
        if not self.shuffle_tags and (self.keep_tags or self.tag_orders != TAG_ORDERS):
            raise ValueError("keep_tags and tag_orders are for shuffled captions: add shuffle_tags, or leave them out")
        if self.with_prior_preservation and not self.class_prompt:
            raise ValueError('with_prior_preservation needs class_prompt, such as "a photo of a dog"')
        self._check_judges()
        self._check_token()

    @property
    def repository(self) -> str | None:
        """The repository of the Hub; of several subjects each has its own."""
        return super().repository if self.subjects_dir is None else None

    @property
    def encodes_prompts(self) -> bool:
        """Whether prompts are encoded in every step: the text encoders are trained, or rows of their tables."""
        return super().encodes_prompts or self.placeholder_token is not None

    def rate_of(self, component: str) -> float:
        """The learning rate of a trained component; prodigy finds that of a new token, too."""
        if component.startswith(TOKENS) and self.optimizer != "prodigy":
            return TOKEN_RATE if self.token_lr is None else self.token_lr
        return super().rate_of(component)

    def _check_token(self) -> None:
        """Refuse what a placeholder token does not go with."""
        if self.placeholder_token is None:
            given = [name for name in NEW_TOKEN if getattr(self, name) != getattr(type(self), name)]
            if given:
                raise ValueError(f"{given[0]} is of a new token: add placeholder_token, such as <dog>, or leave it out")
            return
        try:
            check_placeholder(self.placeholder_token)
        except ValueError as error:
            raise ValueError(f"placeholder_token: {error}") from None
        if not self.entry.is_own:
            able = ", ".join(entry.name for entry in METHODS.values() if entry.is_own)
            raise ValueError(f"placeholder_token is trained beside an adapter of {able}, not beside {self.method}")
        if self.subjects_dir is not None:
            raise ValueError(
                "subjects_dir encodes each prompt once for all subjects, and a placeholder_token would be encoded in "
                "every step: train the subjects one by one, each with its own token"
            )
        if self.class_prompt and self.placeholder_token in self.class_prompt:
            raise ValueError(
                f"class_prompt has the placeholder_token {self.placeholder_token}, which stands for the subject: "
                'describe the class without it, such as "a photo of a dog"'
            )
        if self.optimizer == "prodigy" and self.token_lr is not None:
            raise ValueError("optimizer=prodigy has one learning rate for all: leave out token_lr")

    def _check_judges(self) -> None:
        """Refuse what cannot be scored."""
        if (self.dino is None) != (self.clip is None):
            missing = "clip" if self.clip is None else "dino"
            raise ValueError(f"the samples are scored by dino and clip together: add {missing}, or leave out both")
        if self.dino is not None and not self.num_validation_images:
            raise ValueError("dino and clip score the samples, and num_validation_images is 0: draw at least 1")
        if self.early_stopping is not None and self.dino is None:
            raise ValueError("early_stopping follows the scores of the samples: name the judges, dino and clip")

    def _check_subjects(self) -> None:
        """Refuse what several subjects in one run cannot have."""
        if self.instance_data_dir != Path():
            raise ValueError("give either instance_data_dir, for one subject, or subjects_dir, for several")
        if self.validation_data_dir is not None:
            raise ValueError("subjects_dir compares the loss on each subject's photos: leave out validation_data_dir")
        if not self.entry.per_sample:
            able = ", ".join(entry.name for entry in METHODS.values() if entry.per_sample)
            raise ValueError(f"subjects_dir trains {able}, whose vectors samples can share; not {self.method}")
        if self.aspect_ratio_buckets:
            raise ValueError("subjects_dir trains on squares, which fit into one batch: leave out aspect_ratio_buckets")
        if self.mixed_precision == "fp16":
            raise ValueError("subjects_dir needs bf16 or no: fp16 skips a step for all where one subject overflows")
        if self.early_stopping is not None:
            raise ValueError("early_stopping would end the training of all subjects for one: leave it out")
        if self.optimizer == "prodigy":
            raise ValueError("subjects_dir cannot use prodigy, whose learning rate would be one for all subjects")
