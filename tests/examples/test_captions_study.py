"""The study of language: its text, its rule for rates, its tables, and a whole tiny study that is resumed."""

from __future__ import annotations

import importlib
import json
import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ether_diffusion.evaluation.statistics import mean_interval
from ether_diffusion.playground.world import COLOURS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text() -> ModuleType:
    return importlib.import_module("captions_text")


@pytest.fixture
def study() -> ModuleType:
    return importlib.import_module("captions_study")


@pytest.fixture
def table() -> ModuleType:
    return importlib.import_module("captions_table")


def tiny(study: ModuleType, folder: Path, **more: object) -> object:
    given: dict[str, object] = {
        "output_dir": folder, "rates": {"ether": [0.01, 0.03], "full": [0.01]}, "most_rates": 2, "tuning_tasks": [7],
        "test_tasks": [0, 1], "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "base_steps": 3,
        "steps": 2, "examples": 8, "batch_size": 4, "scored": 8, "least_base": 0.0,
    }  # fmt: skip
    return study.CaptionsConfig(**{**given, **more})


def record(method: str, rate: float, task: int, shifted: float, part: str = "tuning") -> dict[str, object]:
    return {"part": part, "method": method, "learning_rate": rate, "task": task, "parameters": 10, "shifted": shifted,
            "retained": 0.5, "by_kind": {}, "seconds": 1.0}  # fmt: skip


def test_answers_are_words_of_the_caption(text: ModuleType) -> None:
    seen = set()
    for line in islice(text.lines(3, text.KINDS_OF_QUESTIONS, held_out=False), 300):
        caption = line.prompt[: line.prompt.index(";")]
        seen.add(line.kind)
        assert line.answer[-1] == "."
        if line.kind == "colour":
            words = [word for word in line.answer[:-1] if word != "and"]
            assert set(words) <= set(caption) & set(COLOURS)
            assert line.prompt[-2] in caption  # the object that is asked about
        elif line.kind == "say":
            assert line.answer == (line.prompt[-2], ".")
        elif line.kind == "wear" and line.answer[0] != "nothing":
            assert set(line.answer[:-1]) - {"and"} <= set(caption)
    assert seen == set(text.KINDS_OF_QUESTIONS)


def test_no_caption_is_both_trained_on_and_held_out(text: ModuleType) -> None:
    def captions(seed: int, held_out: bool) -> set[tuple[str, ...]]:
        lines = islice(text.lines(seed, ("place",), held_out), 400)
        return {line.prompt[: line.prompt.index(";")] for line in lines}

    assert not captions(0, held_out=False) & captions(0, held_out=True)
    assert not captions(0, held_out=False) & captions(1, held_out=True)


def test_a_task_renames_every_colour_in_answers_only(text: ModuleType) -> None:
    codes = text.permutation(4)
    assert set(codes) == set(COLOURS)
    assert set(codes.values()) == set(text.CODES)
    assert len({tuple(text.permutation(task).values()) for task in range(8)}) == 8
    plain = list(islice(text.lines(3, ("colour", "wear"), held_out=False), 60))
    shifted = list(islice(text.lines(3, ("colour", "wear"), held_out=False, codes=codes), 60))
    for before, after in zip(plain, shifted, strict=True):
        assert after.prompt == before.prompt
        renamed = tuple(codes.get(word, word) for word in before.answer) if before.kind == "colour" else before.answer
        assert after.answer == renamed


def test_the_vocabulary_has_every_word(text: ModuleType) -> None:
    vocabulary = text.Vocabulary()
    for seed in (11, 12):
        for line in islice(text.lines(seed, text.KINDS_OF_QUESTIONS, held_out=seed == 12), 1500):
            assert set(line.prompt) | set(line.answer) <= set(vocabulary.ids)


def test_targets_are_the_answers(text: ModuleType) -> None:
    vocabulary = text.Vocabulary(200)
    chosen = list(islice(text.lines(3, text.KINDS_OF_QUESTIONS, held_out=False), 5))
    ids, mask, targets = vocabulary.batch(chosen)
    for line, row, real, target in zip(chosen, ids, mask, targets, strict=True):
        words = [vocabulary.words[index] for index in row[real.bool()]]
        assert tuple(words) == line.prompt + line.answer
        assert tuple(vocabulary.words[index] for index in target[target >= 0]) == line.answer
        assert len(target) - len(line.answer) == int((target == text.IGNORED).sum())


def test_exact_match_is_what_the_model_writes_by_itself(study: ModuleType, tmp_path: Path) -> None:
    """Against greedy decoding, one line at a time without padding, on a model that is sometimes right."""
    config = tiny(study, tmp_path, hidden_size=32, base_steps=60, batch_size=32, base_learning_rate=1e-2, scored=48)
    own = study.Study(config)
    own.train_base()
    model = own._new_model()
    model.load_state_dict(study.load_file(own._weights))
    ids = own.vocabulary.ids
    right = 0
    for line in islice(study.lines(study.HELD_OUT_SEED, ("place",), held_out=True), config.scored):
        said = torch.tensor([[ids[word] for word in line.prompt]])
        for _ in line.answer:
            with torch.no_grad():
                said = torch.cat([said, model(input_ids=said).logits[:, -1:].argmax(-1)], 1)
        right += said[0, len(line.prompt) :].tolist() == [ids[word] for word in line.answer]
    assert 0 < right < config.scored
    assert own.score(model, "place") == right / config.scored


def test_a_study_runs_resumes_and_gives_its_tables(
    study: ModuleType, table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    finetune, train_base = study.Study.finetune, study.Study.train_base
    monkeypatch.setattr(study.Study, "finetune", lambda self, job: (done.append(job.key), finetune(self, job)))
    monkeypatch.setattr(study.Study, "train_base", lambda self: (done.append("base"), train_base(self)))
    config = tiny(study, tmp_path)
    first = study.Study(config).run()
    assert done[0] == "base"
    # "full" starts with one rate and, since that has no neighbour, gets one more
    assert len([key for key in done if key.startswith("tuning/")]) == 2 + 2
    assert len([key for key in done if key.startswith("test/")]) == 2 * 2
    assert first["base"]["parameters"] == sum(each.numel() for each in study.Study(config)._new_model().parameters())
    ether = next(job for job in first["jobs"] if job["method"] == "ether")
    assert ether["parameters"] == 6 * 16 + 32  # the input features of seven Linears

    undone = study.Study(config).record("test/" + done[-1].removeprefix("test/"))
    assert undone.is_file()
    expected = json.loads(undone.read_text())
    undone.unlink()
    again, done[:] = done[-1], []
    second = study.Study(config).run()
    assert done == [again]
    found = json.loads(undone.read_text())
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}  # the same numbers, too

    rows = table.methods_table(second).splitlines()
    assert len(rows) == 2 + 2 + 1
    assert rows[-1].startswith("| *base* |")
    assert "ETHER" in table.rates_table(second)


def test_a_folder_of_another_study_is_refused(study: ModuleType, tmp_path: Path) -> None:
    study.Study(tiny(study, tmp_path))
    study.Study(tiny(study, tmp_path, threads=2))
    with pytest.raises(importlib.import_module("language_settings").InputError, match="another steps"):
        study.Study(tiny(study, tmp_path, steps=3))


def test_two_processes_share_the_jobs(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that another process holds is waited for, not done twice."""
    own = study.Study(tiny(study, tmp_path))
    held = study.claimed(tmp_path, "a")
    held.__enter__()
    done: list[str] = []

    def other_ends(seconds: float) -> None:
        own.record("a").parent.mkdir(parents=True, exist_ok=True)
        own.record("a").write_text("{}")
        held.__exit__(None, None, None)
        monkeypatch.setattr(study.time, "sleep", lambda seconds: None)

    monkeypatch.setattr(study.time, "sleep", other_ends)
    own._share(["a", "b"], done.append)
    assert done == ["b"]


def test_the_best_rate_has_the_highest_mean_over_tuning_tasks(table: ModuleType) -> None:
    jobs = [record("ether", rate, task, shifted) for rate, task, shifted in
            [(0.01, 0, 0.2), (0.01, 1, 0.6), (0.03, 0, 0.9), (0.03, 1, 0.1), (0.1, 0, 0.3), (0.1, 1, 0.3)]]  # fmt: skip
    jobs += [record("ether", 0.003, 0, 1.0, part="test")]  # a test task chooses nothing
    jobs[2]["retained"] = jobs[3]["retained"] = 0.3
    assert table.mean_scores(jobs, "ether") == pytest.approx({0.01: 0.45, 0.03: 0.4, 0.1: 0.4})
    assert table.best_rate(jobs, "ether") == 0.01


def test_the_grid_grows_until_the_best_has_neighbours(table: ModuleType) -> None:
    def grown(scores: dict[float, float], limit: int = 6) -> float | None:
        return table.further_rate(
            [record("lora", *pair) for pair in [(r, 0, s) for r, s in scores.items()]], "lora", limit
        )

    assert grown({0.01: 0.1, 0.03: 0.5, 0.1: 0.2}) is None
    assert grown({0.01: 0.6, 0.03: 0.5, 0.1: 0.2}) == 0.003
    assert grown({0.01: 0.1, 0.03: 0.5, 0.1: 0.7}) == 0.3
    assert grown({0.01: 0.1, 0.03: 0.5, 0.1: 0.7}, limit=3) is None
    assert grown({0.3: 0.1, 1.0: 0.5}) is None  # the end of the ladder
    assert grown({0.01: 0.5, 0.03: 0.5, 0.1: 0.2}) == 0.003  # of equal ones the lowest


def test_the_tables_have_means_intervals_and_comparisons(table: ModuleType) -> None:
    values = {"ether": [0.2, 0.3, 0.1, 0.4, 0.5], "lora": [0.9, 0.8, 0.95, 0.9, 0.85]}
    jobs = [record(m, 0.01, t, v, "test") for m, found in values.items() for t, v in enumerate(found)]
    jobs += [record(method, 0.01, 9, 0.5) for method in values]
    base = {"parameters": 99, "by_kind": {}, "retained": 0.875, "seconds": 1.0}
    results = {"settings": {}, "versions": {}, "base": base, "jobs": jobs}
    rows = table.methods_table(results).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["LoRA", "ETHER", "*base*"]
    expected = mean_interval([(v + 0.5) / 2 for v in values["lora"]])
    assert f"{expected.mean:.3f} [{expected.low:.3f}, {expected.high:.3f}]" in rows[0]
    assert "0.875" in rows[2]
    assert re.search(r"LoRA − ETHER \| 0\.290 \[.*\] \| 0\.00\d \| separated", table.compared_table(results))
    assert "**0.01: 0.500**" in table.rates_table(results)


def test_the_recipe_and_the_plan_say_the_same(study: ModuleType, table: ModuleType) -> None:
    config = study.parse_config(study.CaptionsConfig, ["--config", str(ROOT / "examples" / "captions_study.yaml")])
    plan = (ROOT / "docs" / "studies" / "language.md").read_text(encoding="utf-8")
    words = {
        "steps": "for {:,} steps of", "examples": "sees {:,} lines", "base_steps": "from scratch for {:,} steps",
        "scored": "on {:,} held-out", "least_base": "fewer than {} of", "rank": "LoRA r = {}",
        "n_blocks": "both n = {}", "hidden_size": "hidden {}", "layers": "{} layers",
        "intermediate_size": "feed-forward {}",
    }  # fmt: skip
    for name, phrase in words.items():
        assert phrase.format(getattr(config, name)) in plan, name
    for method, rates in config.rates.items():
        assert f"- {table.TITLES[method]}: {', '.join(f'{rate:g}' for rate in rates)}\n" in plan
    assert (config.tuning_tasks, config.test_tasks) == ([100, 101], [0, 1, 2, 3, 4])


def test_a_base_that_has_learnt_too_little_is_not_finetuned(study: ModuleType, tmp_path: Path) -> None:
    error = importlib.import_module("language_settings").InputError
    with pytest.raises(error, match="of the questions about colours right, least_base is 0"):
        study.Study(tiny(study, tmp_path, least_base=0.9)).run()
    assert not (tmp_path / "jobs" / "tuning").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", '{"lorra": [0.01]}'], "unknown method 'lorra'"),
        (["--rates", '{"lora": [0.02]}'], "the rate 0.02 of lora is none of the ladder's"),
        (["--rates", '{"lora": [0.01]}', "--tuning_tasks", "[1]", "--test_tasks", "[1]"], "task 1 is both"),
        ([], "must name at least one each"),
        (["--rates", '{"lora": [0.01]}', "--steps", "0"], "steps must be at least 1, not 0"),
    ],
)
def test_a_mistake_is_one_line(
    study: ModuleType, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["captions_study.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("language_settings").run(study.main)
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert list(tmp_path.iterdir()) == []
