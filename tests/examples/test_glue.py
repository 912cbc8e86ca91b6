"""``examples/glue.py``: its counts, its metrics, and a whole run on a tiny DeBERTa."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from examples_language import losses
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[2]
SENTENCES = [
    {"sentence": f"the film {verb} {how} {word}", "label": int(word == "good")}
    for verb in ("was", "is")
    for how in ("very", "so", "a", "the")
    for word in ("good", "bad")
]

GOOD = ["--train_file", "good.jsonl", "--validation_file", "good.jsonl"]
MODEL = ["--model", "deberta"]


@pytest.fixture
def glue() -> ModuleType:
    return importlib.import_module("glue")


@pytest.mark.parametrize(("method", "expected"), [("ether", 82_944), ("ether_plus", 331_776)])
def test_the_trained_numbers_are_the_papers(glue: ModuleType, method: str, expected: int) -> None:
    assert glue.count(glue.GlueConfig(method=method)) == (expected, 768 * 768 + 768 + 2 * 768 + 2)


def test_count_prints_and_ends(
    glue: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = str(ROOT / "examples" / "glue.yaml")
    monkeypatch.setattr(sys, "argv", ["glue.py", "--config", recipe, "--method", "ether", "--count"])
    glue.main()
    assert capsys.readouterr().out == "ether: 82,944 trained numbers and 592,130 in the head\n"


@pytest.mark.parametrize("method", ["ether", "ether_plus", "lora"])
def test_a_run_learns_and_its_folder_loads_again(
    glue: ModuleType, method: str, deberta_folder: Path, write: object, tmp_path: Path
) -> None:
    path = write("sst2.jsonl", SENTENCES)  # type: ignore[operator]
    out = tmp_path / "out"
    model = glue.finetune(
        glue.GlueConfig(
            model=str(deberta_folder), task="sst2", method=method, train_file=path, validation_file=path,
            output_dir=out, epochs=6, batch_size=4, learning_rate=2e-2,
        )
    )  # fmt: skip
    found = losses(out)
    assert found[-1] < 0.5 * found[0]
    results = json.loads((out / "results.json").read_text())
    assert results["scores"]["validation"]["eval_accuracy"] == 1.0
    assert results["head"] == 32 * 32 + 32 + 2 * 32 + 2

    start = AutoModelForSequenceClassification.from_pretrained(deberta_folder, num_labels=2)
    again = peft.PeftModel.from_pretrained(start, out)
    batch = AutoTokenizer.from_pretrained(out)(["the film was good", "so bad"], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(again.eval()(**batch).logits, expected, rtol=0, atol=0)
        with again.disable_adapter():  # the classifier of the base as well
            assert (again(**batch).logits - expected).abs().max() > 0.1


def test_the_adapter_itself_is_trained(glue: ModuleType, deberta_folder: Path, write: object, tmp_path: Path) -> None:
    path = write("sst2.jsonl", SENTENCES)  # type: ignore[operator]
    model = glue.finetune(
        glue.GlueConfig(
            model=str(deberta_folder), task="sst2", train_file=path, validation_file=path, max_steps=2,
            output_dir=tmp_path / "out", batch_size=4, learning_rate=1e-2,
        )
    )  # fmt: skip
    vectors = {name: value for name, value in model.named_parameters() if "ether_" in name}
    assert len(vectors) == 2 * 6 * 4  # layers, Linears, u, v, u_out, v_out
    assert all(value.requires_grad for value in vectors.values())
    moved = [name for name in vectors if name.endswith(".v") and not vectors[name].equal(vectors[f"{name[:-1]}u"])]
    assert len(moved) == 2 * 6


def test_full_finetuning_trains_all(glue: ModuleType, deberta_folder: Path, write: object, tmp_path: Path) -> None:
    path, out = write("sst2.jsonl", SENTENCES), tmp_path / "out"  # type: ignore[operator]
    glue.finetune(
        glue.GlueConfig(
            model=str(deberta_folder), task="sst2", method="full", train_file=path, validation_file=path, max_steps=2,
            output_dir=out, batch_size=4,
        )
    )  # fmt: skip
    start, end = (AutoModelForSequenceClassification.from_pretrained(place) for place in (deberta_folder, out))
    before = dict(start.named_parameters())
    assert not before["deberta.encoder.layer.0.output.dense.weight"].equal(
        dict(end.named_parameters())["deberta.encoder.layer.0.output.dense.weight"]
    )


def test_pairs_of_texts_and_a_regression(glue: ModuleType, deberta_folder: Path, write: object, tmp_path: Path) -> None:
    pairs = [
        {"sentence1": each["sentence"], "sentence2": "the film is good", "label": 5 * each["label"]}
        for each in SENTENCES
    ]
    path, out = write("stsb.jsonl", pairs), tmp_path / "out"  # type: ignore[operator]
    config = glue.GlueConfig(
        model=str(deberta_folder), task="stsb", train_file=path, validation_file=path, output_dir=out, epochs=8,
        batch_size=4, learning_rate=2e-2,
    )  # fmt: skip
    glue.finetune(config)
    assert losses(out)[-1] < 0.5 * losses(out)[0]
    scores = json.loads((out / "results.json").read_text())["scores"]["validation"]
    assert scores["eval_pearson"] > 0.9
    assert "eval_spearman" in scores


def test_the_metrics_are_their_definitions(glue: ModuleType) -> None:
    logits = np.array([[2, 1], [0, 1], [1, 3], [5, 1], [0, 1], [1, 0], [0, 9]])
    truth = np.array([0, 1, 0, 1, 1, 0, 1])
    task = glue.Task(("sentence",), (glue.accuracy, glue.f1, glue.matthews))
    found = glue.scores(task, SimpleNamespace(predictions=logits, label_ids=truth))
    tp, tn, fp, fn = 3, 2, 1, 1
    assert found["accuracy"] == pytest.approx((tp + tn) / 7)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / root)

    values, truth = np.array([[0.1], [0.4], [0.2], [0.9]]), np.array([1.0, 2.0, 3.0, 400.0])
    regression = glue.TASKS["stsb"]
    found = glue.scores(regression, SimpleNamespace(predictions=values, label_ids=truth))
    assert found["spearman"] == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))
    x, y = values[:, 0] - values.mean(), truth - truth.mean()
    assert found["pearson"] == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)))


def test_constant_answers_score_nothing(glue: ModuleType) -> None:
    zeros, truth = np.zeros(4), np.array([0.0, 1.0, 1.0, 0.0])
    assert (glue.matthews(zeros, truth), glue.f1(zeros, truth), glue.f1(zeros, zeros)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "mrcp"], 'did you mean "mrpc"'),
        (["--train_file", "a.jsonl"], "give both train_file and validation_file, or neither"),
        (["--train_file", "none.jsonl", "--validation_file", "none.jsonl"], "none.jsonl cannot be read"),
        (["--train_file", "bad.jsonl", "--validation_file", "bad.jsonl"], 'bad.jsonl, record 2: "sentence" must be'),
        (["--train_file", "class.jsonl", "--validation_file", "class.jsonl"], '"label" must be from 0 to 1'),
        (["--train_file", "empty.jsonl", "--validation_file", "empty.jsonl"], "empty.jsonl has no records"),
        ([*GOOD, "--model", "nothing/here"], "nothing/here cannot"),
        ([*GOOD, *MODEL, "--n_blocks", "5"], "n_blocks"),
        ([*GOOD, *MODEL, "--batch_size", "6", "--micro_batch_size", "4"], "no multiple of micro_batch_size 4"),
        (["--learning_rate", "-1"], "learning_rate must be above 0, not -1"),
        (["--warmup", "1"], "warmup must be"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    glue: ModuleType,
    arguments: list[str],
    message: str,
    deberta_folder: Path,
    write: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, records in {
        "good.jsonl": SENTENCES,
        "bad.jsonl": [SENTENCES[0], {"sentence": 3, "label": 1}],
        "class.jsonl": [{**SENTENCES[0], "label": 2}],
        "empty.jsonl": [],
    }.items():
        write(name, records)  # type: ignore[operator]
    monkeypatch.setattr(sys, "argv", ["glue.py", "--task", "sst2", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("language_settings").run(glue.main)
    assert message in str(ended.value)
    assert str(ended.value).startswith("glue.py: ")
    assert "\n" not in str(ended.value)
