"""A crafted adapter file gives one error that names it, quickly and before anything is allocated."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention

import ether_diffusion as ether
from ether_diffusion import AdapterFileError, EtherConfig
from ether_diffusion.core.adapter import Adapter
from ether_diffusion.core.host import host_of
from ether_diffusion.core.targets import find_targets
from ether_diffusion.pipelines.control_encoder import ControlEncoder
from ether_diffusion.pipelines.file import AdapterFile
from ether_diffusion.pipelines.fitting import other_architecture
from ether_diffusion.pipelines.schema import HEADER_LIMIT, vector_shapes
from ether_diffusion.playground.tiny import tiny_pipeline

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.u"
Header = dict[str, Any]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small adapter with a control encoder."""
    pipe = tiny_pipeline()
    adapter = ether.attach(pipe.unet, EtherConfig("ether", targets=("mid_block.*.attn1.to_q",)))
    control = ControlEncoder.of(pipe.unet, pipe.vae_scale_factor)
    hashes = {"unet": "0123456789abcdef"}
    return AdapterFile({"unet": adapter.state_dict()}, {"unet": adapter.config}, "b", hashes, control).write(tmp_path)


def craft(path: Path, change: Callable[[Header], Any]) -> None:
    """Write the file again after ``change`` of its header; a change that returns text or bytes gives all of it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = json.dumps(header) if changed is None else changed
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def settings(part: str, component: str | None, **values: Any) -> Callable[[Header], None]:
    """Change settings that the metadata hold as JSON."""

    def change(header: Header) -> None:
        table = json.loads(header["__metadata__"][part])
        (table if component is None else table[component]).update(values)
        header["__metadata__"][part] = json.dumps(table)

    return change


def metadata(key: str, value: Any) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].update({key: value})


def tensor(**values: Any) -> Callable[[Header], None]:
    return lambda header: header[KEY].update(values)


def renamed(key: str) -> Callable[[Header], None]:
    return lambda header: header.update({key: header.pop(KEY)})


def both(*changes: Callable[[Header], Any]) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        for each in changes:
            each(header)

    return change


def embedding(**values: Any) -> Callable[[Header], None]:
    """A placeholder token in the metadata, with other values of it."""
    told = {"placeholder_token": "<dog>", "components": ["text_encoder"], "hash": 16 * "0"} | values
    return metadata("learned_embeds", json.dumps(told))


VERSION_2 = metadata("format_version", "2")
CRAFTED: dict[str, tuple[Callable[[Header], Any], str]] = {
    "deep header": (lambda _: "[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "header of a list": (lambda _: "[1, 2]", "its header is a list, no table"),
    "header of bytes": (lambda _: b"\xff\xfe" * 40, "cannot be read as safetensors"),
    "key twice": (lambda _: f'{{"{KEY}": 1, "{KEY}": 2}}', "twice"),
    "metadata of a list": (lambda header: header.update(__metadata__=[1]), "broken metadata"),
    "metadata of numbers": (metadata("base_model", 3), "'base_model' is 3, no text"),
    "deep config": (metadata("ether_config", "[" * 100_000), "ether_config: the JSON is nested too deeply"),
    "deep hash": (metadata("base_hash", '{"unet":' * 100_000), "base_hash: the JSON is nested too deeply"),
    "two_sided": (settings("ether_config", "unet", two_sided="no"), "two_sided is 'no', true or false is expected"),
    "n_blocks of text": (settings("ether_config", "unet", n_blocks="4"), "n_blocks is '4', a whole number"),
    "n_blocks of truth": (settings("ether_config", "unet", n_blocks=True), "n_blocks is True, a whole number"),
    "n_blocks enormous": (settings("ether_config", "unet", n_blocks=10**4000), "n_blocks is an enormous number"),
    "method": (settings("ether_config", "unet", method=["ether"]), "method is a list, a name is expected"),
    "targets": (settings("ether_config", "unet", targets={"to_q": 1}), "targets is a dict"),
    "targets of numbers": (settings("ether_config", "unet", targets=[1]), "targets is a list"),
    "targets without end": (settings("ether_config", "unet", targets=["*a"] * 10_000), "at most 4096 patterns"),
    "seed": (settings("ether_config", "unet", seed=2**70), "a whole number of 64 bits is expected"),
    "hash of another": (settings("base_hash", None, vae="0123456789abcdef"), "base_hash of 'vae', which the file"),
    "hash": (settings("base_hash", None, unet=12), "base_hash of 'unet' is 12, 16 hexadecimal digits"),
    "control of no channels": (settings("control_encoder", None, channels=[]), "channels is a list, a list of up to"),
    "control of text": (settings("control_encoder", None, channels="1234"), "channels is '1234'"),
    "control of terabytes": (settings("control_encoder", None, channels=[60_000] * 4), "by its settings"),
    "control of a width": (settings("control_encoder", None, out_channels=-1), "out_channels is -1"),
    "control of a sort": (settings("control_encoder", None, condition="smell"), "condition is 'smell'"),
    "control of a kind": (settings("control_encoder", None, kind="smell"), "kind is 'smell'"),
    "control of a class": (settings("control_encoder", None, classes="sky"), "classes is 'sky', a list of up to"),
    "control of classes": (settings("control_encoder", None, classes=["a"] * 5000), "classes is a list"),
    "control of a number": (settings("control_encoder", None, classes=[1]), "classes is a list"),
    "control of edges": (settings("control_encoder", None, thresholds=[1, "2"]), "thresholds is a list"),
    "control of one edge": (settings("control_encoder", None, thresholds=[1]), "a list of two whole numbers"),
    "control of a list": (metadata("control_encoder", "[1]"), "control_encoder is a list, no table"),
    "tensor of terabytes": (tensor(shape=[2**20, 2**22]), "another size than its shape says"),
    "tensor out of the file": (tensor(data_offsets=[0, 2**50]), "lies outside of the file"),
    "tensor of a fraction": (tensor(shape=[4, 16.0]), "has no shape"),
    "tensor of less than nothing": (tensor(shape=[-4, -16]), "has no shape"),
    "tensor of numbers": (
        tensor(dtype="I32"),
        r"holds unet.* in 'I32'; the dtypes of a vector are F64, F32, F16, BF16",
    ),
    "tensor of small floats": (tensor(dtype="F8_E4M3", shape=[4, 64]), "in 'F8_E4M3'"),
    "tensor of no sort": (tensor(dtype=3), "has no dtype"),
    "no tensor": (lambda header: header.update({KEY: None}), "is no tensor"),
    "tensor of one dimension": (tensor(shape=[64]), r"of shape \(64,\); it has 2 dimensions"),
    "overlap": (lambda header: header.update({f"{KEY}.u": dict(header[KEY])}), "overlap, or leave gaps"),
    "another vector": (renamed(f"{KEY}_out"), "the vectors of ether are u"),
    "part in version 1": (renamed(f"{KEY}.mlp"), r"the vectors of ether are u$"),
    "part of no sort": (both(VERSION_2, renamed(f"{KEY}.gate")), r"ether are u, or of parts such as u\.mlp$"),
    "part of the other side": (both(VERSION_2, renamed(f"{KEY}.q")), r"ether are u, or of parts such as u\.mlp$"),
    "part of no module": (both(VERSION_2, renamed("unet.u.mlp")), "the vectors of ether are u"),
    "part of a part": (both(VERSION_2, renamed(f"{KEY}.mlp.mlp")), "the vectors of ether are u"),
    "part of one dimension": (
        both(VERSION_2, renamed(f"{KEY}.mlp"), lambda header: header[f"{KEY}.mlp"].update(shape=[64])),
        r"of shape \(64,\); it has 2 dimensions",
    ),
    "part of a whole Linear": (both(VERSION_2, renamed(f"{KEY}.mlp")), "unknown key: unet.*u.mlp"),
    "version of tomorrow": (metadata("format_version", "4"), "of format 1 to 3 but of format 4: update"),
    "version of a token that is not named": (metadata("format_version", "3"), "format 3 and learned_embeds do not go"),
    "token in version 1": (embedding(), "format 1 and learned_embeds do not go together"),
    "token of a number": (embedding(placeholder_token=1), "placeholder_token is 1, a token is expected"),
    "token of no encoder": (embedding(components=[]), "components is a list, a list of text encoders"),
    "token of another part": (embedding(components=["vae"]), "components is a list, a list of text encoders"),
    "token without hash": (embedding(hash="0x"), "hash is '0x', 16 hexadecimal digits"),
    "vector of no module": (renamed("unet.u"), "the vectors of ether are u"),
    "key of a terminal": (renamed("unet.\x1b[2J.u"), "a key that is no module path"),
    "long key": (renamed("unet." + "a" * 5000 + ".u"), "a key that is no module path"),
}


@pytest.mark.parametrize(("change", "message"), CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_file_gives_one_error_that_names_it(
    pipe: DiffusionPipeline, saved: Path, change: Callable[[Header], Any], message: str
) -> None:
    craft(saved, change)
    with pytest.raises(AdapterFileError, match=message) as error:
        ether.load(pipe, saved)
    said = str(error.value)
    assert str(saved) in said
    assert len(said) < 3000
    assert "\x1b" not in said
    assert host_of(pipe.unet) is None


def test_a_header_that_claims_or_has_gigabytes_is_not_read(saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(struct.pack("<Q", 2**40) + content[8:])
    with pytest.raises(AdapterFileError, match="a header of 1099511627776 bytes in a file of"):
        AdapterFile.read(saved)
    saved.write_bytes(struct.pack("<Q", HEADER_LIMIT + 1))
    os.truncate(saved, 2 * HEADER_LIMIT)  # a sparse file
    with pytest.raises(AdapterFileError, match="that of an adapter has at most"):
        AdapterFile.read(saved)


def test_vectors_of_other_shapes_are_refused_before_the_adapters_are_made(
    pipe: DiffusionPipeline, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of a few bytes cannot have us make full matrices for every projection of a large model."""
    craft(saved, settings("ether_config", "unet", method="naive", n_blocks=1, targets="attention"))
    craft(saved, renamed(KEY.removesuffix("u") + "blocks"))
    craft(saved, lambda header: header[KEY.removesuffix("u") + "blocks"].update(shape=[1, 8, 8]))
    monkeypatch.setattr(Adapter, "__init__", lambda *_: pytest.fail("vectors were made"))
    with pytest.raises(AdapterFileError, match="missing key"):
        ether.load(pipe, saved)


def test_a_pipe_as_adapter_is_refused_and_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "dog.safetensors"
    os.mkfifo(path)
    with pytest.raises(AdapterFileError, match=r"dog\.safetensors is a named pipe"):
        AdapterFile.read(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_read(pipe: DiffusionPipeline, tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    adapter = ether.attach(tiny_pipeline().unet, EtherConfig("ether", targets=("mid_block.*.to_q",)))
    path = AdapterFile({"unet": adapter.state_dict()}, {"unet": adapter.config}).write(tmp_path)
    tensors = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(tensors, path, {"format_version": "1", "ether_config": json.dumps({"unet": adapter.config.to_dict()})})
    ether.load(pipe, path)
    host = host_of(pipe.unet)
    assert host is not None
    loaded = host.adapters["default"].state_dict()
    assert all(torch.equal(loaded[key.removeprefix("unet.")], value.float()) for key, value in tensors.items())


@pytest.mark.parametrize("method", ["ether", "ether_plus", "naive", "anchored", "ether_plus_free"])
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_shapes_of_the_schema_are_those_of_the_adapter(method: str, two_sided: bool, fused: bool) -> None:
    config = EtherConfig(method, n_blocks=2, two_sided=two_sided)
    model = Flux2ParallelSelfAttention(16, heads=2, dim_head=8, out_dim=16) if fused else tiny_pipeline().unet
    targets = find_targets(model, "all" if fused else "attention")
    expected = {
        f"{target.path}.{name}": shape
        for target in targets
        for name, shape in vector_shapes(config, target.inputs, target.outputs).items()
    }
    assert {key: tuple(value.shape) for key, value in Adapter(config, targets, "a").state_dict().items()} == expected


def test_an_adapter_of_another_family_is_called_by_its_name(pipe: DiffusionPipeline) -> None:
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.u"
    file = AdapterFile({"unet": {key: torch.ones(4, 512)}}, {"unet": EtherConfig("ether")})
    pipe.unet.register_to_config(cross_attention_dim=768)
    said = other_architecture(pipe, file)
    assert said is not None
    assert said.startswith("made for SDXL (prompts of width 2048), this is SD 1.x (prompts of width 768)")
    pipe.unet.register_to_config(cross_attention_dim=2048)
    assert other_architecture(pipe, file) is None
