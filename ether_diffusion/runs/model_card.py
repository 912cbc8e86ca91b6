"""The model card of a run: ``README.md`` as the Hugging Face Hub reads it, written without asking the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard

from ether_diffusion.files import write_text
from ether_diffusion.page.text import number
from ether_diffusion.pipelines.learned_embeds import LEARNED_EMBEDS
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.runs import cards
from ether_diffusion.runs.record import BEST_FILE, Run, SamplePrompt, read_run

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
SHOWN = 6
"""Pictures on the page of the Hub."""
ETHER = "import ether_diffusion as ether"
"""What code that is shown imports first."""
MORE_SETTINGS = ("class_prompt", "prior_loss_weight", "guidance_scale", "num_inference_steps")  # no paths


def write_model_card(run_dir: str | Path) -> Path:
    """Write ``README.md`` into the run folder, atomically, and return its path.

    The card never names a folder of this machine but the run's own, so it can be published as it is.

    Raises:
        FileNotFoundError: ``run_dir`` is not a run folder.
    """
    run = read_run(run_dir)
    subject = cards.markdown(run.instance_prompt) if run.instance_prompt else None
    family = run.family.TAG or run.family.NAME.replace("_", "-")
    lora = run.entry.saved_as == "lora" or (run.folder / LORA_FILE).is_file()
    data = cards.card_data(
        run.base,
        ["ether" if run.entry.is_own else run.method, *cards.TAGS, family, *(["dreambooth"] if subject else [])],
        own=run.entry.is_own,
        lora=lora,
        relation="finetune" if run.entry.saved_as == "pipeline" else "adapter",
        pictures=_widget(run),
        instance_prompt=run.instance_prompt,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        run=run,
        title=cards.markdown(run.folder.name),
        base=cards.base_link(run.base),
        subject=subject,
        loading=loading_code(run),
        lora=lora_code(run) if lora and run.entry.is_own else None,
        token=None if run.placeholder_token is None else cards.markdown(run.placeholder_token),
        best=BEST_FILE if run.kept_step is not None and run.kept_step == run.best_step else None,
        lora_format=_lora_format(run),
        by_diffusers=_lora_format(run) in run.family.READ_BY_DIFFUSERS,
        settings={key: cards.markdown(value) for key, value in run.settings(MORE_SETTINGS).items()},
        scores=_scores(run),
        caption=cards.markdown(run.judging.caption) if run.judging else None,
        judges=_judges(run),
        samples=_samples(run),
    )
    path = run.folder / "README.md"
    write_text(path, str(card))
    return path


def _widget(run: Run) -> list[dict[str, Any]]:
    """The run's latest pictures, as the Hub shows them on its page."""
    if run.finetuned_step is None:
        return []
    files = [(prompt["prompt"], run.sample(run.finetuned_step, prompt["file"])) for prompt in run.prompts[:SHOWN]]
    return [{"text": text, "output": {"url": path.as_posix()}} for text, path in files if (run.folder / path).is_file()]


def _lora_format(run: Run) -> str:
    """Whose names the LoRA beside the adapter has; those of diffusers where the run does not say it."""
    return str(run.config.get("export_lora") or "diffusers")


def lora_code(run: Run) -> str:
    """The Python lines that load the LoRA beside the adapter, with diffusers alone."""
    kind = "DiffusionPipeline"
    stock = f"from diffusers import {kind}", f"{kind}.from_pretrained({_base_literal(run)})"
    line, pipeline = _own_loading(run) or stock
    several = run.placeholder_token is not None and len(run.family.TOKEN_KEYS) > 1
    lines = [*(["import safetensors.torch"] if several else []), line, "", f"pipe = {pipeline}"]
    prompt = run.instance_prompt or next((sample["prompt"] for sample in run.prompts), "a photo of a dog")
    if run.family_settings.prompt_chunks > 1:
        lines.insert(0, ETHER)
    return "\n".join(
        [
            *lines,
            f"pipe.load_lora_weights({cards.literal(_name(run))})",
            *_token_lines(run),
            cards.drawing_line(_prompt_code(run, prompt), run.base),
        ]
    )


def _prompt_code(run: Run, prompt: str) -> str:
    """The arguments of a pipeline that stand for a prompt as the run encoded prompts."""
    settings = run.family_settings
    if settings.prompt_chunks > 1:
        return f"**ether.encode_prompts(pipe, {cards.literal(prompt)}, chunks={settings.prompt_chunks})"
    length = settings.max_sequence_length
    return f"prompt={cards.literal(prompt)}" + ("" if length is None else f", max_sequence_length={length}")


def _token_lines(run: Run) -> list[str]:
    """Loading of a new token with diffusers alone: from the folder, or of several text encoders by their keys."""
    if run.placeholder_token is None:
        return []
    folder, token, keys = _name(run), cards.literal(run.placeholder_token), run.family.TOKEN_KEYS
    if len(keys) == 1:
        return [f"pipe.load_textual_inversion({cards.literal(folder)})"]
    lines = [f"embeds = safetensors.torch.load_file({cards.literal(f'{folder}/{LEARNED_EMBEDS}')})"]
    for encoder, key in keys.items():
        parts = f"text_encoder=pipe.{encoder}, tokenizer=pipe.{encoder.replace('text_encoder', 'tokenizer')}"
        lines.append(f"pipe.load_textual_inversion({{{token}: embeds[{cards.literal(key)}]}}, {parts})")
    return lines


def loading_code(run: Run, here: bool = False) -> str:
    """The Python lines that load this run and draw one picture, whatever quotes its prompt holds.

    Args:
        run: what it learnt is loaded.
        here: with the paths of this machine, so that the lines run in the current folder as they are; otherwise for
            readers of the card, who have the run and a local base somewhere else.
    """
    return _control_loading_code(run, here) if run.control else _subject_loading_code(run, here)


def _control_loading_code(run: Run, here: bool) -> str:
    """The same for a run that learned a control: whatever is loaded, the control encoder comes last."""
    folder, base = cards.literal(_name(run, here)), _base_literal(run, here)
    imports = [ETHER, "from diffusers.utils import load_image"]
    if run.controlnet is not None:
        net = str(run.config["controlnet_model_name_or_path"])
        own = run.config["train_controlnet"] != "nothing"
        named = cards.literal(cards.full_path(net) if here else cards.base_path(net))
        source = f'{folder}, subfolder="controlnet"' if own else named
        kind = str(run.family.CONTROLNET)
        imports.insert(1, f"from diffusers import ControlNetModel, {kind}")
        lines = [
            f"controlnet = ControlNetModel.from_pretrained({source})",
            f"pipe = {kind}.from_pretrained({base}, controlnet=controlnet)",
        ]
        if loading := _own_loading(run, here):
            imports.insert(2, loading[0])
            lines[1] = f"pipe = {kind}.from_pipe({loading[1]}, controlnet=controlnet)"
    else:
        takes_image = run.family.CONTROL
        kind = f"ether.{takes_image}" if takes_image else "DiffusionPipeline"
        if takes_image is None:
            imports.insert(1, "from diffusers import DiffusionPipeline")
        lines = [f"pipe = {kind}.from_pretrained({folder if run.method == 'full' else base})"]
        if (loading := _own_loading(run, here)) and run.entry.saved_as != "pipeline":
            imports.insert(1, loading[0])
            lines = [f"pipe = {kind}.from_pipe({loading[1]})" if takes_image else f"pipe = {loading[1]}"]
    if run.peft_components:
        imports.append("from peft import PeftModel")
        lines += _peft_lines(run, here)
    elif run.entry.saved_as == "lora":
        lines.append(f"pipe.load_lora_weights({folder})")
    if run.controlnet is None or run.entry.is_own:
        lines.append(f"ether.load(pipe, {folder})")
    elif run.family_settings.prompt_chunks == 1:
        imports.remove(ETHER)
    prompt = next((sample["prompt"] for sample in run.prompts), "a photo of a dog")
    image = next((f"samples/{sample['condition']}" for sample in run.prompts if "condition" in sample), "control.png")
    lines.append(f"control_image = load_image({cards.literal(f'{_name(run, here)}/{image}')})")
    if run.controlnet is not None:
        drawing = [cards.drawing_line(f"{_prompt_code(run, prompt)}, image=control_image", run.base)]
    elif run.family.CONTROL is not None:
        drawing = [cards.drawing_line(f"{_prompt_code(run, prompt)}, control_image=control_image", run.base)]
    else:
        drawing = [
            "with ether.controlled(pipe, control_image):",
            f"    {cards.drawing_line(_prompt_code(run, prompt), run.base)}",
        ]
    return "\n".join([*imports, "", *lines, *drawing])


def _name(run: Run, here: bool = False) -> str:
    """The run folder on this machine; for others its name, or its repository's id on the Hub."""
    return str(run.folder if here else run.config.get("hub_model_id") or run.folder.name)


def _base_literal(run: Run, here: bool = False) -> str:
    """The base as the arguments of ``from_pretrained``."""
    name = cards.literal(cards.full_path(run.base) if here else cards.base_path(run.base))
    return ", ".join([name, *(f"{key}={cards.literal(value)}" for key, value in run.source.version.items())])


def _own_loading(run: Run, here: bool = False) -> tuple[str, str] | None:
    """The import and the call that load the base, where ``from_pretrained`` does not."""
    return cards.own_loading(run.base, run.source.config, here)


def _peft_lines(run: Run, here: bool) -> list[str]:
    """Loading of one peft folder per component."""
    name = _name(run, here)
    adapted = "PeftModel.from_pretrained(pipe.{0}, {1}).get_base_model()"
    return [f"pipe.{c} = {adapted.format(c, cards.literal(f'{name}/{c}'))}" for c in run.peft_components]


def _subject_loading_code(run: Run, here: bool) -> str:
    folder, base = cards.literal(_name(run, here)), _base_literal(run, here)
    imports = ["from diffusers import DiffusionPipeline"]
    pipeline = f"pipe = DiffusionPipeline.from_pretrained({base})"
    if (loading := _own_loading(run, here)) and run.entry.saved_as != "pipeline":
        imports, pipeline = [loading[0]], f"pipe = {loading[1]}"
    if run.entry.saved_as == "pipeline":
        lines = [f"pipe = DiffusionPipeline.from_pretrained({folder})"]
    elif run.entry.saved_as == "lora":
        lines = [pipeline, f"pipe.load_lora_weights({folder})"]
    elif run.entry.is_own:
        lines = [pipeline, f"ether.load(pipe, {folder})"]
    else:
        imports.append("from peft import PeftModel")
        lines = [pipeline, *_peft_lines(run, here)]
    if run.entry.is_own or run.family_settings.prompt_chunks > 1:
        imports.insert(0, ETHER)
    prompt = run.instance_prompt or next((sample["prompt"] for sample in run.prompts), "a photo of a dog")
    return "\n".join([*imports, "", *lines, cards.drawing_line(_prompt_code(run, prompt), run.base)])


def _scores(run: Run) -> dict[str, dict[str, str]]:
    """From each metric to what was scored to the score, in Markdown."""
    return {
        cards.markdown(metric): {
            cards.markdown(column): number(value, missing="–") for column, value in of_metric.items()
        }
        for metric, of_metric in run.scores.items()
    }


def _judges(run: Run) -> list[list[str]]:
    """Each judge of the scores with its model, the hash of its weights and its preprocessing."""
    if run.judging is None:
        return []
    keys = ("model", "weights", "preprocessing")
    models = {name: facts for name, facts in run.judging.judges.items() if "model" in facts}
    return [[name, *(cards.markdown(facts[key]) for key in keys)] for name, facts in models.items()]


def _samples(run: Run) -> list[tuple[str, int, list[str]]]:
    """Each prompt and seed with links to its pictures: the base model's, if the run drew any, and the latest."""
    if run.finetuned_step is None:
        return []
    steps = [step for step in (0, run.finetuned_step) if step in run.sample_steps]
    return [
        (cards.markdown(prompt["prompt"]), prompt["seed"], [_picture(run, prompt, step) for step in steps])
        for prompt in run.prompts
    ]


def _picture(run: Run, prompt: SamplePrompt, step: int) -> str:
    path = run.sample(step, prompt["file"])
    if not (run.folder / path).is_file():
        return "–"
    return f"![{cards.markdown(prompt['prompt'])}]({quote(path.as_posix())})"
