"""An adapter of a pipeline, on the Hugging Face Hub: its file, a card, and an exact LoRA if it is asked for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, create_repo, upload_folder

from ether_diffusion import export
from ether_diffusion.families.registry import family_of
from ether_diffusion.pipelines.loaded import adapters
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.pipelines.verbs import save
from ether_diffusion.registry import METHODS
from ether_diffusion.runs import cards

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEMPLATE = Path(__file__).with_name("adapter_card.md.jinja")


def push_to_hub(
    pipe: DiffusionPipeline,
    repo_id: str,
    name: str | None = None,
    *,
    prompt: str | None = None,
    lora_format: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Add ETHER weights",
) -> str:
    """Upload an adapter of the pipeline to the Hub, with a card that says how to load it.

    A finished run is uploaded by the training program, ``--push_to_hub``, with its samples and settings.

    Args:
        pipe: the pipeline that the adapter is loaded in.
        repo_id: the repository, ``owner/name``; it is made if it is not there.
        name: which adapter; may be left out where there is only one.
        prompt: what calls what it learnt, for the card.
        lora_format: upload the adapter as an exact LoRA, too: a format of :func:`ether_diffusion.export_lora`.
        private: whether a new repository is private.
        token: of the Hub; the stored one where it is not given.
        commit_message: of the upload.

    Returns:
        The address of the commit.

    Raises:
        ValueError: there is no such adapter, or several and no name.
        ExportError: the adapter cannot be a LoRA of that format.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(pipe, folder, name)
        name = name or next(iter(adapters(pipe)))
        if lora_format is not None:
            told = {} if prompt is None else {"modelspec.trigger_phrase": prompt}
            export.lora.export_lora(pipe, folder / LORA_FILE, lora_format, name, told=told)
        (folder / "README.md").write_text(adapter_card(pipe, repo_id, name, prompt, lora_format), encoding="utf-8")
        repository = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return str(upload_folder(repo_id=repository, folder_path=folder, commit_message=commit_message, token=token))


def adapter_card(pipe: DiffusionPipeline, repo_id: str, name: str, prompt: str | None, lora_format: str | None) -> str:
    """The card of an adapter without a run: what it is, and the code that loads it."""
    family, info = family_of(pipe), adapters(pipe)[name]
    base = str(pipe.config.get("_name_or_path") or "")
    tag = family.TAG or family.NAME.replace("_", "-")
    entries = [METHODS[config.method] for config in info.configs.values()]
    methods = list(dict.fromkeys(entry.title for entry in entries))
    tags = [*(["ether"] if methods else []), *(["controlnet"] if info.control else []), *cards.TAGS, tag]
    data = cards.card_data(base, tags, own=True, lora=lora_format is not None, instance_prompt=prompt)
    return str(
        ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            title=cards.markdown(repo_id.split("/")[-1]),
            base=cards.base_link(base) if base else "an unnamed base",
            family=family.TITLE,
            info=info,
            methods=" and ".join(methods),
            variant=any(entry.variant_of for entry in entries),
            reflections=any(entry.is_reflection for entry in entries),
            loading=_loading_code(base, repo_id, prompt or "a photo of a dog", info.control),
            repository=cards.literal(repo_id),
            token=None if info.placeholder_token is None else cards.markdown(info.placeholder_token),
            lora=lora_format,
            by_diffusers=lora_format in family.READ_BY_DIFFUSERS,
        )
    )


def _loading_code(base: str, repo_id: str, prompt: str, control: bool) -> str:
    """The Python lines that load the adapter and draw one picture."""
    imports = ["import ether_diffusion as ether"]
    named = cards.literal(cards.base_path(base))
    stock = "from diffusers import DiffusionPipeline", f"DiffusionPipeline.from_pretrained({named})"
    line, pipeline = cards.own_loading(base) or stock
    imports.append(line)
    drawing = [cards.drawing_line(cards.literal(prompt), base)]
    if control:
        imports.append("from diffusers.utils import load_image")
        drawing = ['with ether.controlled(pipe, load_image("control.png")):', f"    {drawing[0]}"]
    return "\n".join([*imports, "", f"pipe = {pipeline}", f"ether.load(pipe, {cards.literal(repo_id)})", *drawing])
