"""The settings of a training program: every field is a key of its YAML file and a flag of its command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ether_diffusion.config import EtherConfig, LoraFormat
from ether_diffusion.families.settings import FamilySettings, Quantization, Weighting
from ether_diffusion.ranges import AMOUNT, COUNT, POSITIVE, SEED, Range, check_ranges
from ether_diffusion.registry import METHODS, OWN_METHODS, MethodEntry, Rate
from ether_diffusion.runs.folder import INPUTS, RunSection
from ether_diffusion.training.sections import AdapterSection

Section = TypeVar("Section")

Method = Literal[tuple(METHODS)]  # type: ignore[valid-type]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
LogLevel = Literal["debug", "info", "warning", "error"]
Tracker = Literal["tensorboard", "wandb"]
Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
]

OF_FAMILIES = frozenset(
    {
        "snr_gamma",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "guidance_scale_training",
        "max_sequence_length",
        "prompt_chunks",
    }
)
"""Settings that not every family of bases has."""


@dataclass
class TrainingConfig:
    """What every training program has: base model, method, optimisation, samples, checkpoints.

    Attributes:
        pretrained_model_name_or_path: base model, a diffusers folder, an id on the Hugging Face Hub, a .safetensors
            file with the whole base or its denoiser (then base_config is needed), or playground.
        base_config: of a base in a single file: diffusers folder of the same architecture, with its settings and
            tokenizers, and weights of what the file has not (docs/families.md).
        revision: branch, tag or commit of the base on the Hub.
        variant: file variant of the base, such as fp16.
        output_dir: the run folder.
        dry_run: print what memory a training step takes, computed from the base's settings, and leave.
        overwrite: start anew in a run folder that already holds a run; what that run wrote is removed, nothing else.
        resume: continue the run in output_dir: "latest", "latest-good" (the newest that is not
            damaged), or the name of one of its checkpoints.
        quiet: print nothing but warnings and errors.
        log_level: the least that is printed: info is the summaries, the progress and the paths of samples; debug adds
            the traceback of an error that is told in one line.
        seed: of everything random: the vectors, the order, augmentation, noise, timesteps.
        method: what is trained. ether, ether_plus, naive: adapters of this library; full: the weights themselves;
            lora, oft, boft, hra, peft: adapters of peft, for studies (extra "study"); none: no adapter, for controls
            only; variants that are not the paper's (docs/departures.md): anchored, ether_plus_free.
        n_blocks: diagonal blocks of oft, boft and the adapters of this library. The paper does not state the n
            that its image experiments used; 4 is what it gives OFT and Naive.
        initial_length: of the trained vectors of reflections at the start. The shorter one is, the further a step of
            the same rate turns it: halving the length is like doubling the rate.
        two_sided: ether_plus: transform the outputs of the projections as well as their inputs.
        targets: projections to act on: attention, attention+mlp, all, self, cross, attention+geglu,
            attention+geglu_input, or a list of name patterns (docs/families.md).
        rank: rank of lora, number of reflections of hra.
        peft_config: of method=peft: any configuration of peft that acts on layers, with its type, such as
            {peft_type: DELORA, r: 8}; targets says on which layers. It has no learning rate of its own.
        train_text_encoder: train the text encoder(s) too, with the same method.
        resolution: side of the training images in pixels; the base's own where it is not given.
        train_batch_size: images per process and accumulation round.
        gradient_accumulation_steps: rounds per optimisation step.
        max_train_steps: optimisation steps.
        learning_rate: the method's rate of the paper where it is not given; for boft, hra and variants, which are
            not in it, an untried guess.
        text_encoder_lr: learning rate of the text encoder(s); learning_rate where it is not given.
        lr_scheduler: any schedule of diffusers.
        lr_warmup_steps: optimisation steps of warm-up.
        lr_num_cycles: cycles of cosine_with_restarts.
        lr_power: exponent of polynomial.
        lr_step_rules: rules of piecewise_constant, such as "1:600,0.1:900,0.01".
        optimizer: adamw; adamw8bit needs bitsandbytes, prodigy prodigyopt (then learning_rate is a factor near 1).
        adam_beta1: first moment's decay.
        adam_beta2: second moment's decay.
        adam_weight_decay: 0, since the vectors are normalised and decay would change nothing but their step size.
        adam_epsilon: added to the root of the second moment.
        max_grad_norm: gradients are clipped to this norm; 0 turns it off.
        ema_decay: save and draw with the moving average of what is trained, often 0.99 to 0.999; the decay grows up to
            this, (1 + step) / (10 + step). Without it the last step counts.
        mixed_precision: no, fp16 or bf16; Accelerate's own configuration where it is not given.
        base_quantization: keep the frozen denoiser in fewer bits: nf4 or int8 (bitsandbytes), or fp8-storage; the
            adapter stays fp32.
        training_adapter: a LoRA or ETHER file that acts on the denoiser in training and not in drawing: for bases that
            were distilled to few steps.
        gradient_checkpointing: recompute activations in the backward: less memory, more time.
        allow_tf32: TF32 matrix products on NVIDIA cards.
        torch_compile: compile the denoiser, or its transformer blocks where diffusers knows them; on GPUs only.
        snr_gamma: γ of min-SNR loss weighting (arXiv 2303.09556), often 5; of SD and SDXL.
        weighting_scheme: of flow models, how σ is drawn: logit_normal, mode, none (uniform), or uniform with a weight
            of the loss: sigma_sqrt, cosmap. The base's own shift follows.
        logit_mean: of logit_normal; a positive one is more noise.
        logit_std: of logit_normal.
        mode_scale: of mode.
        guidance_scale_training: guidance that a base distilled with it (FLUX.1 dev) is told in training;
            3.5 as in diffusers' scripts where it is not given.
        max_sequence_length: tokens that prompts are cut and padded to, of the encoders that are not CLIP; as the
            pipeline does where it is not given.
        prompt_chunks: of SD and SDXL, chunks of 75 tokens that every prompt is encoded in; with 1, as the pipeline
            does it, what is longer is cut. auto is as many as the longest prompt of the run needs (docs/data.md).
        noise_offset: scale of a constant added to the noise of every channel, often 0.05 to 0.1.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: keep only so many of the newest checkpoints.
        validation_prompt: prompts of the sample grids; where none is given, for a subject its training prompt and three
            scenes that suit it.
        num_validation_images: samples per prompt.
        validation_steps: steps between sample grids.
        validation_seed: seed of the first sample of every prompt; the next has the next seed.
        num_inference_steps: denoising steps of samples and class images; the family's own where it is not given.
        guidance_scale: guidance of samples and class images; the family's own where it is not given.
        sampler: scheduler class of diffusers for samples, "base" for the base's own; DPM-Solver++ for SD and SDXL and
            the base's own for others where it is not given.
        dataloader_num_workers: processes that load images beside the training process.
        cache_dir: folder for encoded latents and prompts, which may be shared by runs; output_dir/cache by default.
        report_to: trackers besides metrics.jsonl: tensorboard, wandb.
        push_to_hub: upload the finished run to the Hugging Face Hub.
        hub_private: make a new repository private.
        hub_model_id: repository to upload to; the run folder's name where it is not given.
        export_lora: write what was learnt as an exact LoRA file, too, for tools that read LoRA, in this format
            (docs/elsewhere.md); it is uploaded with the rest.
    """

    OF_BASE: ClassVar[tuple[str, ...]] = (
        *("base_config", "revision", "variant", "resolution", "learning_rate"),
        *("num_inference_steps", "guidance_scale", "sampler"),
        *("instance_prompt", "class_prompt", "validation_prompt"),
    )
    """Settings whose values are good for one base, and which a recipe for another one may have."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "seed": SEED,
        "n_blocks": COUNT,
        "initial_length": POSITIVE,
        "rank": COUNT,
        "resolution": Range(8),
        "train_batch_size": COUNT,
        "gradient_accumulation_steps": COUNT,
        "max_train_steps": COUNT,
        "learning_rate": POSITIVE,
        "text_encoder_lr": AMOUNT,
        "lr_warmup_steps": AMOUNT,
        "lr_num_cycles": COUNT,
        "lr_power": POSITIVE,
        "adam_beta1": Range(0, 1, below=True),
        "adam_beta2": Range(0, 1, below=True),
        "adam_weight_decay": AMOUNT,
        "adam_epsilon": POSITIVE,
        "max_grad_norm": AMOUNT,
        "ema_decay": Range(0, 1, above=True, below=True),
        "snr_gamma": POSITIVE,
        "logit_mean": Range(-10, 10),
        "logit_std": POSITIVE,
        "mode_scale": Range(-1, 1.75),
        "guidance_scale_training": AMOUNT,
        "max_sequence_length": COUNT,
        "noise_offset": AMOUNT,
        "checkpointing_steps": COUNT,
        "checkpoints_total_limit": COUNT,
        "num_validation_images": AMOUNT,
        "validation_steps": COUNT,
        "validation_seed": SEED,
        "num_inference_steps": COUNT,
        "guidance_scale": AMOUNT,
        "dataloader_num_workers": AMOUNT,
    }
    """Of every number among the settings; a class that has more adds theirs."""

    LATER: ClassVar[frozenset[str]] = OF_FAMILIES - {"snr_gamma"} | {
        "base_quantization",
        "training_adapter",
        "ema_decay",
        "peft_config",
        "base_config",
        "initial_length",
    }
    """Settings that version 0.1 did not have; a class that has more adds theirs."""

    pretrained_model_name_or_path: str
    output_dir: Path
    base_config: str | None = None
    revision: str | None = None
    variant: str | None = None
    dry_run: bool = False
    overwrite: bool = False
    resume: str | None = None
    quiet: bool = False
    log_level: LogLevel = "info"
    seed: int = 0

    method: Method = "ether_plus"  # type: ignore[valid-type]
    n_blocks: int = 4
    initial_length: float = 1.0
    two_sided: bool = True
    targets: list[str] | str = "attention"
    rank: int = 4
    peft_config: dict[str, Any] | None = None
    train_text_encoder: bool = False

    resolution: int | None = None
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1200
    learning_rate: float | None = None
    text_encoder_lr: float | None = None
    lr_scheduler: Schedule = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    lr_step_rules: str | None = None
    optimizer: Optimizer = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    base_quantization: Quantization | None = None
    training_adapter: Path | None = None
    gradient_checkpointing: bool = False
    allow_tf32: bool = False
    torch_compile: bool = False
    snr_gamma: float | None = None
    weighting_scheme: Weighting = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    guidance_scale_training: float | None = None
    max_sequence_length: int | None = None
    prompt_chunks: int | Literal["auto"] = 1
    noise_offset: float = 0.0

    checkpointing_steps: int = 200
    checkpoints_total_limit: int | None = None
    validation_prompt: list[str] | str = field(default_factory=list)
    num_validation_images: int = 4
    validation_steps: int = 200
    validation_seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    dataloader_num_workers: int = 0
    cache_dir: Path | None = None
    report_to: list[Tracker] | Tracker = field(default_factory=list)
    push_to_hub: bool = False
    hub_private: bool = False
    hub_model_id: str | None = None
    export_lora: LoraFormat | None = None

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.cache_dir = None if self.cache_dir is None else Path(self.cache_dir)
        self.training_adapter = None if self.training_adapter is None else Path(self.training_adapter)
        if isinstance(self.validation_prompt, str):
            self.validation_prompt = [self.validation_prompt]
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if self.output_dir == Path():
            raise ValueError("output_dir must name a folder of the run's own")
        check_ranges(self, self.RANGES)
        self._check_peft()
        if self.initial_length != 1 and not self.entry.is_reflection:
            raise ValueError(f"initial_length is of the vectors of reflections, and method={self.method} has none")
        _ = self.family_settings  # a number of chunks has its range
        if self.resolution is not None and self.resolution % 8:
            below = max(8, self.resolution // 8 * 8)
            raise ValueError(f"resolution must be a multiple of 8 pixels, such as {below}, not {self.resolution}")
        if self.base_quantization is not None and self.entry.saved_as == "pipeline":
            raise ValueError(f"base_quantization is for a frozen base, and method={self.method} trains the base itself")
        if self.training_adapter is not None and (self.entry.needs_peft or self.entry.saved_as == "pipeline"):
            raise ValueError(
                f"training_adapter acts beside an adapter of this library (method={', '.join(OWN_METHODS)}), not "
                f"beside method={self.method}"
            )
        if self.export_lora is not None:
            self._check_export()
        if self.optimizer == "prodigy" and self.text_encoder_lr not in (None, self.resolved_learning_rate):
            raise ValueError("optimizer=prodigy has one learning rate for all: leave out text_encoder_lr")
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise ValueError('lr_scheduler=piecewise_constant needs lr_step_rules, such as "1:600,0.1:900,0.01"')

    def _check_peft(self) -> None:
        """Refuse a configuration of peft that cannot be one; peft itself says the rest."""
        if (self.peft_config is not None) != self.entry.is_any_of_peft:
            raise ValueError("method=peft needs peft_config, such as {peft_type: DELORA, r: 8}, and no other has it")
        if self.peft_config is not None:
            if "peft_type" not in self.peft_config:
                raise ValueError("peft_config needs peft_type, such as DELORA")
            if "target_modules" in self.peft_config:
                raise ValueError("peft_config: the layers are named by targets; leave out target_modules")
            _ = self.resolved_learning_rate  # which must be given

    def _check_export(self) -> None:
        """Refuse what no LoRA is equal to."""
        if not self.entry.is_reflection:
            able = ", ".join(entry.name for entry in METHODS.values() if entry.is_reflection)
            raise ValueError(f"export_lora writes what {able} learn, which has a low rank; not method={self.method}")
        if self.base_quantization is not None:
            raise ValueError(
                "export_lora is made of the base's weights, which base_quantization changes: leave it out, and call "
                "`ether export RUN FILE` after the training"
            )

    @property
    def chosen(self) -> frozenset[str]:
        """The settings which not every family has, and which are not left at their default."""
        return frozenset(
            each.name for each in fields(self) if each.name in OF_FAMILIES and getattr(self, each.name) != each.default
        )

    @property
    def resolved_learning_rate(self) -> float:
        """The denoiser's learning rate: as given, or the method's; for prodigy, which finds its own, 1."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == "prodigy" else self.default_rate.value

    @property
    def guessed_rate(self) -> bool:
        """Whether the learning rate is a default that was guessed."""
        return self.learning_rate is None and self.optimizer != "prodigy" and self.default_rate.source == "guessed"

    @property
    def entry(self) -> MethodEntry:
        """The method's entry in the registry."""
        return METHODS[self.method]

    @property
    def default_rate(self) -> Rate:
        """The method's learning rate where none is given.

        Raises:
            ValueError: the method learns nothing here.
        """
        return known_rate(self.entry.rate, self.method)

    def rate_of(self, component: str) -> float:
        """The learning rate of a trained component: that of the method, or of the text encoders."""
        if component.startswith("text_encoder") and self.text_encoder_lr is not None:
            return self.text_encoder_lr
        return self.resolved_learning_rate

    @property
    def encodes_prompts(self) -> bool:
        """Whether prompts are encoded in every step, since what encodes them is trained."""
        return self.train_text_encoder

    @property
    def target_patterns(self) -> str | tuple[str, ...]:
        """The targets as :func:`ether_diffusion.core.targets.find_targets` takes them."""
        return self.targets if isinstance(self.targets, str) else tuple(self.targets)

    def targets_of(self, component: str) -> str | tuple[str, ...]:
        """The projections of a component that the method acts on."""
        return self.section(AdapterSection).targets_of(component)

    def ether_config(self, component: str = "") -> EtherConfig:
        """The adapter's part of the settings, for the methods of this library."""
        return self.section(AdapterSection).ether_config(component)

    def section(self, kind: type[Section]) -> Section:
        """One of :mod:`ether_diffusion.training.sections`, taken out of the settings."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(kind)})  # type: ignore[arg-type]

    @property
    def family_settings(self) -> FamilySettings:
        """What the family of the base depends on; prompt_chunks=auto is 1 until the prompts are known."""
        chunks = 1 if self.prompt_chunks == "auto" else self.prompt_chunks
        return FamilySettings(self.guidance_scale_training, self.max_sequence_length, chunks)

    @property
    def cache_folder(self) -> Path:
        """Where latents, prompts and maps are cached."""
        return self.cache_dir or self.output_dir / "cache"

    @property
    def private_conditions(self) -> bool:
        """Whether the samples show conditions of the user's own training pairs."""
        return False

    @property
    def run(self) -> RunSection:
        """What the run folder needs of the settings."""
        return RunSection(
            self.output_dir,
            self.overwrite,
            self.resume,
            self.pretrained_model_name_or_path,
            self.to_dict(),
            self.hash(),
            self.inputs,
        )

    @property
    def repository(self) -> str | None:
        """The repository of the Hub to which the finished run goes, if it is to be uploaded."""
        return (self.hub_model_id or self.output_dir.resolve().name) if self.push_to_hub else None

    @property
    def inputs(self) -> dict[str, Path]:
        """From a setting to what the run reads under it on this machine; names of the Hub are no files."""
        return {
            each.name: Path(value)
            for each in fields(self)
            if each.name in INPUTS and (value := getattr(self, each.name)) is not None and Path(value) != Path()
        }

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain YAML and JSON values, in the order in which they are defined."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def hash(self) -> str:
        """Twelve hexadecimal digits that stand for the settings that a result depends on, not for where it is kept."""
        # as if there were none: hashes of 0.1 go on standing for the same
        later = {
            each.name for each in fields(self) if each.name in self.LATER and getattr(self, each.name) == each.default
        }
        settings = {key: value for key, value in self.to_dict().items() if key not in NOT_OF_THE_RESULT | later}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


NOT_OF_THE_RESULT = frozenset(
    {
        "output_dir",
        "dry_run",
        "overwrite",
        "resume",
        "quiet",
        "log_level",
        "dataloader_num_workers",
        "cache_dir",
        "validation_data_dir",
        "report_to",
        "push_to_hub",
        "hub_private",
        "hub_model_id",
        "export_lora",
        "checkpointing_steps",
        "checkpoints_total_limit",
    }
)
"""Settings that change where and how a run is kept, but not what it computes."""


def __getattr__(name: str) -> object:
    """Version 0.1 had the settings of DreamBooth here."""
    if name == "DreamBoothConfig":
        from ether_diffusion.training.dreambooth_config import DreamBoothConfig

        return DreamBoothConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def known_rate(rate: Rate | None, method: str) -> Rate:
    """A method's own learning rate.

    Raises:
        ValueError: it has none.
    """
    if rate is None:
        raise ValueError(f"method={method} has no learning rate of its own: give learning_rate")
    return rate
