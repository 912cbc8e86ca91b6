"""The settings of train_controlnet.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ether_diffusion.ranges import AMOUNT, POSITIVE, SHARE, Range
from ether_diffusion.registry import Rate
from ether_diffusion.training.config import TrainingConfig, known_rate
from ether_diffusion.training.groups import CONTROL, Groups

ENCODER_LEARNING_RATE = 1e-4
"""The control encoder's highest learning rate (App. C)."""


@dataclass
class ControlConfig(TrainingConfig):
    """Controllable generation: teach the model to follow an image: a semantic map, edges, a depth map.

    Attributes:
        train_data_dir: folder of pairs with a metadata.jsonl (image folder) or prompt.json (ControlNet's tutorial), or
            playground for endless pairs of the drawn world. Without either listing, pictures alone (captions in .txt
            files), where the condition is made from them.
        dataset_name: in place of a folder: a dataset of the Hugging Face Hub (extra "hub").
        image_column: its column of pictures.
        conditioning_image_column: its column of conditions, and the key of them in metadata.jsonl.
        caption_column: likewise of captions.
        allow_outside_paths: take files that the listing names outside of its folder, by absolute paths or "..".
        condition: image: the given pictures as they look; map: given semantic maps, whose grey class ids are coloured;
            canny: edges made from the pictures (extra "control"); segmentation: maps made by a model, segmenter. By
            default map for the playground, image for all others.
        segmenter: semantic segmentation model of transformers that makes the maps: Hub id, folder or playground.
        canny_low: lower threshold of canny edges.
        canny_high: higher threshold.
        control: encoder: a small control encoder is trained together with the adapter of the base UNet, as in the
            paper; controlnet: the adapter acts on a ControlNet.
        encoder_lr: learning rate of the control encoder, or of the ControlNet's own weights; the adapter's, at most
            1e-4, where it is not given.
        controlnet_model_name_or_path: a ControlNet to adapt; without it one is made from the UNet.
        train_controlnet: what of the ControlNet is trained besides the adapter. nothing: the adapter alone, the default
            for a given ControlNet; connections: its zero convolutions and its condition's embedding, the default for a
            new one; all: everything.
        proportion_empty_prompts: share of the samples that are trained without their prompt, for guidance.
        center_crop: crop the middle instead of a random place.
        random_flip: mirror every other pair.
        validation_image: conditions of the sample grids, one for each validation_prompt; the first pairs otherwise.
        num_validation_pairs: how many pairs to take for the sample grids where validation_image is not given.
    """

    targets: list[str] | str | None = None  # type: ignore[assignment]

    GROUPS: ClassVar[Groups] = CONTROL

    RANGES: ClassVar[Mapping[str, Range]] = {
        **TrainingConfig.RANGES,
        "canny_low": AMOUNT,
        "canny_high": AMOUNT,
        "encoder_lr": POSITIVE,
        "proportion_empty_prompts": SHARE,
        "num_validation_pairs": AMOUNT,
    }

    LATER: ClassVar[frozenset[str]] = TrainingConfig.LATER | {"allow_outside_paths"}

    train_data_dir: str | None = None
    dataset_name: str | None = None
    image_column: str = "image"
    conditioning_image_column: str = "conditioning_image"
    caption_column: str = "text"
    allow_outside_paths: bool = False
    condition: Literal["image", "map", "canny", "segmentation"] | None = None
    segmenter: str | None = None
    canny_low: int = 100
    canny_high: int = 200
    control: Literal["encoder", "controlnet"] = "encoder"
    encoder_lr: float | None = None
    controlnet_model_name_or_path: str | None = None
    train_controlnet: Literal["nothing", "connections", "all"] | None = None
    proportion_empty_prompts: float = 0.1
    center_crop: bool = False
    random_flip: bool = False
    validation_image: list[str] | str = field(default_factory=list)
    num_validation_pairs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.validation_image, str):
            self.validation_image = [self.validation_image]
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("name the training pairs with either train_data_dir or dataset_name")
        if self.validation_image and len(self.validation_image) != len(self.validation_prompt):
            raise ValueError("give one validation_prompt for each validation_image")
        if self.condition is None:
            self.condition = "map" if self.train_data_dir == "playground" else "image"
        if self.condition == "segmentation" and self.segmenter is None:
            raise ValueError("condition=segmentation needs segmenter: the model that makes the maps")
        if self.condition == "segmentation" and self.train_data_dir == "playground":
            raise ValueError("the playground has exact maps of its own: condition=map")
        if self.canny_low > self.canny_high:
            raise ValueError(f"canny_low {self.canny_low} must be at most canny_high {self.canny_high}")
        if self.train_text_encoder:
            raise ValueError("train_text_encoder is for train_dreambooth.py: a control needs no new words")
        if self.prompt_chunks == "auto" and self.train_data_dir == "playground":
            raise ValueError(
                "the playground draws captions without end, which nobody can count: leave prompt_chunks out"
            )
        if self.optimizer == "prodigy" and self.encoder_lr not in (None, self.resolved_learning_rate):
            raise ValueError("optimizer=prodigy has one learning rate for all: leave out encoder_lr")
        self._check_controlnet()

    @property
    def private_conditions(self) -> bool:
        """Whether the samples show conditions of the user's own training pairs."""
        return self.train_data_dir != "playground" and not self.validation_image

    @property
    def has_maps(self) -> bool:
        """Whether the conditions are semantic maps."""
        return self.condition in ("map", "segmentation")

    def _check_controlnet(self) -> None:
        """Settle what of a ControlNet is trained, and refuse what does not go together."""
        if self.control == "encoder":
            if self.controlnet_model_name_or_path or self.train_controlnet:
                raise ValueError("controlnet_model_name_or_path and train_controlnet need control=controlnet")
            return
        if self.train_controlnet is None:
            self.train_controlnet = "nothing" if self.controlnet_model_name_or_path else "connections"
        if self.method == "full":
            raise ValueError("a whole ControlNet is trained with method=none, train_controlnet=all")
        if self.train_controlnet == "nothing":
            if self.method == "none":
                raise ValueError("method=none, train_controlnet=nothing trains nothing: choose one of them otherwise")
            if not self.controlnet_model_name_or_path:
                raise ValueError("a new ControlNet has zero convolutions: train_controlnet=connections at least")
        elif not self.entry.is_own and self.method != "none":
            raise ValueError(f"method={self.method} adapts a given ControlNet only, with train_controlnet=nothing")

    @property
    def default_rate(self) -> Rate:
        """The method's learning rate where none is given."""
        return known_rate(self.entry.control_rate, self.method)

    def rate_of(self, component: str) -> float:
        """The learning rate of a trained component: the method's, or that of the encoder and a ControlNet's weights."""
        if component in ("control_encoder", "controlnet_weights"):
            if self.encoder_lr is not None:
                return self.encoder_lr
            if self.optimizer != "prodigy":
                return min(self.resolved_learning_rate, ENCODER_LEARNING_RATE)
        return self.resolved_learning_rate
