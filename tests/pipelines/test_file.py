"""The adapter file: every bit back, every fault named, the last good file always there."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import before_file_calls, die, shake
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import ether_diffusion as ether
from ether_diffusion import AdapterFileError, EtherConfig
from ether_diffusion.core.host import host_of
from ether_diffusion.pipelines import file as checkpoint
from ether_diffusion.pipelines.file import FILE_NAME, AdapterFile, Hub
from ether_diffusion.pipelines.fingerprint import base_hash
from ether_diffusion.playground.tiny import tiny_pipeline

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.u"


def adapter_file(base: str = "") -> AdapterFile:
    """A file of one small adapter on the tiny UNet."""
    pipe = tiny_pipeline()
    adapter = ether.attach(pipe.unet, EtherConfig(targets=("mid_block.*.attn1.to_?",)))
    shake(adapter)
    return AdapterFile({"unet": adapter.state_dict()}, {"unet": adapter.config}, base, {"unet": "0123456789abcdef"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return adapter_file("my/base").write(tmp_path / "run")


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **metadata: str | None) -> None:
    """Write the file again with other tensors or metadata; None takes an entry out."""
    with safe_open(path, framework="pt") as file:
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        merged = {**file.metadata(), **metadata}
    save_file(tensors or old, path, {key: value for key, value in merged.items() if value is not None})


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("method", ["ether", "ether_plus", "naive", "anchored", "ether_plus_free"])
def test_round_trip_through_a_pipeline_is_exact(tmp_path: Path, method: str) -> None:
    first, second = tiny_pipeline(), tiny_pipeline()
    config = EtherConfig(method, n_blocks=2, targets=("to_q", "attn2.to_k"), seed=5)
    adapters = {
        "unet": ether.attach(first.unet, config, "dog"),
        "text_encoder": ether.attach(first.text_encoder, EtherConfig(method, n_blocks=8), "dog"),
    }
    for adapter in adapters.values():
        shake(adapter)
    ether.save(first, tmp_path / "run")
    ether.load(second, tmp_path / "run", name="cat")
    for component, adapter in adapters.items():
        host = host_of(getattr(second, component))
        assert host is not None
        loaded = host.adapters["cat"]
        assert loaded.config == adapter.config
        assert list(loaded.state_dict()) == list(adapter.state_dict())
        assert all(torch.equal(value, adapter.state_dict()[key]) for key, value in loaded.state_dict().items())
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["run", "run/file.safetensors"])
def test_a_folder_gets_the_standard_name_and_a_file_its_own(tmp_path: Path, name: str) -> None:
    path = adapter_file().write(tmp_path / name)
    assert path == (tmp_path / name if name.endswith(".safetensors") else tmp_path / name / FILE_NAME)
    assert os.listdir(path.parent) == [path.name]
    for source in (path, str(path), *([path.parent] if path.name == FILE_NAME else [])):
        assert set(AdapterFile.read(source).states["unet"]) == set(adapter_file().states["unet"])


def test_file_content_is_what_the_design_says(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.register_to_config(_name_or_path="hub/tiny-sd")
    ether.attach(pipe.unet, EtherConfig("ether_plus", n_blocks=2, targets=("mid_block.*.attn1.to_q",)))
    ether.attach(pipe.text_encoder, EtherConfig("ether", targets=("q_proj",)))
    path = ether.save(pipe, tmp_path)
    tensors = tensors_of(path)
    linear = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert set(tensors) == {f"unet.{linear}.{vector}" for vector in ("u", "v", "u_out", "v_out")} | {
        f"text_encoder.encoder.layers.{i}.self_attn.q_proj.u" for i in range(3)
    }
    assert all(value.dtype == torch.float32 for value in tensors.values())
    assert tensors[KEY].shape == (2, 32)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert set(metadata) == {"format_version", "ether_config", "base_model", "base_hash", "library_version"}
    assert metadata["format_version"] == "1"
    assert metadata["base_model"] == "hub/tiny-sd"
    assert metadata["library_version"] == ether.__version__
    assert json.loads(metadata["ether_config"])["unet"] == {
        "method": "ether_plus",
        "n_blocks": 2,
        "two_sided": True,
        "targets": ["mid_block.*.attn1.to_q"],
        "seed": 0,
    }
    assert json.loads(metadata["base_hash"]) == {
        "unet": base_hash(pipe.unet),
        "text_encoder": base_hash(pipe.text_encoder),
    }


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_file_cut_off_anywhere_is_refused(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    with pytest.raises(AdapterFileError, match="cannot be read as safetensors; it is damaged or cut off"):
        AdapterFile.read(saved)


def test_a_file_of_another_sort_is_refused(saved: Path) -> None:
    torch.save({"u": torch.ones(2)}, saved)
    with pytest.raises(AdapterFileError, match="cannot be read as safetensors"):
        AdapterFile.read(saved)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "4"}, "but of format 4: update ether-diffusion"),
        ({"format_version": None}, "has no format_version"),
        ({"ether_config": None}, "broken metadata.*ether_config"),
        ({"ether_config": "{"}, "broken metadata"),
        ({"ether_config": "[1]"}, "broken metadata"),
        ({"ether_config": '{"unet": 3}'}, "broken metadata"),
        ({"ether_config": '{"unet": {"metod": "ether"}}'}, r"unknown settings \['metod'\]"),
        ({"ether_config": '{"unet": {"method": "ethr"}}'}, "did you mean .*ether"),
        ({"ether_config": '{"unet": {"n_blocks": 0}}'}, "n_blocks must be a whole number of at least 1"),
        ({"ether_config": "{}"}, "vectors for nothing"),
        ({"ether_config": '{"vae": {}, "unet": {}}'}, "vectors for unet, vae; the components that an adapter can have"),
        ({"ether_config": '{"text_encoder": {}}'}, "holds the key unet.*, but its config names only text_encoder"),
        ({"base_hash": "[1]"}, "broken metadata"),
    ],
)
def test_broken_metadata_is_named(saved: Path, metadata: dict[str, str | None], message: str) -> None:
    rewrite(saved, **metadata)
    with pytest.raises(AdapterFileError, match=message):
        AdapterFile.read(saved)


def test_a_lora_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.ones(2, 2)}, path)
    with pytest.raises(AdapterFileError, match=r"is a LoRA, not an ETHER adapter: pipe.load_lora_weights loads it"):
        AdapterFile.read(path)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[KEY]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["unet.mid_block.extra.u"] = torch.ones(4, 16)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors[KEY] = tensors[KEY].reshape(8, 8)


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][0, 0] = float("nan")


def empty(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][0] = 0


FAULTS: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (drop, f"missing key: {KEY}"),
    (add, "unknown key: unet.mid_block.extra.u"),
    (reshape, rf"wrong shape: {KEY} is \(8, 8\), the model needs \(4, 16\)"),
    (spoil, f"not finite: {KEY} holds NaN or infinity"),
    (empty, f"zero vector: {KEY} has a row of length zero"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_every_fault_in_the_vectors_is_refused_and_nothing_attached(
    pipe: DiffusionPipeline, saved: Path, fault: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = tensors_of(saved)
    fault(tensors)
    rewrite(saved, tensors)
    with pytest.raises(AdapterFileError, match=message) as error:
        ether.load(pipe, saved)
    assert error.match(r"does not fit this StableDiffusionPipeline \(it was trained on my/base\)")
    assert ether.adapters(pipe) == {}
    assert host_of(pipe.unet) is None


def test_all_faults_come_in_one_error(pipe: DiffusionPipeline, saved: Path) -> None:
    tensors = tensors_of(saved)
    add(tensors)
    del tensors[KEY]
    tensors[KEY.replace("to_q", "to_k")][0, 0] = float("inf")
    rewrite(saved, tensors)
    with pytest.raises(AdapterFileError) as error:
        ether.load(pipe, saved)
    assert len(str(error.value).splitlines()) == 4


def test_a_file_of_another_architecture_is_refused(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    other = tiny_pipeline(xl=True)
    ether.attach(other.unet)
    ether.save(other, tmp_path)
    widths = other.unet.config.cross_attention_dim, pipe.unet.config.cross_attention_dim
    made, present = (f"a UNet with prompts of width {width}" for width in widths)
    with pytest.raises(AdapterFileError, match=f"made for {made}, this is {present}: load it into") as error:
        ether.load(pipe, tmp_path)
    assert len(str(error.value).splitlines()) == 2
    assert ether.adapters(pipe) == {}


def test_a_component_that_the_pipeline_lacks_is_named(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    other = tiny_pipeline(xl=True)
    ether.attach(other.text_encoder_2)
    ether.save(other, tmp_path)
    with pytest.raises(AdapterFileError, match="the pipeline has no text_encoder_2, which the file has vectors for"):
        ether.load(pipe, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/some-adapter", "someone/some-adapter: there is no such file or folder, and as a Hub id it could not"),
        ("/no/such/folder/anywhere", "/no/such/folder/anywhere: there is no such file or folder"),
        ("run.safetensors", "run.safetensors: there is no such file or folder"),
    ],
)
def test_a_source_that_cannot_be_found_gives_one_line(source: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as error:
        AdapterFile.read(source)
    assert len(str(error.value).splitlines()) == 1


def test_an_unfinished_run_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {FILE_NAME}: has its training finished"):
        AdapterFile.read(tmp_path)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "holds NaN or infinity"), (0.0, "a row of length zero")])
def test_broken_vectors_are_not_saved_and_the_old_file_stays(saved: Path, value: float, message: str) -> None:
    before = saved.read_bytes()
    file = adapter_file()
    file.states["unet"][KEY.removeprefix("unet.")].fill_(value)
    with pytest.raises(ValueError, match=rf"not saved: 1 vectors are broken, the first:\n.*{message}"):
        file.write(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [FILE_NAME]


def test_a_failing_disk_keeps_the_old_file_and_leaves_no_other(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        adapter_file("new").write(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [FILE_NAME]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("moment", "left"),
    [(2, "first"), (3, "first"), (4, "first"), (5, "second"), (99, "second")],
    ids=["half the bytes are written", "before the sync", "before the rename", "after it", "at the end"],
)
def test_a_process_killed_while_saving_leaves_a_whole_file(tmp_path: Path, moment: int, left: str) -> None:
    files = {name: adapter_file(name) for name in ("first", "second")}
    for vectors, file in enumerate(files.values()):
        for value in file.states["unet"].values():
            value.fill_(vectors + 1.0)
    path = files["first"].write(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            with before_file_calls(lambda call: die() if call == moment else None):
                files["second"].write(path)
            die()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    read = AdapterFile.read(path)
    assert read.base_model == left
    assert all((value == list(files).index(left) + 1.0).all() for value in read.states["unet"].values())
    assert len(os.listdir(tmp_path)) == (2 if left == "first" else 1)  # what was not finished lies beside it
    files["second"].write(path)
    assert AdapterFile.read(path).base_model == "second"


@pytest.mark.parametrize(
    ("present", "advice"),
    [
        ("pytorch_lora_weights.safetensors", "load_lora_weights"),
        ("model_index.json", "DiffusionPipeline.from_pretrained"),
        ("metrics.jsonl", "has its training finished?"),
    ],
)
def test_a_folder_without_an_adapter_says_what_it_holds(present: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / present).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=re.escape(advice)):
        AdapterFile.read(tmp_path)


def test_a_run_without_a_best_step_says_why(saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no judges, --dino and --clip, or none of its steps was scored"):
        AdapterFile.read(saved.parent, Hub(subfolder="best"))


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(checkpoint, "hf_hub_download", lambda name, file, **more: asked.append(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./dog", "runs/dog", "a/b/c", str(tmp_path / "dog")):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            AdapterFile.read(name)
    assert asked == []


def test_a_folder_of_many_subjects_names_them(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        adapter_file().write(tmp_path / "all" / name)
    with pytest.raises(FileNotFoundError, match=r"the runs of 2 subjects, cat, dog; load one of them: .*cat$"):
        AdapterFile.read(tmp_path / "all")
