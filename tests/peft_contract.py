"""Run PEFT's own contract tests on the ETHER tuner: ``python tests/peft_contract.py FOLDER [FILE …]``.

FOLDER is the unpacked source of the installed PEFT, which has the tests; they are not kept here:

    pip download peft==0.21.2 --no-deps --no-binary :all: && tar xzf peft-0.21.2.tar.gz
    python tests/peft_contract.py peft-0.21.2

The lists of cases are replaced while pytest collects: every test that takes a configuration, or a class of them, gets
ours. Tests of one tuner's own are left out. In the place of models of the Hub stand small random ones of the same
architecture. A table by class of case is printed; the exit status is 1 if a test fails
that :func:`departure` does not name, or one passes that it does.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import pytest
import torch
import transformers

from ether_diffusion.peft_tuner import EtherPeftConfig

FILES = (
    "test_custom_models.py",
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)
TARGETS: dict[str, dict[str, Any]] = {
    "lin0 as an expression": {"target_modules": "lin0", "n_blocks": 2},
    "lin0": {"target_modules": ["lin0"], "n_blocks": 5},
    "lin0, lin1": {"target_modules": ["lin0", "lin1"], "n_blocks": 1},
    "lin0, lin1 whole": {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "n_blocks": 2},
}


@dataclass
class EtherPlus(EtherPeftConfig):
    """Two-sided, in blocks that fit PEFT's small models."""

    n_blocks: int = 1


@dataclass
class OneSided(EtherPeftConfig):
    """ETHER+ on the input side alone."""

    n_blocks: int = 1
    two_sided: bool = False


@dataclass
class Ether(EtherPeftConfig):
    """Plain ETHER."""

    n_blocks: int = 1
    variant: str = "ether"


@dataclass
class Anchored(EtherPeftConfig):
    """Two reflections, of which one is fixed."""

    n_blocks: int = 1
    variant: str = "anchored"


VARIANTS = (EtherPlus, OneSided, Ether, Anchored)
START = "plain ETHER does not start as the identity"
HALF = "vectors are fp32 even under autocast_adapter_dtype=False"
DEPARTURES = (START, HALF)
"""Why a test may fail: see :func:`departure`."""
HUB = "needs the Hub"
NO_HUB = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "couldn't connect to 'https://huggingface.co'")
"""What stands in the report of a test that has tried to download; it is counted apart."""
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
GATED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
STAND_INS: dict[str, Any] = {
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2),
    "gptj": lambda: transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=1024, initializer_range=0.2
    ),
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "qwen2": lambda: transformers.Qwen2Config(**GATED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GATED, head_dim=8),
    "t5": lambda: transformers.T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=1024, decoder_start_token_id=0
    ),
    "bart": lambda: transformers.BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=1024,
        init_std=0.2,
    ),
    "deberta": lambda: transformers.DebertaConfig(**SIZES, intermediate_size=64),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, intermediate_size=64, pad_token_id=1),
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=64),
}
"""Small random models in the place of those that PEFT's tests download, by what their names contain.

Where a text would not depend on the adapter, which some tests ask for, the weights are larger.
"""
MIXED = re.compile(
    r"if config_cls (!= LoraConfig|not in \([^)]*\)):(?P<skip>\s+(#.*\s+)?pytest\.skip\(f?\"Mixed adapter batches not)"
)
"""How PEFT's tests of mixed batches begin."""
AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel", "AutoModelForSequenceClassification")


def departure(name: str, config: type[EtherPeftConfig], arguments: dict[str, Any]) -> str | None:
    """Why a test must fail here; None where it must pass.

    Args:
        name: of the test function.
        config: its class of configurations.
        arguments: its other parameters.
    """
    if config is Ether and name in ("test_disable_adapters", "test_disable_adapters_with_merging"):
        return START  # both compare the output before any training with the base's
    half = arguments.get("dtype") in (torch.float16, torch.bfloat16)
    if name == "test_adapter_dtype_autocast" and half and not arguments["autocast_adapter_dtype"]:
        return HALF
    if name == "test_add_adapter_no_autocast_adapter_dtype":
        return HALF
    return None


def cases(argnames: str, theirs: list[Any]) -> list[Any] | None:
    """Our cases for a test that takes these arguments; None where it takes none of ours.

    Args:
        argnames: of the test, as pytest takes them.
        theirs: the cases of PEFT, HRA's among them.
    """
    names = [name.strip() for name in argnames.split(",")]
    if names == ["test_name", "model_id", "config_cls", "config_kwargs"]:
        return [(f"{cls.__name__}: {what}", "MLP", cls, kwargs) for cls in VARIANTS for what, kwargs in TARGETS.items()]
    if names == ["test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"]:
        one, other = [{"target_modules": [name], "init_weights": False} for name in ("lin0", "lin1")]
        return [
            (f"{cls.__name__} {what}", "ether", cls, one, second)
            for cls in VARIANTS
            for what, second in (("same", one), ("different", other))
        ]
    if names in (["config_cls"], ["config_class"]):
        return list(VARIANTS)
    if names == ["config_class", "mandatory_kwargs"]:
        return [(EtherPeftConfig, {})]  # it is found again by its type, so no subclass
    if names == ["config_cls", "config_kwargs"]:
        task = next(case[1]["task_type"] for case in theirs if case[0] is peft.HRAConfig)
        return [(cls, {"task_type": task, "target_modules": None, "n_blocks": 2}) for cls in VARIANTS]
    return None


def stand_in(name: str) -> Any:
    """``from_pretrained`` of an automatic class of transformers, which builds a small model for a name of the Hub."""
    auto = getattr(transformers, name)
    original = auto.from_pretrained

    def build(model_id: str, *arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> Any:
        kind = next((kind for kind in STAND_INS if kind in str(model_id).lower()), None)
        if kind is None or Path(model_id).exists():
            return original(model_id, *arguments, dtype=dtype, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(STAND_INS[kind]())
        model.name_or_path = model.config._name_or_path = model_id
        return model.eval().to(dtype or torch.float32)

    return build


class Contract:
    """The plugin: replaces cases, keeps the tests that got ours, counts outcomes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.classes: dict[str, str] = {}
        self.departures: dict[str, str | None] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Let tests that name a tuner comparable to ours be tests of ours."""
        original = metafunc.parametrize

        def parametrize(argnames: Any, argvalues: Iterable[Any], *args: Any, **kwargs: Any) -> None:
            values = list(argvalues)
            joined = argnames if isinstance(argnames, str) else ",".join(argnames)
            if joined == "model_id":
                values = [each for each in values if any(kind in each.lower() for kind in STAND_INS)]
            if _takes_any(values) and (ours := cases(joined, values)) is not None:
                values, kwargs = ours, {**kwargs, "ids": None}
            original(argnames, values, *args, **kwargs)

        metafunc.parametrize = parametrize  # type: ignore[method-assign]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep what got our cases."""
        kept = []
        for item in items:
            arguments = getattr(getattr(item, "callspec", None), "params", {})
            name = getattr(item, "originalname", item.name)
            found = next((value for value in arguments.values() if _is_ours(value)), None)
            if found is not None:
                kept.append(item)
                self.departures[item.nodeid] = departure(name, found, arguments)
                self.classes[item.nodeid] = f"{item.path.name} {item.nodeid.split('::')[1].split('[')[0]}"
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember how a test ended."""
        failed = report.outcome == "failed"
        if report.when == "call" or failed or (report.when == "setup" and report.outcome == "skipped"):
            text = str(report.longrepr) if failed else ""
            no_hub = any(words in text for words in NO_HUB)
            self.outcomes[report.nodeid] = (HUB if no_hub else report.outcome, text[-300:])


def _is_ours(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, EtherPeftConfig)


def _takes_any(values: list[Any]) -> bool:
    """Whether a list of cases has one of HRA, the tuner of PEFT that is nearest to ours."""
    return any(peft.HRAConfig in (value if isinstance(value, tuple) else (value,)) for value in values)


def main(folder: Path, *arguments: str) -> int:
    """Run the tests and print the table."""
    contract = Contract()
    for name in AUTO:
        getattr(transformers, name).from_pretrained = stand_in(name)
    with TemporaryDirectory() as temporary:
        package = Path(temporary) / "tests"
        shutil.copytree(folder / "tests", package)
        (package / "__init__.py").touch()  # the source distribution leaves it out
        with (package / "testing_utils.py").open("a") as file:
            file.write("\n\n@contextmanager\ndef hub_online_once(model_id):\n    yield\n")
        for path in package.glob("test*.py"):  # tests of mixed batches are for LoRA alone
            path.write_text(MIXED.sub(r"if False:\g<skip>", path.read_text()))
        files = [name for name in arguments if name in FILES] or FILES
        tests = [str(package / name) for name in files]
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", temporary]
        pytest.main(
            [*tests, *options, "--tb=short", *(each for each in arguments if each not in FILES)], plugins=[contract]
        )
    table: dict[str, Counter[str]] = {}
    unexpected = []
    for node, (outcome, message) in contract.outcomes.items():
        expected = contract.departures[node]
        if outcome == "failed" and expected is None:
            unexpected.append(f"failed: {node}\n    {message}")
        if outcome == "passed" and expected is not None:
            unexpected.append(f"passed, though it should not: {node}")
        reason = expected if outcome == "failed" and expected is not None else outcome
        table.setdefault(contract.classes[node], Counter())[reason] += 1
    columns = ["passed", "skipped", *DEPARTURES, HUB, "failed"]
    print(f"\npeft {peft.__version__}")
    print("| class of case | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    total: Counter[str] = Counter()
    for name, counts in table.items():
        total += counts
        print(f"| {name} | " + " | ".join(str(counts[column]) for column in columns) + " |")
    print("| all | " + " | ".join(str(total[column]) for column in columns) + " |")
    print("\n".join(unexpected))
    return 1 if unexpected or not table else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
