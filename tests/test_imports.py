"""What is imported when: the package and the programs' help without torch, heavy parts when they are used."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from cli.helpers import programs

import ether_diffusion

ROOT = Path(__file__).parents[1]
HEAVY = {
    *("torch", "numpy", "scipy", "PIL", "matplotlib", "jinja2"),
    *("diffusers", "transformers", "accelerate", "peft", "huggingface_hub", "safetensors", "datasets"),
}


def imported(code: str) -> set[str]:
    """The modules that a new process has imported after ``code``."""
    script = f"{code}\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def program(name: str, *arguments: str) -> str:
    """Code that runs a program to its end."""
    return (
        f"import runpy, sys\nsys.argv = {[name, *arguments]!r}\n"
        f"try:\n    runpy.run_path({name!r}, run_name='__main__')\nexcept SystemExit:\n    pass"
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not HEAVY & imported("import ether_diffusion")


@pytest.mark.parametrize("name", ["train_dreambooth.py", "train_controlnet.py"])
@pytest.mark.parametrize("argument", ["--help", "--learning_rat=1"])
def test_programs_answer_help_and_mistakes_before_heavy_imports(name: str, argument: str) -> None:
    after = imported(program(name, argument))
    assert "ether_diffusion.training.config" in after
    assert not HEAVY & after


def test_every_verb_answers_help_and_mistakes_before_heavy_imports() -> None:
    asked = [[*words, last] for words, _ in programs() for last in ("--help", "--no_such_setting=1")]
    code = (
        "from ether_diffusion.cli import main\n"
        f"for arguments in {asked!r}:\n"
        "    try:\n        main(arguments)\n    except SystemExit as ended:\n        assert ended.code in (0, 2)\n"
        "    else:\n        raise AssertionError(arguments)"
    )
    after = imported(code)
    assert "ether_diffusion.cli.programs.control_accuracy" in after
    assert not HEAVY & after


def test_an_adapter_on_a_model_without_diffusers_does_not_import_it() -> None:
    code = (
        "import torch, ether_diffusion as ether\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "config = ether.EtherConfig(targets=('0',))\n"
        "assert ether.attach(model, config).num_parameters() == 32"
    )
    assert not {"diffusers", "transformers", "peft"} & imported(code)


def test_dreambooth_imports_neither_controls_nor_figures_nor_other_pipelines() -> None:
    after = imported("import ether_diffusion.training.dreambooth")
    assert "ether_diffusion.training.loop" in after
    assert (
        not {
            "matplotlib",
            "torchmetrics",
            "diffusers.models.controlnets.controlnet",
            "diffusers.pipelines.controlnet.pipeline_controlnet",
            "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
            "ether_diffusion.pipelines.control_encoder",
            "ether_diffusion.training.control",
        }
        & after
    )


def test_no_module_but_the_tuner_of_peft_imports_peft_at_its_top() -> None:
    found = []
    tuner = ROOT / "ether_diffusion" / "peft_tuner"
    for path in sorted({*(ROOT / "ether_diffusion").rglob("*.py")} - {*tuner.rglob("*.py")}):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [str(path.relative_to(ROOT)) for name in names if name.split(".")[0] == "peft"]
    assert not found, "import peft where it is used"


def test_nothing_but_the_user_imports_the_tuner_of_peft() -> None:
    found = []
    for path in sorted((ROOT / "ether_diffusion").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "peft_tuner" and "import ether_diffusion.peft_tuner" in text:
            found.append(str(path.relative_to(ROOT)))
    assert not found
    code = "import ether_diffusion, ether_diffusion.core.host, ether_diffusion.pipelines.verbs"
    assert "ether_diffusion.peft_tuner" not in imported(code)


def typed_names() -> dict[str, str]:
    """The public names by module, as type checkers read them."""
    tree = ast.parse(Path(ether_diffusion.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_public_names_are_what_type_checkers_see() -> None:
    typed = typed_names()
    assert sorted(typed) == sorted(ether_diffusion.__all__)
    for name, module in typed.items():
        assert getattr(ether_diffusion, name) is getattr(importlib.import_module(module), name)
        assert name in dir(ether_diffusion)
    assert ether_diffusion.__version__ == version("ether-diffusion")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        ether_diffusion.lode  # noqa: B018
    assert not hasattr(ether_diffusion, "__path_hook__")


def test_rooms_are_reached_without_an_import_of_their_own() -> None:
    assert "ether_diffusion.core.host" in imported(
        "import ether_diffusion\nassert ether_diffusion.pipelines.load is ether_diffusion.load"
    )
