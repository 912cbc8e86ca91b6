"""The model card of a run folder: its YAML header, its loading code, its pictures."""

from __future__ import annotations

import ast
import json
import re
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from PIL import Image
from runs.test_report import note_kept

from ether_diffusion.pipelines.file import is_hub_id
from ether_diffusion.registry import METHODS, MethodEntry
from ether_diffusion.runs.cards import markdown
from ether_diffusion.runs.model_card import write_model_card

NASTY = [
    'a "quoted" dog\'s photo: #1',
    "two\nlines\n---\nand a rule",
    "```\nfenced\n``` {{ jinja }} {% raw %}",
    "pipes | <script>alert(1)</script> [x](y) *bold*",
    "tab\tbackslash \\ carriage\r\nreturn, ключ 犬 🐕",
    "- item: {a: b} & *anchor !tag %",
]


def make_run(
    tmp_path: Path, *, prompt: str | None = "a photo of qwe dog", method: str = "ether_plus", **more: object
) -> Path:
    run = tmp_path / "dog"
    config = {
        "pretrained_model_name_or_path": "owner/sd15",
        "instance_data_dir": "/secret/home/pictures",
        "instance_prompt": prompt,
        "method": method,
        "learning_rate": 6e-3,
        "max_train_steps": 1400,
        "with_prior_preservation": False,
    }
    provenance = {
        "trained_parameters": {"unet": 398592, "text_encoder": 10},
        "status": "finished",
        "step": 1400,
        "instance_images": ["/secret/home/pictures/0.png"],
    }
    for step in (0, 200, 1400):
        folder = run / "samples" / f"step-{step:06}"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(folder / "00.png")
    (run / "samples" / "prompts.json").write_text(
        json.dumps([{"file": "00.png", "prompt": prompt or "a cat", "seed": 7}])
    )
    (run / "config.yaml").write_text(yaml.safe_dump(config | more))
    (run / "provenance.json").write_text(json.dumps(provenance))
    return run


def read_card(run: Path) -> tuple[dict[str, object], str, str]:
    """The YAML header, the Markdown body, the first code block, read without the library that wrote them."""
    path = write_model_card(run)
    assert path == run.resolve() / "README.md"
    _, header, body = re.split(r"^---$", path.read_bytes().decode(), maxsplit=2, flags=re.MULTILINE)
    code = body.split("\n```python\n")[1].split("\n```\n")[0]
    return yaml.safe_load(header), body, code


def calls(code: str) -> list[tuple[str, list[object]]]:
    """Every call in ``code`` that has a literal argument, as (function, its literal arguments)."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if literal := [arg.value for arg in given if isinstance(arg, ast.Constant)]:
                found.append((ast.unparse(node.func), literal))
    return found


def test_header_is_what_the_hub_reads(tmp_path: Path) -> None:
    header, body, _ = read_card(make_run(tmp_path))
    assert header == {
        "base_model": "owner/sd15",
        "base_model_relation": "adapter",
        "library_name": "ether-diffusion",
        "tags": ["ether", "text-to-image", "diffusers", "diffusers-training", "stable-diffusion", "dreambooth"],
        "instance_prompt": "a photo of qwe dog",
        "widget": [{"text": "a photo of qwe dog", "output": {"url": "samples/step-001400/00.png"}}],
    }
    assert "398,602 parameters (1.6 MB)" in body
    assert "https://arxiv.org/abs/2405.20271" in body
    assert "without prior preservation" in body


def test_other_methods_are_diffusers_own(tmp_path: Path) -> None:
    header, _, _ = read_card(make_run(tmp_path, method="lora"))
    assert (header["library_name"], header["base_model_relation"]) == ("diffusers", "adapter")
    assert "lora" in header["tags"]  # type: ignore[operator]


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_a_repository_is_named_where_one_can_be_loaded(entry: MethodEntry, tmp_path: Path) -> None:
    """A folder of peft is loaded from within the run folder, whichever method wrote it."""
    changes = {"peft_config": {"peft_type": "DELORA"}} if entry.name == "peft" else {}
    body = read_card(make_run(tmp_path, method=entry.name, **changes))[1]
    assert ("or its repository's id on the Hub" in body) == (entry.saved_as != "peft")


@pytest.mark.parametrize("entry", [each for each in METHODS.values() if each.is_own], ids=lambda each: each.name)
def test_what_is_said_of_a_method_is_true_of_it(entry: MethodEntry, tmp_path: Path) -> None:
    """Of vectors that keep no unit length nobody is told so, and a variant is called one."""
    body = read_card(make_run(tmp_path, method=entry.name))[1]
    paper = entry.is_reflection and entry.variant_of is None
    assert ("trains nothing but their unit vectors. 398,602" in body) == paper
    assert ("the paper does not have it" in body) == (entry.variant_of is not None)


def test_whole_weights_are_a_finetune_of_the_base(tmp_path: Path) -> None:
    header, _, _ = read_card(make_run(tmp_path, method="full"))
    assert (header["library_name"], header["base_model_relation"]) == ("diffusers", "finetune")


def test_a_lora_beside_the_adapter_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "load_lora_weights" not in read_card(run)[1]
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"")
    header, body, _ = read_card(run)
    assert "lora" in header["tags"]  # type: ignore[operator]
    second = body.split("\n```python\n")[2].split("\n```\n")[0]
    assert calls(second) == [
        ("DiffusionPipeline.from_pretrained", ["owner/sd15"]),
        ("pipe.load_lora_weights", ["dog"]),
        ("pipe", ["a photo of qwe dog"]),
    ]


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_a_new_token_is_told_with_the_file_that_it_is_in(tmp_path: Path, xl: bool) -> None:
    token = {"placeholder_token": "<dog>", "num_vectors": 2, "token_lr": 1e-3}
    run = make_run(tmp_path, prompt="a photo of <dog> dog", **token)
    if xl:
        known = json.loads((run / "provenance.json").read_text()) | {"family": "sdxl"}
        (run / "provenance.json").write_text(json.dumps(known))
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"")
    _, body, _ = read_card(run)
    assert r"\<dog\> in the prompt is a new token of 2 vectors" in body
    assert r"| `placeholder_token` | \<dog\> |" in body
    assert "trains nothing but their unit vectors and the embeddings of a new token." in body
    second = body.split("\n```python\n")[2].split("\n```\n")[0]
    loaded = "pipe.load_textual_inversion"
    expected = ["safetensors.torch.load_file", loaded, loaded] if xl else [loaded]
    names = re.findall(r"([\w.]+)\(", second)
    assert names == ["DiffusionPipeline.from_pretrained", "pipe.load_lora_weights", *expected, "pipe"]
    assert ('{"<dog>": embeds["clip_g"]}, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2' in second) == xl


def test_the_best_step_is_told_with_how_to_load_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [{"step": s, "dino": d, "dino_nearest": d, "clip_t": 0.3} for s, d in ((0, 0.1), (200, 0.5), (1400, 0.4))]
    (run / "sample_scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 'subfolder="best"' not in read_card(run)[1], "its file is not there"
    (run / "best").mkdir()
    (run / "best" / "ether_weights.safetensors").write_bytes(b"0")
    note_kept(run, 200)
    body = read_card(run)[1]
    assert "`best/ether_weights.safetensors` is the adapter of step 200" in body
    assert 'ether.load(pipe, "dog", subfolder="best")' in body
    note_kept(run, 100)
    assert 'subfolder="best"' not in read_card(run)[1], "the run was killed before it kept the best"


@pytest.mark.parametrize("prompt", NASTY)
def test_a_nasty_prompt_comes_back_from_header_and_code(tmp_path: Path, prompt: str) -> None:
    header, body, code = read_card(make_run(tmp_path, prompt=prompt))
    assert header["instance_prompt"] == prompt
    assert ("pipe", [prompt]) in calls(code)
    prose = body.replace(code, "")
    assert "<script>" not in prose
    assert prose.count("```") == 2  # the fences of the code block
    table = [line for line in prose.splitlines() if "](samples/" in line]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [5]  # four cells


@pytest.mark.parametrize("method", ["ether_plus", "ether", "naive"])
def test_the_code_of_ether_loads_through_ether(tmp_path: Path, method: str) -> None:
    header, _, code = read_card(make_run(tmp_path, method=method))
    assert "import ether_diffusion as ether" in code
    assert calls(code) == [
        ("DiffusionPipeline.from_pretrained", ["owner/sd15"]),
        ("ether.load", ["dog"]),
        ("pipe", ["a photo of qwe dog"]),
    ]
    assert header["tags"][0] == "ether"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", [("DiffusionPipeline.from_pretrained", ["owner/sd15"]), ("pipe.load_lora_weights", ["dog"])]),
        ("full", [("DiffusionPipeline.from_pretrained", ["dog"])]),
        *(
            (
                method,
                [
                    ("DiffusionPipeline.from_pretrained", ["owner/sd15"]),
                    ("PeftModel.from_pretrained", ["dog/unet"]),
                    ("PeftModel.from_pretrained", ["dog/text_encoder"]),
                ],
            )
            for method in ("oft", "boft", "hra")
        ),
    ],
)
def test_the_code_of_other_methods_loads_their_own_way(tmp_path: Path, method: str, expected: list[object]) -> None:
    header, _, code = read_card(make_run(tmp_path, method=method))
    assert calls(code) == [*expected, ("pipe", ["a photo of qwe dog"])]
    assert "ether.load" not in code
    assert header["tags"][0] == method
    assert "ether" not in header["tags"]


def test_samples_are_relative_links_to_the_base_and_the_latest_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    links = re.findall(r"!\[.*?\]\((.*?)\)", read_card(run)[1])
    assert links == ["samples/step-000000/00.png", "samples/step-001400/00.png"]
    (run / "samples" / "step-000000" / "00.png").unlink()
    assert re.findall(r"!\[.*?\]\((.*?)\)", read_card(run)[1]) == links[1:]


def test_every_picture_of_the_table_has_its_prompt_and_seed(tmp_path: Path) -> None:
    rows = [line for line in read_card(make_run(tmp_path))[1].splitlines() if "](samples/" in line]
    assert [row.split(" | ")[:2] for row in rows] == [["| a photo of qwe dog", "7"]]


def test_a_run_without_a_subject_claims_none(tmp_path: Path) -> None:
    header, body, code = read_card(make_run(tmp_path, prompt=None))
    assert "instance_prompt" not in header
    assert "dreambooth" not in header["tags"]
    assert "trained with ETHER+. [ETHER]" in body
    assert "subject" not in body
    assert ("pipe", ["a cat"]) in calls(code)  # the first validation prompt


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    base = tmp_path / "models" / "my-sd"
    base.mkdir(parents=True)
    header, body, code = read_card(make_run(tmp_path, pretrained_model_name_or_path=str(base)))
    assert "base_model" not in header
    assert ("DiffusionPipeline.from_pretrained", ["path/to/my-sd"]) in calls(code)
    assert str(tmp_path) not in body
    assert "/secret" not in body


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5")
    for path in ("models/sd15", "./sd15", "../sd15", "~/sd15", "/models/sd15", "a/b/c", "sd15", "C:\\sd15", ""):
        assert not is_hub_id(path), path


def test_unfinished_run_and_scores_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    finished = read_card(run)[1]
    assert "not finished" not in finished
    assert "No score was measured" in finished
    provenance = json.loads((run / "provenance.json").read_text()) | {"status": "interrupted", "step": 600}
    (run / "provenance.json").write_text(json.dumps(provenance))
    (run / "scores.json").write_text(json.dumps({"DINO": {"base": 0.31, "finetuned": 0.66}}))
    body = read_card(run)[1]
    assert "**This run is not finished** (status: interrupted)" in body
    assert "600 of 1,400 steps" in body
    assert "| DINO | finetuned | 0.660 |" in body
    assert "Judges not recorded" in body
    assert "No score was measured" not in body


def test_scores_name_their_judges_and_the_few_pictures_behind_them(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    judges = {
        "dino": {"model": "facebook/dino-vits16", "weights": "0123456789ab", "preprocessing": "Vit: size | 224"},
        "libraries": {"torch": "2.9.1"},
    }
    facts = {"judges": judges, "token": "q_we", "seed": 7, "step": 1400, "prompts": 4}
    images = {"base": 8, "finetuned": 8, "references": 5}
    scores = {"DINO": {"finetuned": 0.66}, "nearest reference": {"finetuned": 0.7, "references": 0.75}}
    (run / "scores.json").write_text(json.dumps({"scores": scores, "images": images} | facts))
    body = read_card(run)[1]
    assert "| nearest reference | references | 0.750 |\n\n8 pictures of 4 prompts, one training, one seed (7)" in body
    assert r'without the rare word "q\_we"' in body
    header = "| Judge | Model | Weights | Preprocessing |\n|---|---|---|---|\n"
    assert header + r"| dino | facebook/dino-vits16 | 0123456789ab | Vit: size \| 224 |" + "\n\n## Settings" in body
    assert "not recorded" not in body


def test_writing_a_card_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the card asked the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert read_card(make_run(tmp_path))[0]["base_model"] == "owner/sd15"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_markdown_escapes_to_one_line() -> None:
    assert markdown("a | b\n\n# <c>") == r"a \| b \# \<c\>"
