"""The end of a run: the upload gets the right files, and its failure costs nothing but itself."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from training.helpers import provenance

from ether_diffusion.training import finish

Train = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Calls to the Hub, which takes everything as user "me"."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(repo_id: str, **settings: Any) -> SimpleNamespace:
        calls.append(("create_repo", {"repo_id": repo_id, **settings}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(**settings: Any) -> None:
        written = Path(settings["folder_path"]) / "config.yaml"
        calls.append(("upload_folder", {**settings, "settings": written.read_text() if written.is_file() else None}))

    monkeypatch.setattr(finish, "create_repo", create_repo)
    monkeypatch.setattr(finish, "upload_folder", upload_folder)
    return calls


Hub = list[tuple[str, dict[str, Any]]]


@pytest.mark.parametrize(
    ("hub_model_id", "private", "repository"), [(None, True, "me/dog"), ("us/rex", False, "us/rex")]
)
def test_the_finished_run_is_uploaded(
    hub_model_id: str | None, private: bool, repository: str, train: Train, hub: Hub
) -> None:
    common = {"push_to_hub": True, "max_train_steps": 1, "resolution": 16}
    run = train("dog", hub_model_id=hub_model_id, hub_private=private, **common)
    (first, created), (second, uploaded), (third, added) = hub
    assert (first, second, third) == ("create_repo", "upload_folder", "upload_folder")
    assert created["repo_id"] == (hub_model_id or "dog")
    assert (created["exist_ok"], created["private"]) == (True, private)
    assert (uploaded["repo_id"], Path(uploaded["folder_path"])) == (repository, run)
    assert "config.yaml" in uploaded["ignore_patterns"]
    assert added["repo_id"] == repository
    settings = yaml.safe_load(added["settings"])
    assert (settings["output_dir"], settings["instance_prompt"]) == ("dog", "a photo of qwe dog")
    assert str(run.parent) not in added["settings"]


def test_the_upload_has_the_weights_and_leaves_out_what_only_this_machine_needs(train: Train, hub: Hub) -> None:
    pytest.importorskip("tensorboard")
    run = train(
        push_to_hub=True,
        max_train_steps=1,
        num_validation_images=1,
        report_to="tensorboard",
        with_prior_preservation=True,
        class_prompt="a dog",
        num_class_images=1,
    )
    ignored = hub[1][1]["ignore_patterns"]
    files = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    kept = {name for name in files if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert {"ether_weights.safetensors", "README.md", "samples/step-000001/00.png"} <= kept
    left_out = {name.partition("/")[0] for name in set(files) - kept}
    of_this_machine = {"report.html", "provenance.json", "config.yaml", ".written.jsonl"}  # photos and paths
    assert left_out == {"checkpoints", "cache", "class_images", "ether-diffusion"} | of_this_machine
    assert {name.partition("/")[0] for name in kept if "/" in name} == {"samples"}


class UnreachableError(Exception):
    """As httpx has them: no OSError."""


@pytest.mark.parametrize("error", [HfHubHTTPError, UnreachableError, OSError, ValueError])
def test_a_failing_upload_keeps_the_run_and_says_how_to_upload_it(
    error: type[Exception], train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def create_repo(*args: Any, **settings: Any) -> None:
        if error is HfHubHTTPError:
            raise HfHubHTTPError("no access\nmore", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
        raise error("no access\nmore")

    monkeypatch.setattr(finish, "create_repo", create_repo)
    with caplog.at_level(logging.ERROR):
        run = train("dog", push_to_hub=True, hub_model_id="me/dog", max_train_steps=1, resolution=16)
    [record] = [record for record in caplog.records if record.name == "ether_diffusion.training.finish"]
    said = record.getMessage()
    excluded = " ".join(f"--exclude '{pattern}'" for pattern in finish.NOT_UPLOADED)  # what else would be published
    assert {"report.html", "provenance.json", "cache/*"} < set(finish.NOT_UPLOADED)
    assert said == (
        f"not uploaded to me/dog: no access. The run is complete in {run}; "
        f"log in with `hf auth login` and upload it with `hf upload me/dog {run} {excluded}`"
    )
    assert provenance(run)["status"] == "finished"
    assert (run / "ether_weights.safetensors").is_file()


def test_nothing_is_uploaded_unless_asked(train: Train, hub: Hub) -> None:
    train(max_train_steps=1, resolution=16)
    assert hub == []
