"""A LoRA file does what the adapter does, read by stock diffusers in a process that knows nothing of this package."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from export.conftest import adapted, shaken
from families.tiny import build
from helpers import before_file_calls
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ether_diffusion as ether
from ether_diffusion.core.host import host_of
from ether_diffusion.core.low_rank import Factors, low_rank_factors
from ether_diffusion.export import verify
from ether_diffusion.export.factors import ExportError
from ether_diffusion.export.lora import TOLERANCE
from ether_diffusion.export.verify import hollow_pipeline
from ether_diffusion.families.registry import FAMILIES, family_of
from ether_diffusion.pipelines.file import AdapterFileError

STOCK = """
import copy, json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
for base, lora, strength, given, out in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    dice = lambda: [torch.Generator().manual_seed(0)]
    draw = lambda: pipe(**copy.deepcopy(given), output_type="latent", generator=dice()).images
    before = draw()
    pipe.load_lora_weights(lora, adapter_name="it")
    pipe.set_adapters("it", strength)
    np.savez(out, before=before.numpy(), after=draw().numpy())
assert not [name for name in sys.modules if name.startswith("ether")]
"""
READ = [
    ("sd", "attention", ("text_encoder",), "kohya"),
    ("sd", "all", ("text_encoder",), "diffusers"),
    ("sdxl", "attention+mlp", ("text_encoder", "text_encoder_2"), "kohya"),
    ("sdxl", "all", ("text_encoder", "text_encoder_2"), "diffusers"),
    ("sdxl", "attention", ("text_encoder",), "comfyui"),
    ("sd3", "all", ("text_encoder", "text_encoder_2"), "diffusers"),
    ("sd3.5", "all", ("text_encoder",), "diffusers"),
    ("flux", "all", ("text_encoder",), "diffusers"),
    ("flux", "attention", (), "comfyui"),
    ("flux2", "all", (), "diffusers"),
    ("qwen_image", "all", (), "diffusers"),
    ("z_image", "all", (), "diffusers"),
    ("chroma", "all", (), "diffusers"),
    ("aura_flow", "all", (), "diffusers"),
    ("sana", "all", (), "diffusers"),
    ("lumina2", "all", (), "diffusers"),
    ("krea2", "attention", (), "diffusers"),
    ("ideogram4", "all", (), "diffusers"),
]


def test_stock_diffusers_draws_the_adapters_pictures(tmp_path: Path) -> None:
    """Every family whose LoRA diffusers reads, text encoders included, at strength 0.5, in one process of its own."""
    jobs, expected = [], []
    for number, (family, targets, encoders, kind) in enumerate(READ):
        pipe = adapted(family, targets, encoders=encoders)
        place = tmp_path / str(number)
        build(family).save_pretrained(place / "base")
        dtype = "float16" if number % 2 else "float32"
        made = ether.export_lora(pipe, place / "lora.safetensors", kind, strength=1.0, dtype=dtype)
        assert made.verified.difference <= TOLERANCE[dtype]
        guidance = family_of(pipe).drawing(["a dog"], 2.0)
        given = {"height": 32, "width": 32, "num_inference_steps": 2, **guidance}
        ether.set_adapters(pipe, "a", 0.5)
        dice = [torch.Generator().manual_seed(0)]
        mine = copy.deepcopy(given)  # Z-Image's pipeline writes its template into the list of prompts
        expected.append((dtype, pipe(**mine, output_type="latent", generator=dice).images.numpy()))
        jobs.append([str(place / "base"), str(place / "lora.safetensors"), 0.5, given, str(place / "drawn.npz")])
    ended = subprocess.run([sys.executable, "-c", STOCK, json.dumps(jobs)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for (dtype, mine), job, case in zip(expected, jobs, READ, strict=True):
        drawn = np.load(job[-1])
        effect = np.abs(mine - drawn["before"]).max()
        difference = np.abs(mine - drawn["after"]).max()
        assert effect > 1e-3, case
        assert difference <= (2e-2 if dtype == "float16" else 1e-3) * effect + 2e-5, (case, difference, effect)


CLIP = r"encoder_layers_\d+_self_attn_(q|k|v|out)_proj"
UNET = r"transformer_blocks_\d_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
JOINT = r"attn2?\.(to_(q|k|v|out\.0)|add_(q|k|v)_proj|to_add_out)"
DOTTED_CLIP = r"text_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"
T5 = r"text_encoders\.t5xxl\.transformer\.encoder\.block\.\d\.layer\.\d\.SelfAttention\.[qkvo]"
QWEN = r"transformer\.model\.layers\.\d+\.self_attn\.[qkvo]_proj"
FEED = r"ff(_context)?\.net\.(0\.proj|2)"
RULES = {
    ("sd", "kohya"): [
        rf"lora_unet_((down|up)_blocks_\d_attentions_\d|mid_block_attentions_0)_{UNET}",
        rf"lora_te_text_model_{CLIP}",
    ],
    ("sdxl", "kohya"): [
        rf"lora_unet_((input|output)_blocks_\d_1|middle_block_1)_{UNET}",
        rf"lora_te[12]_text_model_{CLIP}",
    ],
    ("sd3", "comfyui"): [
        rf"transformer\.transformer_blocks\.\d\.({JOINT}|{FEED})",
        rf"text_encoder(_2)?\.{DOTTED_CLIP}",
        T5,
    ],
    ("flux", "comfyui"): [
        rf"transformer\.(single_)?transformer_blocks\.\d\.({JOINT}|{FEED}|proj_(mlp|out))",
        rf"text_encoder\.{DOTTED_CLIP}",
        T5,
    ],
    ("flux2", "comfyui"): [
        rf"transformer\.transformer_blocks\.\d\.({JOINT}|ff(_context)?\.linear_(in|out))",
        r"transformer\.single_transformer_blocks\.\d\.attn\.to_(qkv_mlp_proj|out)",
        rf"text_encoders\.qwen3_4b\.{QWEN}",
    ],
    ("qwen_image", "comfyui"): [
        rf"transformer\.transformer_blocks\.\d\.({JOINT}|(img|txt)_mlp\.net\.(0\.proj|2))",
        rf"text_encoders\.qwen25_7b\.{QWEN}",
    ],
    ("z_image", "comfyui"): [
        r"transformer\.(layers|noise_refiner|context_refiner)\.\d\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])",
        rf"text_encoders\.qwen3_4b\.{QWEN}",
    ],
}
"""The keys that ComfyUI and kohya's scripts resolve, as docs/verification.md names their code."""
ENCODERS = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("text_encoder", "text_encoder_2"),
}


@pytest.mark.parametrize(("family", "kind"), RULES)
def test_every_key_is_one_that_its_reader_resolves(family: str, kind: str, tmp_path: Path) -> None:
    encoders = ENCODERS.get(family, ("text_encoder",))
    pipe = adapted(family, "attention+mlp", encoders=encoders)
    made = ether.export_lora(pipe, tmp_path / "lora.safetensors", kind)
    keys = load_file(tmp_path / "lora.safetensors").keys()
    ends = r"\.lora_(down|up)\.weight" if kind == "kohya" else r"\.lora_[AB]\.weight"
    rules = [rule + ends for rule in RULES[family, kind]]
    assert [key for key in keys if not any(re.fullmatch(rule, key) for rule in rules)] == []
    assert [rule for rule in rules if not any(re.fullmatch(rule, key) for key in keys)] == []
    assert len(keys) == 2 * made.layers
    assert not [key for key in keys if key.endswith("alpha")]
    stems = {key.split(".lora_")[0] for key in keys}
    assert len(stems) == made.layers, "no two layers have one name"


def test_layers_of_flux2_that_comfyui_knows_by_their_original_names(tmp_path: Path) -> None:
    ether.export_lora(adapted("flux2", "all"), tmp_path / "lora.safetensors", "comfyui")
    original = {key for key in load_file(tmp_path / "lora.safetensors") if key.startswith("diffusion_model.")}
    assert {key.split(".lora_")[0].removeprefix("diffusion_model.") for key in original} == {
        *("time_in.in_layer", "time_in.out_layer"),
        *("double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin"),
    }


def test_layers_of_chroma_that_comfyui_knows_by_their_original_names(tmp_path: Path) -> None:
    ether.export_lora(adapted("chroma", "all"), tmp_path / "lora.safetensors", "comfyui")
    original = {key for key in load_file(tmp_path / "lora.safetensors") if key.startswith("diffusion_model.")}
    assert {key.split(".lora_")[0].removeprefix("diffusion_model.distilled_guidance_layer.") for key in original} == {
        *("in_proj", "out_proj", "layers.0.in_layer", "layers.0.out_layer"),
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_family_offers_can_be_written(family: str, tmp_path: Path) -> None:
    pipe = adapted(family)
    for kind in family_of(pipe).LORA_FORMATS:
        made = ether.export_lora(pipe, tmp_path / f"{kind}.safetensors", kind)
        assert made.verified.effect > 1e-3
    with pytest.raises(ExportError, match="has no LoRA format 'a1111'; it has "):
        ether.export_lora(pipe, tmp_path / "other.safetensors", "a1111")


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    pipe = adapted("sdxl")
    ether.export_lora(pipe, tmp_path / "lora.safetensors", "kohya", strength=0.5)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["ss_network_module"] == "networks.lora"
    assert header["ss_network_dim"] == header["ss_network_alpha"] == "16"
    assert json.loads(header["ss_network_args"]) == {}
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.resolution"] == "64x64"
    origin = json.loads(header["ether_export"])
    assert origin["adapters"]["a"]["strength"] == 0.5
    assert origin["adapters"]["a"]["config"]["unet"]["method"] == "ether_plus"
    assert origin["base_hash"].keys() == {"unet"}
    assert origin["base_model"] == ""
    build("sdxl").save_pretrained(tmp_path / "my secret" / "base")
    local = DiffusionPipeline.from_pretrained(tmp_path / "my secret" / "base")
    shaken(ether.attach(local.unet, ether.EtherConfig(), "a"))
    ether.export_lora(local, tmp_path / "local.safetensors")
    with safe_open(tmp_path / "local.safetensors", "pt") as file:
        assert "secret" not in str(file.metadata())
        assert json.loads(file.metadata()["ether_export"])["base_model"] == "base"
    assert "relative" in origin["note"]


def test_loading_it_as_an_adapter_says_what_it_is(tmp_path: Path) -> None:
    pipe = adapted("sd")
    ether.export_lora(pipe, tmp_path / "lora.safetensors", "kohya")
    with pytest.raises(
        AdapterFileError, match=r"is a LoRA, made by ether.export_lora from .*a \([0-9a-f]{12}\).*load_lora_weights"
    ):
        ether.load(build("sd"), tmp_path / "lora.safetensors")
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "stranger.safetensors")
    with pytest.raises(AdapterFileError, match=r"is a LoRA, not an ETHER adapter: pipe.load_lora_weights loads it"):
        ether.load(build("sd"), tmp_path / "stranger.safetensors")


def test_a_lora_and_an_adapter_add_up_whoever_came_first(tmp_path: Path) -> None:
    other = adapted("z_image", name="b", method="ether")
    ether.export_lora(other, tmp_path / "lora.safetensors", dtype="float32")

    def draw(pipe: DiffusionPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        dice = [torch.Generator().manual_seed(0)]
        return pipe("a dog", 32, 32, 2, output_type="latent", generator=dice).images

    both = adapted("z_image")
    shaken(ether.attach(both.transformer, ether.EtherConfig("ether"), "b"), seed=len("transformer"))
    expected = draw(both)
    ether.save(both, tmp_path / "a.safetensors", "a")
    for lora_first in (True, False):
        pipe = build("z_image")
        if lora_first:
            pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
        ether.load(pipe, tmp_path / "a.safetensors")
        if not lora_first:
            pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
        torch.testing.assert_close(draw(pipe), expected, atol=1e-4, rtol=0)


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="there already"):
        ether.export_lora(adapted("sd"), tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").read_bytes() == b"mine"
    with pytest.raises(ExportError, match=r"must end in .safetensors"):
        ether.export_lora(adapted("sd"), tmp_path / "lora.ckpt")


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lora.safetensors"

    def slow(file: Path) -> dict[str, torch.Tensor]:
        path.write_bytes(b"another's")
        return load_file(file)

    monkeypatch.setattr(verify, "load_file", slow)
    with pytest.raises(FileExistsError, match="there already"):
        ether.export_lora(adapted("sd"), path)
    assert path.read_bytes() == b"another's"
    assert list(tmp_path.iterdir()) == [path]


def test_an_encoder_that_readers_ignore_is_refused(tmp_path: Path) -> None:
    for family, encoder in (("sd3", "text_encoder_3"), ("flux", "text_encoder_2"), ("z_image", "text_encoder")):
        with pytest.raises(ExportError, match=f"know no name for {encoder}"):
            ether.export_lora(adapted(family, encoders=(encoder,)), tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_to_export_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no adapter is loaded"):
        ether.export_lora(build("sd"), tmp_path / "lora.safetensors")
    with pytest.raises(ExportError, match="nothing to export"):
        ether.export_lora(adapted("sd"), tmp_path / "lora.safetensors", strength=0.0)
    with pytest.raises(ExportError, match="1 adapters but 2 strengths"):
        ether.export_lora(adapted("sd"), tmp_path / "lora.safetensors", strength=[1.0, 2.0])


def test_a_file_whose_check_fails_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = adapted("sd3")
    kind = type(family_of(pipe))
    with monkeypatch.context() as patched:  # a name that diffusers passes over
        patched.setattr(kind, "lora_stem", lambda family, component, path, kind: f"transformers.{path}")
        with pytest.raises(ExportError, match="diffusers reads 0 layers where 15 were written"):
            ether.export_lora(pipe, tmp_path / "lora.safetensors")

    def changed(path: Path) -> dict[str, torch.Tensor]:
        tensors = load_file(path)
        key = next(key for key in tensors if "to_q" in key)
        return tensors | {key: tensors[key] * 1.01}

    monkeypatch.setattr(verify, "load_file", changed)
    with pytest.raises(ExportError, match=r"differs by 1.0e-02 of the effect .* float16 may cost 1e-03"):
        ether.export_lora(pipe, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    pipe = adapted("sd")
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(1e12)
    with pytest.raises(ExportError, match="float16 cannot hold: export with dtype float32"):
        ether.export_lora(pipe, tmp_path / "lora.safetensors")
    ether.export_lora(pipe, tmp_path / "lora.safetensors", dtype="float32")


def test_the_check_does_not_trust_the_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> Factors:
        down, up = low_rank_factors(*arguments)  # type: ignore[arg-type]
        return Factors(down, 1.01 * up)

    monkeypatch.setattr("ether_diffusion.export.factors.low_rank_factors", wrong)
    with pytest.raises(ExportError, match=r"differs by 1.0e-02"):
        ether.export_lora(adapted("sd"), tmp_path / "lora.safetensors", dtype="float32")


def test_a_layer_that_has_hardly_moved_does_not_cost_the_file(tmp_path: Path) -> None:
    pipe = adapted("sd")
    (adapter,) = host_of(pipe.unet).adapters.values()  # type: ignore[union-attr]
    vectors = dict(adapter.named_parameters())
    with torch.no_grad():
        for name in [name for name in vectors if name.endswith((".v", ".v_out"))][:2]:
            u = vectors[name.replace(".v", ".u")]
            vectors[name].copy_(u + 1e-5 * torch.randn(u.shape, generator=torch.Generator().manual_seed(1)))
    made = ether.export_lora(pipe, tmp_path / "lora.safetensors")
    assert made.verified.difference < 1e-3


def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    ether.export_lora(adapted("sd"), tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_threads_may_export_at_once(tmp_path: Path) -> None:
    pipes = [adapted(family) for family in ("sd", "sd3", "sd", "sd3")]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda n: ether.export_lora(pipes[n], tmp_path / f"{n}.safetensors"), range(4)))
    assert all(each.verified.difference < 1e-3 for each in made)
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_what_is_no_setting_is_told(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ExportError, match="named twice"):
        ether.export_lora(adapted("sd"), path, name=["a", "a"])
    with pytest.raises(ExportError, match="finite"):
        ether.export_lora(adapted("sd"), path, strength=float("nan"))
    with pytest.raises(ExportError, match="dtype 'fp16' is none of float16"):
        ether.export_lora(adapted("sd"), path, dtype="fp16")  # type: ignore[arg-type]


def test_a_hostile_origin_is_no_traceback(tmp_path: Path) -> None:
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "lora.safetensors", {"ether_export": "[" * 100_000})
    with pytest.raises(AdapterFileError, match="is a LoRA"):
        ether.load(build("sd"), tmp_path / "lora.safetensors")


def test_a_base_is_checked_without_being_there_twice() -> None:
    family = family_of(adapted("sd3"))
    hollow = hollow_pipeline(family)
    assert hollow.vae is None
    assert family.pipe.vae is not None
    for name in family.components:
        for parameter in getattr(hollow, name).parameters():
            assert parameter.untyped_storage().nbytes() == 4


class Died(BaseException):
    """SIGKILL, as far as the file can tell."""


def test_a_kill_leaves_the_whole_file_or_none(tmp_path: Path) -> None:
    pipe, moments, whole = adapted("sd"), 0, 0

    def count(call: int) -> None:
        nonlocal moments
        moments = call

    with before_file_calls(count):
        ether.export_lora(pipe, tmp_path / "whole.safetensors")
    expected = load_file(tmp_path / "whole.safetensors")
    for moment in range(1, moments + 1):

        def die(call: int, last: int = moment) -> None:
            if call == last:
                raise Died

        path = tmp_path / f"{moment}.safetensors"
        with before_file_calls(die), pytest.raises(Died):
            ether.export_lora(pipe, path)
        if path.exists():
            whole += 1
            assert all(torch.equal(value, expected[key]) for key, value in load_file(path).items())
    assert moments >= 2
