"""clip-anytorch and transformers see and read alike; where the package is not installed, the error says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from ether_diffusion.metrics.backbones import ANYTORCH, load_clip
from ether_diffusion.playground.world import draw, random_scene


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip", None)
    with pytest.raises(ImportError, match=r"pip install 'ether-diffusion\[clip\]' 'setuptools<81'"):
        load_clip("anytorch:ViT-L/14")


def openai_state(model: CLIPModel) -> dict[str, Tensor]:
    """The weights of a CLIPModel under OpenAI's names."""
    state = model.state_dict()
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    norms["visual.ln_post"] = "vision_model.post_layernorm"
    layers = {"transformer": "text_model", "visual.transformer": "vision_model"}
    linears = {}
    for theirs, ours in layers.items():
        for number in range(getattr(model, ours).config.num_hidden_layers):
            here, there = f"{theirs}.resblocks.{number}", f"{ours}.encoder.layers.{number}"
            norms |= {f"{here}.ln_1": f"{there}.layer_norm1", f"{here}.ln_2": f"{there}.layer_norm2"}
            linears |= {f"{here}.attn.out_proj": f"{there}.self_attn.out_proj"}
            linears |= {f"{here}.mlp.c_fc": f"{there}.mlp.fc1", f"{here}.mlp.c_proj": f"{there}.mlp.fc2"}
            for part in ("weight", "bias"):
                joined = [state[f"{there}.self_attn.{name}_proj.{part}"] for name in "qkv"]
                found[f"{here}.attn.in_proj_{part}"] = torch.cat(joined)
    for theirs, ours in (norms | linears).items():
        found |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}
    return {key: value.contiguous() for key, value in found.items()}


def test_both_backends_score_alike_on_the_same_weights(tmp_path: Path) -> None:
    clip = pytest.importorskip("clip", reason="clip-anytorch needs torchvision, which is not installed")
    tokenizer = clip.simple_tokenizer.SimpleTokenizer()
    words = sorted(tokenizer.encoder, key=tokenizer.encoder.get)
    config = CLIPConfig(
        text_config={
            **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1},
            **{"vocab_size": len(words), "max_position_embeddings": 77, "hidden_act": "quick_gelu"},
            **{"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407},
        },
        vision_config={
            **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1},
            **{"image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu"},
        },
        projection_dim=32,
    )
    torch.manual_seed(3)
    model = CLIPModel(config).half().float().eval()  # clip.load rounds all weights to fp16, as OpenAI's files have them
    model.save_pretrained(tmp_path / "hf")
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64).save_pretrained(tmp_path / "hf")
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)]
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(tmp_path / "hf")
    torch.save(openai_state(model), tmp_path / "openai.pt")
    ours, theirs = load_clip(str(tmp_path / "hf")), load_clip(f"{ANYTORCH}{tmp_path / 'openai.pt'}")
    pictures = [draw(random_scene(2, n)).image.resize((90, 70)) for n in range(4)]
    prompts = ["a photo of a dog", "a small robot on a beach!"]
    torch.testing.assert_close(ours.image_features(pictures), theirs.image_features(pictures), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.text_features(prompts), theirs.text_features(prompts), atol=1e-5, rtol=0)
