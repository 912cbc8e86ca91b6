"""Adapters from the Hub, from a server of this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import shake

import ether_diffusion as ether
from ether_diffusion.config import EtherConfig
from ether_diffusion.core.host import host_of
from ether_diffusion.pipelines.file import FILE_NAME
from ether_diffusion.pipelines.learned_embeds import LEARNED_EMBEDS, LearnedEmbeds
from ether_diffusion.pipelines.new_tokens import add_new_token, new_tokens
from ether_diffusion.playground.tiny import tiny_pipeline

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
TOKEN = "hf_" + "x" * 34


@dataclass
class Repositories:
    """What the server has: by repository, revision and path the bytes; and what it was asked for."""

    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Repositories]:
    here = Repositories()

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            here.asked.append(self.path)
            owner, name, _, revision, *path = self.path.removeprefix("/").split("/")
            repository, wanted = f"{owner}/{name}", "/".join(path)
            if repository not in {key[0] for key in here.files}:
                return self.refuse(404, "RepoNotFound")
            if repository in here.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(403, "GatedRepo")
            revisions = {commit: branch for branch, commit in COMMITS.items()} | {branch: branch for branch in COMMITS}
            if revision not in revisions:
                return self.refuse(404, "RevisionNotFound")
            content = here.files.get((repository, revisions[revision], wanted))
            if content is None:
                return self.refuse(404, "EntryNotFound")
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMITS[revisions[revision]])
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield here
    server.shutdown()
    server.server_close()


@pytest.fixture
def pipe() -> DiffusionPipeline:
    return tiny_pipeline()


def adapter_bytes(folder: Path, seed: int) -> bytes:
    """The file of an adapter with other vectors for each seed."""
    pipe = tiny_pipeline()
    shake(ether.attach(pipe.unet, EtherConfig("ether", n_blocks=2, seed=seed)))
    return ether.save(pipe, folder / str(seed)).read_bytes()


def first_vector(pipe: DiffusionPipeline, name: str) -> float:
    adapter = host_of(pipe.unet).adapters[name]  # type: ignore[union-attr]
    return float(next(iter(adapter.state_dict().values())).sum())


def test_revision_and_subfolder_choose_the_file(hub: Repositories, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    places = [("main", FILE_NAME), ("v1", FILE_NAME), ("main", f"dogs/{FILE_NAME}")]
    for seed, (revision, path) in enumerate(places):
        hub.files["me/dog", revision, path] = adapter_bytes(tmp_path, seed)
    ether.load(pipe, "me/dog", "newest")
    ether.load(pipe, "me/dog", "tagged", revision="v1")
    ether.load(pipe, "me/dog", "commit", revision=COMMITS["v1"])
    ether.load(pipe, "me/dog", "inside", subfolder="dogs")
    for seed, name in enumerate(("newest", "tagged", "inside")):
        ether.load(pipe, tmp_path / str(seed), f"here-{seed}")
        assert first_vector(pipe, name) == first_vector(pipe, f"here-{seed}")
    assert first_vector(pipe, "commit") == first_vector(pipe, "tagged")
    assert len({first_vector(pipe, name) for name in ("newest", "tagged", "inside")}) == 3


def test_a_gated_repository_wants_a_token(hub: Repositories, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    hub.files["me/dog", "main", FILE_NAME] = adapter_bytes(tmp_path, 0)
    hub.private.add("me/dog")
    with pytest.raises(FileNotFoundError, match="it is gated: accept its terms on its page, and log in"):
        ether.load(pipe, "me/dog", token=False)
    assert ether.adapters(pipe) == {}
    ether.load(pipe, "me/dog", token=TOKEN)
    assert list(ether.adapters(pipe)) == ["default"]


def test_what_was_downloaded_is_there_without_the_hub(
    hub: Repositories, pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    hub.files["me/dog", "main", FILE_NAME] = adapter_bytes(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="local_files_only keeps from asking the Hub"):
        ether.load(pipe, "me/dog", local_files_only=True)
    assert hub.asked == []
    ether.load(pipe, "me/dog", "a", cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob(FILE_NAME))
    assert not (tmp_path / "hub").exists()
    hub.asked.clear()
    ether.load(pipe, "me/dog", "b", cache_dir=tmp_path / "mine", local_files_only=True)
    assert first_vector(pipe, "a") == first_vector(pipe, "b")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"revision": "v2"}, "it has no revision 'v2'"),
        (
            {"subfolder": "cats"},
            f"it has no {FILE_NAME} in cats: if it holds a LoRA, pipe.load_lora_weights loads that",
        ),
    ],
)
def test_what_is_not_there_is_named(
    given: dict[str, str], message: str, hub: Repositories, pipe: DiffusionPipeline, tmp_path: Path
) -> None:
    hub.files["me/dog", "main", FILE_NAME] = adapter_bytes(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match=message) as error:
        ether.load(pipe, "me/dog", **given)  # type: ignore[arg-type]
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_here_has_subfolders_and_no_revisions(pipe: DiffusionPipeline, tmp_path: Path) -> None:
    adapter_bytes(tmp_path, 3)
    ether.load(pipe, tmp_path, subfolder="3")
    with pytest.raises(ValueError, match="revision='v1' is for repositories of the Hub"):
        ether.load(pipe, tmp_path / "3", "b", revision="v1")
    with pytest.raises(ValueError, match="subfolder='x' is for folders and repositories"):
        ether.load(pipe, tmp_path / "3" / FILE_NAME, "b", subfolder="x")
    with pytest.raises(FileNotFoundError, match=f"no/such holds no {FILE_NAME}"):
        ether.load(pipe, tmp_path, "b", subfolder="no/such")
    assert list(ether.adapters(pipe)) == ["default"]


def test_the_embeddings_of_a_new_token_come_with_the_adapter(hub: Repositories, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    shake(ether.attach(pipe.unet, EtherConfig(), "dog"))
    rows = torch.ones(1, 32)
    add_new_token(pipe, "dog", LearnedEmbeds("<dog>", {"text_encoder": rows}, {"text_encoder": "<dog>"}))
    ether.save(pipe, tmp_path / "dog", "dog")
    for name in (FILE_NAME, LEARNED_EMBEDS):
        hub.files["me/dog", "v1", f"best/{name}"] = (tmp_path / "dog" / name).read_bytes()
    ether.load(loaded := tiny_pipeline(), "me/dog", revision="v1", subfolder="best")
    assert torch.equal(new_tokens(loaded)["default"].rows["text_encoder"], rows)
    del hub.files["me/dog", "v1", f"best/{LEARNED_EMBEDS}"]
    with pytest.raises(FileNotFoundError, match="new token <dog>, whose embeddings are not beside it"):
        ether.load(tiny_pipeline(), "me/dog", revision="v1", subfolder="best", cache_dir=tmp_path / "elsewhere")
