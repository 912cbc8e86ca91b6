"""The model card of a run: ``README.md`` as the Hugging Face Hub reads it, written without asking the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from ether_diffusion import playground
from ether_diffusion.files import write_text
from ether_diffusion.training.config import ETHER_METHODS
from ether_diffusion.training.run_record import Run, SamplePrompt, format_score, read_run

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
TAGS = ("text-to-image", "diffusers", "diffusers-training", "stable-diffusion")
MORE_SETTINGS = ("class_prompt", "prior_loss_weight", "guidance_scale", "num_inference_steps")  # no paths


def write_model_card(run_dir: str | Path) -> Path:
    """Write ``README.md`` into the run folder, atomically, and return its path.

    The card never names a folder of this machine but the run's own, so it can be published as it is.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
    """
    run = read_run(run_dir)
    subject = markdown(run.instance_prompt) if run.instance_prompt else None
    data = ModelCardData(
        base_model=run.base if is_hub_id(run.base) else None,
        library_name="diffusers",
        tags=["ether" if run.method in ETHER_METHODS else run.method, *TAGS, *(["dreambooth"] if subject else [])],
        instance_prompt=run.instance_prompt,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        run=run,
        title=markdown(run.folder.name),
        base=_base_link(run.base),
        subject=subject,
        loading=loading_code(run),
        settings={key: markdown(value) for key, value in run.settings(MORE_SETTINGS).items()},
        scores={
            markdown(metric): {markdown(column): format_score(value) for column, value in row.items()}
            for metric, row in run.scores.items()
        },
        samples=_samples(run),
    )
    path = run.folder / "README.md"
    write_text(path, str(card))
    return path


def is_hub_id(base: str) -> bool:
    """Whether ``base`` reads as ``owner/name`` on the Hub and is no folder here."""
    name = r"[A-Za-z0-9_][\w.-]*"
    return re.fullmatch(f"{name}/{name}", base, re.ASCII) is not None and not Path(base).exists()


def loading_code(run: Run) -> str:
    """The Python lines that load this run and draw one picture, whatever quotes its prompt holds."""
    name = str(run.config.get("hub_model_id") or run.folder.name)
    folder = _literal(name)
    base = _literal(run.base if is_hub_id(run.base) else f"path/to/{Path(run.base).name}")
    imports = ["from diffusers import DiffusionPipeline"]
    pipeline = f"pipe = DiffusionPipeline.from_pretrained({base})"
    if run.base == playground.NAME and run.method != "full":
        imports, pipeline = ["from ether_diffusion import playground"], "pipe = playground.load()"
    if run.method == "full":
        lines = [f"pipe = DiffusionPipeline.from_pretrained({folder})"]
    elif run.method == "lora":
        lines = [pipeline, f"pipe.load_lora_weights({folder})"]
    elif run.method in ETHER_METHODS:
        imports.insert(0, "import ether_diffusion as ether")
        lines = [pipeline, f"ether.load(pipe, {folder})"]
    else:
        imports.append("from peft import PeftModel")
        lines = [pipeline]
        for component in run.provenance.trained_parameters:
            adapter = _literal(f"{name}/{component}")
            lines.append(f"pipe.{component} = PeftModel.from_pretrained(pipe.{component}, {adapter})")
    prompt = run.instance_prompt or next((sample["prompt"] for sample in run.prompts), "a photo of a dog")
    return "\n".join([*imports, "", *lines, f"image = pipe({_literal(prompt)}).images[0]"])


def markdown(text: str) -> str:
    """``text`` on one line, inert in Markdown: no markup, no HTML, no end of a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~&$])", r"\\\1", " ".join(text.split()))


def _literal(text: str) -> str:
    """A Python string literal in double quotes, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _base_link(base: str) -> str:
    if base == playground.NAME:
        return "the playground that comes with ether-diffusion"
    if is_hub_id(base):
        return f"[{markdown(base)}](https://huggingface.co/{base})"
    return f"{markdown(Path(base).name)} (a local copy)"


def _samples(run: Run) -> list[tuple[str, int, list[str]]]:
    """Each prompt and seed with links to its pictures: the base model's, if the run drew any, and the latest."""
    if run.finetuned_step is None:
        return []
    steps = [step for step in (0, run.finetuned_step) if step in run.sample_steps]
    return [
        (markdown(prompt["prompt"]), prompt["seed"], [_picture(run, prompt, step) for step in steps])
        for prompt in run.prompts
    ]


def _picture(run: Run, prompt: SamplePrompt, step: int) -> str:
    path = run.sample(step, prompt["file"])
    if not (run.folder / path).is_file():
        return "–"
    return f"![{markdown(prompt['prompt'])}]({quote(path.as_posix())})"
