"""Each stage of the build at its smallest: it learns, and a killed one goes on as if nothing had been."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

from ether_diffusion.playground.build import loop
from ether_diffusion.playground.build.assemble import assemble
from ether_diffusion.playground.build.autoencoder import AutoencoderStage
from ether_diffusion.playground.build.clip import ClipStage, fits
from ether_diffusion.playground.build.dino import DinoStage, cls_features
from ether_diffusion.playground.build.drawings import (
    CAPTIONS,
    draw_pool,
    load_pool,
    paired_scene,
    to_unit,
)
from ether_diffusion.playground.build.loop import Fp32Attention, Stage, step_generator, train
from ether_diffusion.playground.build.presets import BASES, PRESETS, STAGES, Training
from ether_diffusion.playground.build.project import Project
from ether_diffusion.playground.build.runner import CLASSES
from ether_diffusion.playground.build.unet import UnetStage
from ether_diffusion.playground.build.vocabulary import LENGTH, world_tokenizer
from ether_diffusion.playground.world import draw, random_caption, random_scene
from ether_diffusion.playground.world.individuals import reserved

CPU = torch.device("cpu")
SEED = 5
N = 12


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Twelve drawings, and an untrained autoencoder and CLIP for the unet."""
    preset = replace(PRESETS["trial"], scenes=N, pairs=N)
    project = Project(tmp_path_factory.mktemp("work"), preset, SEED, CPU)
    draw_pool(project.drawings, "scenes", SEED, N, workers=1)
    draw_pool(project.drawings, "pairs", SEED, N, workers=1)
    for stage in (AutoencoderStage(project), ClipStage(project)):
        stage.save(project.model(stage.name))
    return project


@pytest.fixture(scope="module")
def flow_project(project: Project, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same drawings, for a flow transformer beside the built base."""
    flow = replace(project, work=tmp_path_factory.mktemp("flow"), beside=built)
    draw_pool(flow.drawings, "scenes", SEED, N, workers=1)
    return flow


@pytest.fixture(scope="module")
def built(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build leaves behind, with untrained models."""
    for stage in (CLASSES[name](project) for name in project.stages):
        if not project.model(stage.name).exists():
            stage.save(project.model(stage.name))
    assemble(project, folder := tmp_path_factory.mktemp("built"))
    return folder


@pytest.fixture
def project_of(request: pytest.FixtureRequest) -> Callable[[str], Project]:
    """The project that a stage belongs to."""
    return lambda stage: request.getfixturevalue("flow_project" if stage in BASES["flow"] else "project")


def with_training(project: Project, name: str, training: Training) -> Project:
    return replace(project, preset=replace(project.preset, training={name: training}))


class Killed(BaseException):
    """SIGKILL, as far as the loop can tell."""


def kill_at(stage: Stage, calls: int) -> Callable[[torch.Generator], Tensor]:
    """The stage's loss, which dies in its call number ``calls``."""
    loss, count = stage.loss, 0

    def counted(dice: torch.Generator) -> Tensor:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed
        return loss(dice)

    return counted


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_goes_on_bit_for_bit(
    project_of: Callable[[str], Project], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # log_every does not divide save_every: the running mean of the loss must survive, too
    training = Training(5, 4, 2e-3, ema=0.5, warmup=2, save_every=2, log_every=5, validate_every=2)
    project = with_training(project_of(name), name, training)
    straight, fresh, killed, resumed = (CLASSES[name](project) for _ in range(4))
    assert states_equal(straight.network, killed.network)
    curve, fixed, steps, _ = train(straight, tmp_path / "straight", SEED)
    assert not states_equal(straight.network, fresh.network)

    monkeypatch.setattr(killed, "loss", kill_at(killed, 4))
    with pytest.raises(Killed):
        train(killed, tmp_path / "killed", SEED)
    monkeypatch.setattr(resumed, "loss", kill_at(resumed, 4))  # three steps are left after the checkpoint at two
    again, fixed_again, more, _ = train(resumed, tmp_path / "killed", SEED)
    assert states_equal(straight.network, resumed.network)
    assert (again, more) == (curve, steps) == (curve, 5)
    assert fixed_again == fixed
    assert [step for step, _ in fixed] == ([2, 4] if name == "flow" else [])
    assert [step for step, _ in curve] == [5]


FALLS = {"autoencoder": (25, 0.7), "clip": (25, 0.5), "segmenter": (30, 0.8), "unet": (30, 0.75), "flow": (40, 0.75)}
"""Steps, and the share of its first value below which the loss of one fixed batch must fall."""


@pytest.mark.parametrize("name", FALLS)
def test_a_stage_overfits_a_handful_of_scenes(project_of: Callable[[str], Project], name: str, tmp_path: Path) -> None:
    steps, share = FALLS[name]
    stage = CLASSES[name](with_training(project_of(name), name, Training(steps, 8, 5e-3, ema=0, warmup=1)))

    def fixed_loss() -> float:
        stage.network.train()  # batch norm by the batch: its running means lag behind so few steps
        with torch.no_grad():
            return stage.loss(torch.Generator().manual_seed(99)).item()

    before = fixed_loss()
    train(stage, tmp_path, SEED)
    assert fixed_loss() < share * before


def test_dino_brings_the_drawings_of_a_look_together(project: Project, tmp_path: Path) -> None:
    stage = DinoStage(with_training(project, "dino", Training(60, N, 3e-3, ema=0, warmup=5)))

    def margin() -> float:
        """Mean cosine of partners less that of strangers, after the common mean is removed."""
        with torch.no_grad():
            features = cls_features(stage.network, to_unit(stage.pairs.flatten(0, 1)))
        unit = nn.functional.normalize(features - features.mean(0), dim=-1).view(N, 2, -1)
        cosines = unit[:, 0] @ unit[:, 1].T
        return (cosines.diagonal().mean() - cosines.mean()).item()

    before = margin()
    train(stage, tmp_path, SEED)
    assert margin() > before + 0.15


class Parabola(Stage):
    """One weight and the loss w²."""

    name = "parabola"

    def __init__(self, training: Training) -> None:
        self.device, self.training = CPU, training
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.network.weight)
        self.weights: list[float] = []

    def loss(self, dice: torch.Generator) -> Tensor:
        self.weights.append(self.network.weight.item())
        return self.network.weight.square().sum()

    def save(self, folder: Path) -> None:
        raise AssertionError("the loop does not save models")

    def start_from(self, folder: Path) -> None:
        raise AssertionError("the loop does not load models")


def test_the_average_is_what_is_kept(tmp_path: Path) -> None:
    stage = Parabola(Training(6, 1, 0.1, ema=0.5, warmup=1))
    train(stage, tmp_path, 0)
    last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]["weight"].item()
    live = [*stage.weights[1:], last]
    average = 1.0
    for step, weight in enumerate(live, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert stage.network.weight.item() == pytest.approx(average, rel=1e-6)
    assert average != pytest.approx(live[-1], rel=1e-3)


def test_no_steps_leave_the_weights_alone(tmp_path: Path) -> None:
    stage = Parabola(Training(0, 1, 0.1))
    assert train(stage, tmp_path, 0).steps == 0
    assert stage.network.weight.item() == 1


RANK = """
import sys, torch
sys.path.insert(0, "tests/playground")
from pathlib import Path
from test_build_stages import Pulled, Training
from ether_diffusion.playground.build.loop import train
from accelerate import PartialState
PartialState(cpu=True)
stage = Pulled(Training(3, 4, 0.1, ema=0.5, warmup=1))
assert train(stage, Path(sys.argv[1]), 7).steps == 3
Path(f"weight-{PartialState().process_index}").write_text(repr(stage.network.weight.item()))
torch.distributed.destroy_process_group()  # gloo's threads must not outlive the interpreter
"""


class Pulled(Parabola):
    """One weight that is pulled towards the mean of the rows that this process drew."""

    def loss(self, dice: torch.Generator) -> Tensor:
        return (self.network.weight - self.rows(1000, dice).float().mean() / 1000).square().sum()


class Both(Pulled):
    """What two processes do, in one."""

    def loss(self, dice: torch.Generator) -> Tensor:
        step = self.step = getattr(self, "step", -1) + 1
        drawn = [step_generator(7, "parabola", step, CPU, process) for process in range(2)]
        rows = [torch.randint(1000, (2,), generator=part).float().mean() / 1000 for part in drawn]
        return torch.stack([(self.network.weight - each).square().sum() for each in rows]).mean()


@pytest.mark.slow
def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "rank.py"]
    (tmp_path / "rank.py").write_text(RANK.replace('"tests/playground"', repr(str(Path(__file__).parent))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    weights = [float((tmp_path / f"weight-{process}").read_text()) for process in range(2)]
    one = Both(Training(3, 4, 0.1, ema=0.5, warmup=1))
    train(one, tmp_path / "one", 7)
    assert weights == pytest.approx([one.network.weight.item()] * 2, rel=1e-6)


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialState(), "num_processes", 2)
    with pytest.raises(ValueError, match=r"parabola: a batch of 3"):
        train(Parabola(Training(1, 3, 0.1)), tmp_path, 0)


STARTED = {"autoencoder": "encoder.", "clip": "clip.text_model."}
"""What a stage that goes on from a finished build leaves alone: the unet was trained with it."""


@pytest.mark.parametrize("name", BASES["unet"])
def test_a_stage_goes_on_from_a_finished_build(built: Path, project: Project, name: str, tmp_path: Path) -> None:
    stage = CLASSES[name](with_training(project, name, Training(2, 4, 1e-3, ema=0, warmup=1)))
    stage.start_from(built)
    before = {key: value.clone() for key, value in stage.network.state_dict().items()}
    train(stage, tmp_path, SEED)
    moved = {key for key, value in stage.network.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    if frozen := STARTED.get(name):
        assert not [key for key in moved if key.startswith(frozen)]


def test_time_ends_a_stage_before_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock) / 2)  # half a second for each step
    stage = Parabola(Training(10**9, 1, 0.1, minutes=0.1))
    _, _, steps, seconds = train(stage, tmp_path, 0)
    assert 6 <= seconds < 7
    assert 1 < len(stage.weights) == steps <= 12
    again = Parabola(stage.training)
    train(again, tmp_path, 0)
    assert again.weights == []


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    training = Training(100, 1, 1.0, warmup=10)
    assert loop._warmth(training, 0, 0.0) == pytest.approx(0.1)
    assert loop._warmth(training, 50, 0.5) == pytest.approx(0.01 + 0.99 / 2)
    assert loop._warmth(training, 99, 1.0) == pytest.approx(0.01)


def test_a_loss_that_is_not_finite_ends_the_stage(tmp_path: Path) -> None:
    stage = Parabola(Training(10, 1, 0.1, log_every=1))
    nn.init.constant_(stage.network.weight, float("nan"))
    with pytest.raises(RuntimeError, match=r"parabola.*nan.*step 1"):
        train(stage, tmp_path, 0)


def test_embeddings_and_vectors_do_not_decay(project: Project) -> None:
    network = ClipStage(project).network
    held, free = loop._groups(network, 0.1)
    assert (held["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    rare = network.clip.text_model.embeddings.token_embedding.weight
    assert any(p is rare for p in free["params"])
    assert any(p is network.clip.text_projection.weight for p in held["params"])
    assert len(held["params"]) + len(free["params"]) == len(list(network.parameters()))


def test_attention_amid_autocast_runs_in_fp32_and_the_rest_does_not() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    exact = nn.functional.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        rough = nn.functional.scaled_dot_product_attention(query, key, value)
        with Fp32Attention():
            seen = nn.functional.scaled_dot_product_attention(query, key, value)
            projected = nn.functional.linear(query, weight)
    assert torch.equal(seen, exact)
    assert not torch.equal(rough.float(), exact)
    assert projected.dtype == torch.bfloat16
    with Fp32Attention():
        assert nn.functional.scaled_dot_product_attention(query.bfloat16(), key.bfloat16(), value.bfloat16()).dtype == (
            torch.bfloat16
        )


def test_step_generators_differ_by_step_and_stage() -> None:
    draws = {torch.rand(1, generator=step_generator(1, *key, CPU)).item() for key in (("a", 0), ("a", 1), ("b", 0))}
    assert len(draws) == 3
    first, second = (torch.rand(4, generator=step_generator(1, "a", 7, CPU)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_pool_holds_the_worlds_scenes_and_their_captions(project: Project) -> None:
    pool = load_pool(project.drawings, "scenes", N, ("pictures", "maps", "tokens", "said", "true"), CPU)
    tokenizer = world_tokenizer()
    for index in (0, 7, N - 1):
        scene = random_scene(SEED, index)
        drawing = draw(scene)
        assert np.array_equal(pool["pictures"][index].numpy(), np.asarray(drawing.image))
        assert np.array_equal(pool["maps"][index].numpy(), drawing.semantic_map)
        for k in range(CAPTIONS):
            caption = random_caption(scene, SEED, CAPTIONS * index + k)
            ids = tokenizer(caption).input_ids
            assert pool["tokens"][index, k, : len(ids)].tolist() == ids
            assert set(pool["tokens"][index, k, len(ids) :].tolist()) == {tokenizer.eos_token_id}
    assert fits(pool["true"], pool["said"][:, 0]).diagonal().all()


def test_drawn_chunks_stay_and_missing_ones_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ether_diffusion.playground.build.drawings.CHUNK", 2)
    draw_pool(tmp_path, "pairs", 3, 5, workers=1)
    first, second, third = sorted(tmp_path.iterdir())
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError, match="draw"):
        load_pool(tmp_path, "pairs", 5, ("pictures",), CPU)
    kept = first.stat().st_mtime_ns, third.stat().st_mtime_ns
    draw_pool(tmp_path, "pairs", 3, 5, workers=1)
    assert (first.stat().st_mtime_ns, third.stat().st_mtime_ns) == kept
    assert second.read_bytes() == content
    assert load_pool(tmp_path, "pairs", 5, ("pictures",), CPU)["pictures"].shape == (5, 2, 64, 64, 3)


@pytest.mark.slow
def test_worker_processes_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ether_diffusion.playground.build.drawings.CHUNK", 2)
    for name, workers in (("alone", 1), ("together", 2)):
        draw_pool(tmp_path / name, "scenes", 3, 4, workers)
    alone, together = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("alone", "together"))
    assert len(alone) == 2
    assert alone == together


def test_a_pair_is_one_look_in_two_scenes_and_no_individual() -> None:
    for index in range(0, 400, 2):
        a, b = paired_scene(9, index), paired_scene(9, index + 1)
        one, other = a.objects[0], b.objects[0]
        assert (one.kind, one.look) == (other.kind, other.look)
        assert a.background != b.background
        assert one.centre != other.centre
        assert not reserved(one.kind, one.look.coat)


def test_the_unet_sees_what_a_pipeline_would_encode(project: Project) -> None:
    stage, tokenizer = UnetStage(project), world_tokenizer()
    captions = ["a red robot on a beach", "a box"]
    tokens = tokenizer(captions, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    embeds = stage.prompt_embeds(tokens.short(), torch.tensor([False, True]))
    expected = tokenizer([captions[0], ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(embeds, stage.text_encoder(expected)[0], rtol=0, atol=0)
    assert embeds.shape[1] == LENGTH


def test_the_scaled_latents_have_unit_deviation(project: Project) -> None:
    assert UnetStage(project).latents.std().item() == pytest.approx(1, abs=2e-3)  # the weights were rounded to fp16
