"""Print how far the tuner is from dense fp64: ``PYTHONPATH=tests python tests/peft_tuner/figures.py``.

Largest error over the largest value, the worst of five models with other vectors and inputs each. The tests hold these
figures below their tolerances; this shows the figures themselves.
"""

from __future__ import annotations

import tempfile

import peft
import torch
from helpers import dense_weight, relative_error
from peft_tuner.models import KINDS, WIDE, add, config, dense, layers, small
from peft_tuner.test_precision import quantized, readable
from torch import Tensor, nn

BASES = ("fp32", "bf16", "nf4", "int8")
SEEDS = 5
NAMES = ["other", "default", "__base__", "other", "default", "__base__"]


def base(kind: str) -> nn.Module:
    if kind in ("nf4", "int8"):
        return quantized(kind, torch.float32)
    return small({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])


def measured(kind: str, variant: str, seed: int) -> dict[str, float | str]:
    """The errors of one layer."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(kind), config(variant)).eval()
    add(model, variant, "other", seed=seed + 100)
    layer = layers(model)["first"]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x = torch.randn(6, layer.in_features).to(dtype)
    weight = readable(layer.base_layer, kind) if kind in ("nf4", "int8") else layer.base_layer.weight
    weight = weight.detach().double()

    def right(name: str) -> Tensor:
        vectors = layer.ether_methods[name].state_dict(keep_vars=True) if name in layer.ether_methods else {}
        return x.double() @ (dense_weight(weight, vectors) if vectors else weight).T + layer.bias.double()

    output = layer(x)
    vectors = list(layer.ether_methods["default"].parameters())
    cotangent = torch.randn(6, WIDE).to(dtype)
    found = torch.autograd.grad((output * cotangent).sum(), vectors)
    expected = torch.autograd.grad((right("default") * cotangent.double()).sum(), vectors)
    mixed = torch.stack([right(name)[i] for i, name in enumerate(NAMES)])
    errors: dict[str, float | str] = {
        "forward": relative_error(output, right("default")),
        "gradients": relative_error(*(torch.cat([g.double().flatten() for g in each]) for each in (found, expected))),
        "mixed batch": relative_error(layer(x, adapter_names=NAMES), mixed),
    }
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base(kind), folder).eval()
        errors["save and load"] = "same bits" if torch.equal(layers(again)["first"](x), output) else "differs"
    if kind in ("nf4", "int8"):
        return {**errors, "merged weight": "refused", "unmerge": "refused"}
    expected_weight, before = dense(layer, {"default": 1.0}), layer.base_layer.weight.detach().clone()
    layer.merge()
    errors["merged weight"] = relative_error(layer.base_layer.weight, expected_weight)
    layer.unmerge()
    errors["unmerge"] = "same bits" if torch.equal(layer.base_layer.weight, before) else "differs"
    return errors


def main() -> None:
    columns = ["forward", "gradients", "mixed batch", "merged weight", "unmerge", "save and load"]
    print("| base | variant | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for kind in BASES:
        for variant in KINDS:
            runs = [measured(kind, variant, seed) for seed in range(SEEDS)]
            cells = []
            for column in columns:
                values = [run[column] for run in runs]
                numbers = [value for value in values if isinstance(value, float)]
                cells.append(f"{max(numbers):.0e}" if numbers else ", ".join(sorted({str(value) for value in values})))
            print(f"| {kind} | {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
