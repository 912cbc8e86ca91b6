"""Finding the projections: counts of the true architectures on the meta device, presets, patterns, messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from helpers import shake, unet_inputs
from torch import nn

from ether_diffusion import EtherConfig, attach
from ether_diffusion.core.targets import PRESETS, find_targets
from ether_diffusion.playground.tiny import tiny_controlnet, tiny_text_encoder, tiny_tokenizer, tiny_unet

SD15: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD21 = SD15 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def on_meta(model_class: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return model_class(**settings)


@pytest.mark.parametrize(
    ("settings", "linears", "scalars"),
    [
        ({"method": "ether"}, 128, 99_456),
        ({"method": "ether", "n_blocks": 1}, 128, 99_456),
        ({"method": "ether_plus"}, 128, 398_592),
        ({"method": "ether_plus", "two_sided": False}, 128, 198_912),
        ({"method": "naive", "n_blocks": 4}, 128, 23_304_192),
        ({"method": "ether", "targets": "attention+geglu"}, 144, 111_936),
        ({"method": "ether_plus", "targets": "attention+geglu"}, 144, 623_232),
        ({"method": "ether", "targets": "attention+geglu_input"}, 144, 111_936),
        ({"method": "ether_plus", "targets": "attention+geglu_input"}, 144, 423_552),
    ],
)
def test_sd15_has_the_papers_parameter_counts(settings: dict[str, Any], linears: int, scalars: int) -> None:
    unet = on_meta(UNet2DConditionModel, SD15)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    adapter = attach(unet, EtherConfig(**settings))
    assert len(adapter.methods()) == linears
    assert adapter.num_parameters() == scalars


@pytest.mark.parametrize(
    ("architecture", "settings", "widths"),
    [
        # blocks: layers down, middle, layers up, times the transformer layers there
        ("SD 2.x", SD21, [(320, 5), (640, 5), (1280, 5), (1280, 1)]),
        ("SDXL", SDXL, [(640, 2 * 2 + 3 * 2), (1280, 2 * 10 + 10 + 3 * 10)]),
    ],
)
def test_counts_of_other_unets_follow_from_their_widths(
    architecture: str, settings: dict[str, Any], widths: list[tuple[int, int]]
) -> None:
    """In a transformer block of width w and text width c, six Linears are w → w and attn2's k and v are c → w."""
    adapter = attach(on_meta(UNet2DConditionModel, settings))
    text = settings["cross_attention_dim"]
    by_hand = sum(blocks * 2 * (6 * 2 * width + 2 * (text + width)) for width, blocks in widths)
    assert len(adapter.methods()) == 8 * sum(blocks for _, blocks in widths)
    assert adapter.num_parameters() == by_hand


def test_controlnet_of_sd15_has_the_encoder_half() -> None:
    adapter = attach(on_meta(ControlNetModel, SD15), EtherConfig("ether"))
    # two blocks on each of three levels and one in the middle; inputs 6 w + 2 · 768 each
    assert adapter.num_parameters() == sum(n * (6 * w + 2 * 768) for w, n in [(320, 2), (640, 2), (1280, 2), (1280, 1)])


@pytest.mark.parametrize("projection", [False, True], ids=["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_text_encoders_have_canonical_paths(projection: bool) -> None:
    encoder = tiny_text_encoder(tiny_tokenizer(), projection)
    expected = [
        f"encoder.layers.{layer}.self_attn.{name}"
        for layer in range(3)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    assert sorted(target.path for target in find_targets(encoder)) == sorted(expected)


@pytest.mark.parametrize("projection", [False, True], ids=["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_text_encoder_adapter_changes_its_output(projection: bool) -> None:
    encoder = tiny_text_encoder(tiny_tokenizer(), projection).eval()
    ids = torch.arange(77)[None] % 40
    with torch.no_grad():
        base = encoder(ids)[0]
        adapter = attach(encoder)
        assert torch.equal(encoder(ids)[0], base)
        shake(adapter)
        assert (encoder(ids)[0] - base).abs().max() > 1e-3


def test_self_and_cross_attention_partition_attention() -> None:
    unet = tiny_unet()
    everything, own, text = (
        {target.path for target in find_targets(unet, preset)} for preset in ("attention", "self", "cross")
    )
    assert own | text == everything
    assert not own & text
    assert all(".attn1." in path for path in own)
    assert all(".attn2." in path for path in text)
    for older, name in (("self_attention", own), ("cross_attention", text)):
        assert {target.path for target in find_targets(unet, older)} == name
    geglu = {target.path for target in find_targets(unet, "attention+geglu")} - everything
    assert geglu
    assert all(path.endswith("ff.net.0.proj") for path in geglu)


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (("to_q",), 8),
        (("attn2.to_k", "attn2.to_v"), 8),
        (("attn2.to_?",), 12),
        (("mid_block.*",), 12),  # eight projections, the feed-forward's two, the time embedding of two resnets
        (("to_q", "*.to_q"), 8),  # a Linear is taken once
        (("time_embedding.linear_1",), 1),
    ],
)
def test_patterns_match_the_ends_of_paths(patterns: tuple[str, ...], count: int) -> None:
    targets = find_targets(tiny_unet(), patterns)
    assert len(targets) == len({target.path for target in targets}) == count


def test_every_pattern_must_match() -> None:
    with pytest.raises(ValueError, match=r"no Linear of UNet2DConditionModel matches \['to_quuux'\]; its paths look"):
        find_targets(tiny_unet(), ("to_q", "to_quuux"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [("atention", 'did you mean "attention"'), ("xyz", r'for a name pattern pass a list: \["xyz"\]')],
)
def test_unknown_presets_name_the_known_ones(targets: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"the presets are attention, attention\+mlp, all, self, cross, ") as error:
        find_targets(tiny_unet(), targets)
    assert error.match(message)


def test_a_model_without_attention_is_refused() -> None:
    said = 'Sequential has no attention for targets="attention": the presets that find something in it are all; or give'
    with pytest.raises(ValueError, match=said):
        attach(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match='has no attention for targets="all": it has no Linear; or give name patterns'):
        attach(nn.Sequential(nn.Conv2d(4, 4, 1)), EtherConfig(targets="all"))


def test_torchs_own_attention_reads_its_weight_past_all_hooks() -> None:
    model = nn.ModuleDict({"pool": nn.MultiheadAttention(8, 2), "proj": nn.Linear(8, 8)})
    assert [target.path for target in find_targets(model, "all")] == ["proj"]


def test_presets_find_what_a_lora_wraps() -> None:
    import peft

    unet = tiny_unet()
    before = {preset: [target.path for target in find_targets(unet, preset)] for preset in PRESETS}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), unet)
    assert {preset: [target.path for target in find_targets(unet, preset)] for preset in PRESETS} == before


def test_n_blocks_that_does_not_divide_names_layer_width_and_shared_divisors() -> None:
    unet = tiny_unet(cross_attention_dim=24)  # widths 64 and 24: shared divisors 1, 2, 4, 8
    with pytest.raises(ValueError, match=r"attn2\.to_[kv]") as error:
        attach(unet, EtherConfig(n_blocks=16))
    assert error.match("n_blocks=16 does not divide the 24 features of ")
    assert error.match("all targets share these divisors: 1, 2, 4, 8$")
    assert attach(unet, EtherConfig(n_blocks=8)).num_parameters() > 0


def test_one_sided_methods_need_only_the_input_divided() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(8, 9)})
    with pytest.raises(ValueError, match="the 9 features of proj"):
        attach(model, EtherConfig(n_blocks=4, targets=("proj",)))
    attach(model, EtherConfig(n_blocks=4, two_sided=False, targets=("proj",)))


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([5]),
    }


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model, {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


@pytest.mark.parametrize(
    ("build", "linears", "idle"),
    [(sd3, 15, ["transformer_blocks.1.attn.add_q_proj"]), (flux, 12, [])],  # SD3's last block drops its text queries
)
def test_every_adapted_projection_of_a_transformer_acts(build: Any, linears: int, idle: list[str]) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        base = model(**inputs).sample
        adapter = attach(model)
        assert len(adapter.methods()) == linears
        assert torch.equal(model(**inputs).sample, base)
        shake(adapter)
        assert (model(**inputs).sample - base).abs().max() > 1e-3
    model.requires_grad_(False)
    model(**inputs).sample.square().sum().backward()
    without = {n.rpartition(".")[0] for n, p in adapter.named_parameters() if p.grad is None or not p.grad.any()}
    assert sorted(without) == idle


@pytest.mark.parametrize("xl", [False, True])
def test_every_adapted_projection_of_a_unet_acts(xl: bool) -> None:
    torch.manual_seed(0)
    unet = tiny_unet(xl).requires_grad_(False)
    inputs = unet_inputs(text_width=64 if xl else 32)
    if xl:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 32), "time_ids": torch.zeros(2, 6)}
    adapter = attach(unet)
    shake(adapter)
    unet(**inputs).sample.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_controlnet_adapter_changes_its_residuals() -> None:
    torch.manual_seed(0)
    controlnet = tiny_controlnet()
    shake(controlnet, scale=0.05)  # the zero convolutions would hide everything
    inputs = unet_inputs() | {"controlnet_cond": torch.rand(2, 3, 16, 16)}
    with torch.no_grad():
        base = controlnet(**inputs).mid_block_res_sample
        shake(attach(controlnet))
        assert (controlnet(**inputs).mid_block_res_sample - base).abs().max() > 1e-4


def test_what_unfusing_projections_leaves_behind_is_no_target() -> None:
    unet = tiny_unet()
    before = [target.path for target in find_targets(unet, ("*",))]
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    assert [target.path for target in find_targets(unet, ("*",))] == before
