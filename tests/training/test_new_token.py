"""A placeholder token trained beside the adapter: only its rows learn, and what is drawn is what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import build
from safetensors.torch import load_file
from training.helpers import draw, metrics, pixels, provenance, same_tensors, trained
from training.test_choosing import JUDGED, Likeness, likeness
from training.test_resume import assert_same_run

import ether_diffusion as ether
from ether_diffusion.export.tokens import read_tokens
from ether_diffusion.families.registry import family_of
from ether_diffusion.families.settings import FamilySettings, ObjectiveSettings
from ether_diffusion.pipelines.file import ADAPTER_FILES
from ether_diffusion.pipelines.learned_embeds import read_embeds
from ether_diffusion.pipelines.new_tokens import new_tokens
from ether_diffusion.playground.tiny import tiny_pipeline
from ether_diffusion.registry import OWN_METHODS
from ether_diffusion.runs.drawing import load_run
from ether_diffusion.training.batches import Batch
from ether_diffusion.training.dreambooth_config import TOKEN_RATE, DreamBoothConfig
from ether_diffusion.training.model import DenoisingModel
from ether_diffusion.training.new_token import make_token
from ether_diffusion.training.sections import NewTokenSection
from ether_diffusion.training.trainables import Trainable

__all__ = ["likeness"]

Train = Callable[..., Path]
Settings = Callable[..., DreamBoothConfig]
TOKEN, PROMPT = "<dog>", "a photo of <dog> x"
WITH: dict[str, Any] = {
    "placeholder_token": TOKEN,
    "initializer_token": "y",
    "num_vectors": 2,
    "token_lr": 1e-2,
    "instance_prompt": PROMPT,
    "validation_prompt": PROMPT,
}
ROWS = "tokens.text_encoder.rows"


def section(**changes: Any) -> NewTokenSection:
    values = {"placeholder_token": TOKEN, "initializer_token": "y", "num_vectors": 2, "token_steps": None, "seed": 0}
    return NewTokenSection(**values | changes)


def batch(prompts: list[str], prior: list[bool] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(7)
    shape = (len(prompts), 4, 16, 16)
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]]).float().repeat(len(prompts), 1)
    drawn = [torch.randn(shape, generator=generator) for _ in range(2)]
    times = torch.randint(0, 1000, (len(prompts),), generator=generator)
    return Batch(*drawn, times, prompts, sizes, torch.tensor(prior or [False] * len(prompts)))


def model_of(
    pipe: DiffusionPipeline, tokens: list[Trainable], encoding: FamilySettings | None = None, **changes: Any
) -> DenoisingModel:
    family = family_of(pipe, encoding)
    return DenoisingModel(family, tokens, family.objective(ObjectiveSettings()), **changes)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_gradients_are_those_of_dense_tables_in_diffusers_own_way(xl: bool, chunks: int) -> None:
    """The oracle: the tables grown by diffusers itself, trained whole by autograd."""
    said = " ".join(["x"] * 80 * (chunks - 1) + [PROMPT])  # of two chunks the second has the token
    prompts = [said, "a photo of an x", said]
    pipe, stock = tiny_pipeline(xl), tiny_pipeline(xl)
    for each in (pipe, stock):
        each.vae.requires_grad_(False)
        each.unet.requires_grad_(False)
    encoders = ["text_encoder", "text_encoder_2"][: 1 + xl]
    for name in encoders:
        getattr(pipe, name).requires_grad_(False)
        getattr(stock, name).requires_grad_(False)
    before = {name: {k: v.clone() for k, v in getattr(pipe, name).state_dict().items()} for name in encoders}
    encoding = FamilySettings(prompt_chunks=chunks)
    tokens = make_token(family_of(pipe), section())
    with torch.no_grad():
        known = {"a photo of an x": family_of(pipe, encoding).encode_prompt("a photo of an x")}
    model = model_of(pipe, tokens, encoding, prompt_embeds=known, placeholder_token=TOKEN)
    model([[batch(prompts)]])[0]["loss"].backward()

    if xl:
        stock.tokenizer_2 = tiny_pipeline().tokenizer
    tables = {}
    for token, name in zip(tokens, encoders, strict=True):
        encoder, tokenizer = getattr(stock, name), getattr(stock, name.replace("text_encoder", "tokenizer"))
        rows = token.parameters()[0].detach()
        stock.load_textual_inversion({TOKEN: rows}, text_encoder=encoder, tokenizer=tokenizer)
        tables[name] = encoder.get_input_embeddings().weight.requires_grad_(True)
    whole = model_of(stock, [], encoding)
    whole([[batch(prompts)]])[0]["loss"].backward()

    for token, name in zip(tokens, encoders, strict=True):
        (rows,), dense = token.parameters(), tables[name].grad
        assert rows.grad is not None
        assert dense is not None
        assert float(rows.grad.norm()) > 0
        torch.testing.assert_close(rows.grad, dense[-2:], rtol=1e-4, atol=1e-4 * float(dense[-2:].abs().max()))
        assert dense[:-2].abs().sum() > 0  # which the trained token's neighbours do not get here
        assert getattr(pipe, name).get_input_embeddings().weight.grad is None
    for name in encoders:
        now = getattr(pipe, name).state_dict()
        assert same_tensors(dict(now), before[name])


def test_rows_start_from_words_in_turn_or_from_noise_like_the_table() -> None:
    pipe = tiny_pipeline()
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    ids = pipe.tokenizer("y z", add_special_tokens=False).input_ids
    (token,) = make_token(family_of(pipe), section(initializer_token="y z", num_vectors=3))
    assert torch.equal(token.parameters()[0].detach(), table[[ids[0], ids[1], ids[0]]])
    noise = [
        make_token(family_of(tiny_pipeline()), section(initializer_token=None, num_vectors=64, seed=seed))[0]
        for seed in (0, 0, 1)
    ]
    first, again, other = (each.parameters()[0].detach() for each in noise)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std() / table.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initializer_token": "yes", "num_vectors": 2}, "'yes' is 3 tokens of the text_encoder.*num_vectors=3"),
        ({"initializer_token": " "}, "is 0 tokens"),
    ],
)
def test_what_a_token_cannot_start_from_is_refused(changes: dict[str, Any], message: str) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        make_token(family_of(pipe), section(**changes))
    assert TOKEN not in pipe.tokenizer.get_vocab()


def test_a_token_of_the_base_is_refused() -> None:
    pipe = tiny_pipeline()
    pipe.tokenizer.add_tokens(["<dog>"])
    with pytest.raises(ValueError, match="placeholder_token: the token <dog> is in the vocabulary already"):
        make_token(family_of(pipe), section())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder_token": "dog"}, "placeholder_token: the placeholder token 'dog' must be"),
        ({"placeholder_token": None}, "initializer_token is of a new token: add placeholder_token"),
        ({"method": "full"}, f"beside an adapter of {', '.join(OWN_METHODS)}, not beside full"),
        ({"with_prior_preservation": True, "class_prompt": "a <dog>"}, "class_prompt has the placeholder_token <dog>"),
        ({"optimizer": "prodigy"}, "one learning rate for all: leave out token_lr"),
        ({"num_vectors": 65}, "num_vectors"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: Settings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**WITH | changes)


def test_several_subjects_are_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train the subjects one by one, each with its own token"):
        settings(**WITH, subjects_dir=tmp_path, instance_data_dir=Path())


def test_prompts_without_the_token_are_refused(train: Train) -> None:
    with pytest.raises(ValueError, match="placeholder_token <dog> is in no prompt of the photos"):
        train(**WITH | {"instance_prompt": "a photo of x"})


def test_the_rate_of_the_token(settings: Settings) -> None:
    given = WITH | {"token_lr": None}
    assert settings(**given).rate_of(ROWS) == TOKEN_RATE
    assert settings(**given, optimizer="prodigy").rate_of(ROWS) == 1.0
    assert settings(**WITH, text_encoder_lr=1e-5).rate_of(ROWS) == 1e-2
    assert settings(**WITH).hash() != settings().hash()


def test_a_new_pipeline_draws_what_training_drew(train_with_samples: Train, base_folder: Path) -> None:
    """By ether.load, and by diffusers' own loader of the embeddings with the adapter beside it."""
    run = train_with_samples(**WITH, checkpointing_steps=3)
    drawn = pixels(run / "samples" / "step-000003" / "00.png")
    pipe = DiffusionPipeline.from_pretrained(base_folder)
    ether.load(pipe, run)
    assert np.array_equal(draw(pipe, PROMPT), drawn)
    ether.unload(pipe)
    assert not np.array_equal(draw(pipe, PROMPT), drawn)

    stock = DiffusionPipeline.from_pretrained(base_folder)
    stock.load_textual_inversion(str(run))
    adapter = ether.attach(stock.unet, ether.EtherConfig(**_adapter_settings(run)))
    state = {key.removeprefix("unet."): value for key, value in load_file(run / ADAPTER_FILES[0]).items()}
    adapter.load_state_dict(state)
    assert np.array_equal(draw(stock, PROMPT), drawn)


def _adapter_settings(run: Path) -> dict[str, Any]:
    pipe = tiny_pipeline()
    ether.load(pipe, run, "x")
    return ether.adapters(pipe)["x"].configs["unet"].to_dict()


def test_what_a_run_leaves(train: Train, pipes: list[DiffusionPipeline]) -> None:
    run = train(**WITH, checkpointing_steps=2, max_train_steps=4)
    (pipe,) = pipes
    fresh = tiny_pipeline().text_encoder.state_dict()
    assert same_tensors(dict(pipe.text_encoder.state_dict()), dict(fresh))  # bit for bit, and no row more
    rows = load_file(run / ADAPTER_FILES[1])
    assert list(rows) == [TOKEN]
    assert torch.equal(rows[TOKEN], trained(run, 4)[ROWS])
    assert not torch.equal(trained(run, 2)[ROWS], trained(run, 4)[ROWS])
    assert provenance(run)["trained_parameters"]["tokens.text_encoder"] == rows[TOKEN].numel()
    early = tiny_pipeline()
    ether.load(early, run / "checkpoints" / "step-000002")
    assert metrics(run)[0]["lr"]["tokens.text_encoder"] == 1e-2


HARD: dict[str, Any] = {
    "train_text_encoder": True,
    "with_prior_preservation": True,
    "class_prompt": "a photo of an x",
    "num_class_images": 3,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "ema_decay": 0.9,
    "token_steps": 5,
    "train_batch_size": 2,
}


@pytest.mark.parametrize("changes", [{}, HARD], ids=["plain", "everything on"])
def test_a_resumed_run_equals_the_uninterrupted_one(train: Train, changes: dict[str, Any]) -> None:
    common = WITH | changes | {"checkpointing_steps": 2, "num_validation_images": 1, "validation_steps": 2}
    straight = train("straight", max_train_steps=6, **common)
    run = train(max_train_steps=4, **common)
    train(max_train_steps=6, resume="latest", **common)
    assert_same_run(straight, run, 6)
    assert same_tensors(*(load_file(each / ADAPTER_FILES[1]) for each in (straight, run)))


def test_token_steps_end_the_training_of_the_token_alone(train: Train) -> None:
    run = train(**WITH, token_steps=2, max_train_steps=4, checkpointing_steps=1)
    states = [trained(run, step) for step in range(1, 5)]
    rows = [each.pop(ROWS) for each in states]
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1], rows[3])
    assert not same_tensors(states[1], states[3])
    assert [row["lr"]["tokens.text_encoder"] for row in metrics(run)] == [1e-2, 1e-2, 0.0, 0.0]


def test_the_average_is_what_is_saved(train: Train) -> None:
    run = train(**WITH, ema_decay=0.99, max_train_steps=4, checkpointing_steps=4)
    averaged = load_file(run / "checkpoints" / "step-000004" / "averaged.safetensors")[ROWS]
    saved = load_file(run / ADAPTER_FILES[1])[TOKEN]
    assert torch.equal(saved, averaged)
    assert not torch.equal(saved, trained(run, 4)[ROWS])


def test_rows_stay_fp32_beside_a_base_in_half_precision(train: Train, pipes: list[DiffusionPipeline]) -> None:
    run = train(**WITH, mixed_precision="bf16", checkpointing_steps=3)
    assert pipes[0].text_encoder.dtype == torch.bfloat16
    rows = load_file(run / ADAPTER_FILES[1])[TOKEN]
    assert rows.dtype == torch.float32
    assert not torch.equal(rows, rows.bfloat16().float())


def test_gradient_checkpointing_and_accumulation_change_nothing(train: Train) -> None:
    common = WITH | {"checkpointing_steps": 3, "train_batch_size": 2}
    plain = train("plain", **common)
    saving = train("saving", **common, gradient_checkpointing=True)
    accumulated = train("accumulated", **common | {"train_batch_size": 1}, gradient_accumulation_steps=2)
    for other in (saving, accumulated):
        torch.testing.assert_close(trained(other, 3)[ROWS], trained(plain, 3)[ROWS], rtol=0, atol=2e-4)


def test_prompts_with_the_token_are_encoded_in_every_step_and_others_once(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[tuple[str, ...]] = []
    family = type(family_of(tiny_pipeline()))
    original = family.encode_prompts

    def encode_prompts(self: Any, prompts: list[str]) -> dict[str, Any]:
        encoded.append(tuple(prompts))
        return original(self, prompts)

    monkeypatch.setattr(family, "encode_prompts", encode_prompts)
    train(**WITH, with_prior_preservation=True, class_prompt="an x", num_class_images=1, train_batch_size=2)
    assert encoded.count(("an x",)) == 1
    assert encoded.count((PROMPT,)) >= 3  # two photos of one prompt are encoded once a step
    assert set(encoded) == {("an x",), (PROMPT,)}


def test_its_vectors_count_in_chunks_and_are_drawn_in_as_many(train_with_samples: Train) -> None:
    long = "a photo of <dog> with <dog> x"
    many = WITH | {"num_vectors": 64, "instance_prompt": long, "validation_prompt": long, "token_lr": 0.3}
    run = train_with_samples(**many, prompt_chunks="auto", learning_rate=0.3)
    assert provenance(run)["prompt_chunks"] == 2
    pipe = load_run(run)
    said = ether.encode_prompts(pipe, long)
    assert said["prompt_embeds"].shape[1] == 2 * 77
    asked: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 7.5}
    (image,) = pipe(**said, **asked, generator=torch.Generator().manual_seed(0)).images
    drawn = pixels(run / "samples" / "step-000003" / "00.png").astype(int)
    assert np.abs(np.asarray(image) - drawn).max() <= 1
    with torch.no_grad():
        new_tokens(pipe)["default"].rows["text_encoder"][-1] += 1  # which only the second chunk has
    assert not torch.equal(ether.encode_prompts(pipe, long)["prompt_embeds"][:, 77:], said["prompt_embeds"][:, 77:])


@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_step_keeps_its_token(train: Train, likeness: Likeness, resumed: bool, tmp_path: Path) -> None:
    likeness([0, 0.1, 0.5, 0.3, 0.2, 0.2, 0.2])
    judged = WITH | JUDGED | {"validation_prompt": PROMPT, "class_prompt": "a photo of an x"}
    if resumed:
        train(**judged | {"max_train_steps": 4})
        shutil.rmtree(tmp_path / "run" / "best")
    run = train(**judged, **({"resume": "latest"} if resumed else {}))
    assert sorted(path.name for path in (run / "best").iterdir()) == sorted(ADAPTER_FILES)
    assert torch.equal(load_file(run / "best" / ADAPTER_FILES[1])[TOKEN], trained(run, 2)[ROWS])
    pipe = tiny_pipeline()
    ether.load(pipe, run, subfolder="best")
    assert ether.adapters(pipe)["default"].placeholder_token == TOKEN


def test_a_family_without_a_loader_is_refused() -> None:
    family = family_of(build("sd3"))
    with pytest.raises(ValueError, match=r"Stable Diffusion 3.* can learn no new token here, only Stable Diffusion 1"):
        make_token(family, section())
    assert TOKEN not in family.pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("averaged", [{}, {"ema_decay": 0.5}], ids=["last", "averaged"])
def test_the_lora_beside_the_result_goes_with_the_embeddings_that_lie_there(
    train: Train, averaged: dict[str, Any]
) -> None:
    pytest.importorskip("peft")
    run = train(export_lora="diffusers", **WITH | averaged)
    (embeds,) = read_tokens(run / "pytorch_lora_weights.safetensors")
    assert embeds.hash == read_embeds(run / "learned_embeds.safetensors").hash
    train(export_lora="diffusers", resume="latest", **WITH | averaged | {"max_train_steps": 5})
    (again,) = read_tokens(run / "pytorch_lora_weights.safetensors")
    assert again.hash != embeds.hash
