from __future__ import annotations

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ether_diffusion.data.cache import JSON, TensorCache, module_hash, tensors_hash

KEY: dict[str, JSON] = {"model": "vae", "size": [64, 64]}


class Computation:
    """Counts its calls."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors or {"latents": torch.arange(6.0).reshape(2, 3)}
        self.calls = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return self.tensors


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def fill(folder: Path) -> Path:
    TensorCache(folder).get_or_compute(KEY, Computation())
    return only_file(folder)


def check_recomputed(path: Path, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The file at ``path`` is refused with a warning, and replaced by a good one."""
    computation = Computation()
    with caplog.at_level(logging.WARNING):
        tensors = TensorCache(path.parent).get_or_compute(KEY, computation)
    assert computation.calls == 1
    assert torch.equal(tensors["latents"], computation.tensors["latents"])
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert reason in caplog.messages[0]
    again = Computation()
    TensorCache(path.parent).get_or_compute(KEY, again)
    assert again.calls == 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_computes_once_per_key(tmp_path: Path, on_disk: bool) -> None:
    cache = TensorCache(tmp_path if on_disk else None)
    computation, other = Computation(), Computation(latents=torch.zeros(1))
    for _ in range(2):
        assert torch.equal(cache.get_or_compute(KEY, computation)["latents"], torch.arange(6.0).reshape(2, 3))
        assert torch.equal(cache.get_or_compute({**KEY, "size": [64, 72]}, other)["latents"], torch.zeros(1))
    assert (computation.calls, other.calls) == (1, 1)
    assert len(list(tmp_path.iterdir())) == (2 if on_disk else 0)


def test_order_of_the_key_does_not_matter() -> None:
    cache, computation = TensorCache(None), Computation()
    cache.get_or_compute({"a": 1, "b": {"c": 2, "d": 3}}, computation)
    cache.get_or_compute({"b": {"d": 3, "c": 2}, "a": 1}, computation)
    assert computation.calls == 1
    cache.get_or_compute({"a": "1", "b": {"c": 2, "d": 3}}, computation)
    assert computation.calls == 2


def test_another_run_reads_the_same_tensors(tmp_path: Path) -> None:
    storage = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "half": storage.to(torch.bfloat16),
        "view": storage[:, ::2],
        "shared": storage[:2],
        "transposed": storage.T.requires_grad_(),
        "scalar": torch.tensor(3),
    }
    first = TensorCache(tmp_path / "new" / "cache").get_or_compute(KEY, Computation(**tensors))
    computation = Computation()
    second = TensorCache(tmp_path / "new" / "cache").get_or_compute(KEY, computation)
    assert computation.calls == 0
    for result in (first, second):
        assert set(result) == set(tensors)
        for name, tensor in tensors.items():
            assert result[name].dtype == tensor.dtype
            assert not result[name].requires_grad
            assert torch.equal(result[name], tensor)


def test_file_is_named_by_the_hash_of_the_key_it_holds(tmp_path: Path) -> None:
    path = fill(tmp_path)
    canonical = '{"model":"vae","size":[64,64]}'
    assert path.name == hashlib.sha256(canonical.encode()).hexdigest() + ".safetensors"
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["key"]) == KEY


def test_truncated_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    check_recomputed(path, caplog, "not usable")


def test_flipped_bit_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    check_recomputed(path, caplog, "altered")


def test_file_of_another_key_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(tmp_path)
    tensors = {"latents": torch.zeros(1)}
    save_file(tensors, path, metadata={"key": "{}", "sha256": tensors_hash(tensors)})
    check_recomputed(path, caplog, "another key")


def test_file_without_a_key_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = fill(tmp_path)
    save_file({"latents": torch.zeros(1)}, path)
    check_recomputed(path, caplog, "another key")


def test_failed_computation_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise RuntimeError("out of memory")

    cache, computation = TensorCache(tmp_path), Computation()
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.get_or_compute(KEY, fail)
    assert list(tmp_path.iterdir()) == []
    cache.get_or_compute(KEY, computation)
    assert computation.calls == 1


def test_writers_of_one_key_do_not_disturb_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: TensorCache(tmp_path).get_or_compute(KEY, Computation()), range(40)))
    assert all(torch.equal(result["latents"], torch.arange(6.0).reshape(2, 3)) for result in results)
    assert caplog.messages == []
    assert only_file(tmp_path).suffix == ".safetensors"


def test_key_that_json_cannot_write_is_refused() -> None:
    with pytest.raises(TypeError):
        TensorCache(None).get_or_compute({"path": Path("a")}, Computation())  # type: ignore[dict-item]
    with pytest.raises(ValueError):
        TensorCache(None).get_or_compute({"scale": float("nan")}, Computation())


def linear(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).reshape(2, 3))
        layer.bias.zero_()
    return layer.to(dtype)


def test_module_hash_is_that_of_its_bytes() -> None:
    digest = hashlib.sha256()
    digest.update(b'["bias", "torch.float32", [2]]' + linear().bias.detach().numpy().tobytes())
    digest.update(b'["weight", "torch.float32", [2, 3]]' + linear().weight.detach().numpy().tobytes())
    assert module_hash(linear()) == digest.hexdigest()


def test_module_hash_sees_values_dtypes_shapes_and_names() -> None:
    changed = linear(torch.bfloat16)
    with torch.no_grad():
        changed.weight[1, 2] = -5.0
    reshaped = torch.nn.Linear(2, 3)
    with torch.no_grad():
        reshaped.weight.copy_(torch.arange(6.0).reshape(3, 2))
    modules = [linear(), linear(torch.bfloat16), linear(torch.float16), changed, reshaped]
    renamed = torch.nn.Sequential(linear())
    assert len({module_hash(module) for module in [*modules, renamed]}) == 6
    assert module_hash(linear(torch.bfloat16)) == module_hash(linear(torch.bfloat16))


def test_module_hash_ignores_the_memory_layout() -> None:
    convolution = torch.nn.Conv2d(3, 4, 3)
    before = module_hash(convolution)
    convolution.weight.data = convolution.weight.data.to(memory_format=torch.channels_last)
    assert not convolution.weight.is_contiguous()
    assert module_hash(convolution) == before


def test_module_without_bytes_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'(bias|weight)' is on the meta device.*load it first"):
        module_hash(torch.nn.Linear(2, 2, device="meta"))
