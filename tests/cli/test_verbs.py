"""The table of verbs: what it lists, what each verb runs, and what an unknown one says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest
from cli.helpers import programs

from ether_diffusion.cli import main, run_script
from ether_diffusion.cli.verbs import ETHER, STUDY, Group, Program
from ether_diffusion.recipes import recipes

ROOT = Path(__file__).parents[2]

SCRIPTS = {
    "train_dreambooth.py": ("train",),
    "train_controlnet.py": ("control",),
    "eval/dreambench.py": ("bench",),
    "eval/report.py": ("report",),
    **{f"eval/{name}.py": ("study", name) for name in STUDY.verbs},
}
"""The programs in the repository, and the verb that is the same."""


def called(script: Path) -> str | tuple[str, ...]:
    """What a script calls: the words of a verb, or a program as "module:function"."""
    body = ast.parse(script.read_text()).body
    (line,) = (node for node in body if isinstance(node, ast.ImportFrom))
    if line.names[0].name != "run_script":
        return f"{line.module}:{line.names[0].name}"
    (call,) = (node for node in ast.walk(body[-1]) if isinstance(node, ast.Call))
    return tuple(ast.literal_eval(word) for word in call.args)


def test_every_script_of_the_repository_is_a_verb() -> None:
    found = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("train_*.py"), *ROOT.glob("eval/*.py")]}
    assert found == set(SCRIPTS)
    targets = {words: program.target for words, program in programs()}
    for script, words in SCRIPTS.items():
        assert called(ROOT / script) in (words, targets[words]), script


def help_of(program: Callable[[list[str]], object], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        program([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "target"),
    [pytest.param(words, program.target, id=" ".join(words)) for words, program in programs()],
)
def test_the_help_of_a_verb_is_the_programs_own_under_the_verbs_name(
    words: tuple[str, ...], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(main, list(words), capsys)
    own = help_of(resolve_name(target), [], capsys)
    command = " ".join(("ether", *words))
    assert shown.startswith(f"usage: {command} [")
    assert shown.partition("\n\n")[2] == own.partition("\n\n")[2]  # the usage before it wraps by the name's length


@pytest.mark.parametrize(
    "program",
    [pytest.param(program, id=" ".join(words)) for words, program in programs() if program.settings is not None],
)
def test_a_program_parses_the_settings_that_the_table_completes(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ParsedError(Exception):
        pass

    def parse(settings: type, arguments: list[str]) -> None:
        raise ParsedError(settings)

    target = resolve_name(program.target)
    monkeypatch.setitem(target.__globals__, "parse_config", parse)
    with pytest.raises(ParsedError) as asked:
        target([])
    assert asked.value.args == (resolve_name(str(program.settings)),)


def test_the_commands_of_the_readme_name_verbs_and_configs_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    known = {words for words, _ in programs()}
    lines = re.findall(r"^ether (.+)$", readme, flags=re.MULTILINE)
    assert lines
    for words in map(str.split, lines):
        assert known & {tuple(words[:1]), tuple(words[:2])}, words
    named = re.findall(r"--config (\S+)", " ".join(lines))
    assert named
    assert set(named) <= set(recipes())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["alone", "help", "h"])
@pytest.mark.parametrize("group", [ETHER, STUDY], ids=["ether", "study"])
def test_a_command_with_verbs_lists_them_in_groups(
    group: Group, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments if group is ETHER else [group.name, *arguments])
    paragraphs = capsys.readouterr().out.split("\n\n")
    for heading, verbs in group.sections.items():
        (lines,) = (p.splitlines()[1:] for p in paragraphs if p.startswith(f"{heading}:\n"))
        assert [line.split(maxsplit=1) for line in lines] == [[verb.name, verb.help] for verb in verbs]


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"ether {version('ether-diffusion')}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "--seed", "3"], 'ether: there is no verb "trian", did you mean "train"?; "ether --help" lists all'),
        (["--seed=3"], 'ether: there is no verb "--seed=3"; "ether --help" lists all'),
        (
            ["study", "robustness"],
            'ether study: there is no verb "robustness", did you mean "lr_robustness"?; "ether study --help" lists all',
        ),
    ],
)
def test_an_unknown_verb_is_one_line_that_offers_the_nearest(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"{said}\n")


def test_nothing_heavy_is_imported_for_an_answer_from_the_table() -> None:
    """No command line here runs a program, so none of what programs need is loaded, by the package itself neither."""
    code = (
        "import sys\n"
        "from ether_diffusion.cli import main\n"
        "for arguments in [], ['--help'], ['--version'], ['trian'], ['study'], ['study', 'x']:\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended: assert ended.code == 2\n"
        "print(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.partition(".")[0] for name in ended.stdout.splitlines()[-1].split()}
    assert "ether_diffusion" in loaded
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "numpy", "PIL", "jsonargparse"}
    assert loaded & heavy == set()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "usage: table.py [-h]"),
        (["--subjects"], 2, "table.py: error: "),
        (["nothing", "rows.json"], 2, "table.py: error: "),
    ],
)
def test_a_script_has_its_own_name_and_ends_as_the_verb_does(arguments: list[str], status: int, said: str) -> None:
    command = [sys.executable, "eval/table.py", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == status
    assert said in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert "gemm_4bit" not in ended.stderr


def test_a_script_that_names_no_program_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="study is no program"):
        run_script("study")


def test_nobody_need_read_the_help_to_its_end() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ether_diffusion.cli", "--help"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
