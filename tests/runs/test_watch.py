"""The report of a training that goes on: served to this machine, and another page as soon as the run has more."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from page.serving import serving

from ether_diffusion.cli.programs.report import main
from ether_diffusion.files import write_text
from ether_diffusion.training import finish, loop


def get(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    request = urllib.request.Request(
        address, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture
def run(train: Callable[..., Path]) -> Path:
    return train(max_train_steps=1)


def test_the_page_of_a_running_training_changes(train: Callable[..., Path], run: Path) -> None:
    """A second training in this folder goes on while a reader looks at the page again and again."""
    progress: list[str] = []
    states: set[str] = set()
    done = threading.Event()

    def read(address: str) -> None:
        while not done.is_set():
            states.add(get(f"{address}state")[1])
            status, page, _ = get(address)
            if status == 200 and (found := re.search(r"([\d,]+) of ([\d,]+) steps", page)):
                progress.append(found[0])
            time.sleep(0.05)

    with serving(run) as server, pytest.MonkeyPatch.context() as patch:
        for module in (loop, finish):  # this process draws figures for the reader alone
            patch.setattr(module, "write_report", lambda folder: None)
        assert "1 of 1 steps" in get(server.address)[1]
        reader = threading.Thread(target=read, args=(server.address,))
        reader.start()
        train(resume="latest", max_train_steps=6, checkpointing_steps=1, validation_steps=2)
        time.sleep(0.5)
        done.set()
        reader.join()
        last = get(server.address)[1]
    assert "6 of 6 steps" in last
    assert "Finished" in last
    assert len(states) > 2
    assert len(set(progress)) > 1


def test_a_page_that_the_browser_has_is_not_sent_again(run: Path) -> None:
    with serving(run) as server:
        status, page, headers = get(server.address)
        assert status == 200
        assert f"data-shown={headers['ETag']}" in page
        assert get(f"{server.address}state")[1] == headers["ETag"].strip('"')
        assert get(server.address, If_None_Match=headers["ETag"])[:2] == (304, "")
        write_text(run / "metrics.jsonl", "")
        status, _, again = get(server.address, If_None_Match=headers["ETag"])
        assert status == 200
        assert again["ETag"] != headers["ETag"]


def test_a_file_that_the_page_lists_renews_it(run: Path) -> None:
    """The LoRA beside a result is written after the run is finished."""
    with serving(run) as server:
        before = get(f"{server.address}state")[1]
        assert "pytorch_lora_weights.safetensors" not in get(server.address)[1]
        (run / "pytorch_lora_weights.safetensors").write_bytes(b"0")
        assert get(f"{server.address}state")[1] != before
        assert 'href="pytorch_lora_weights.safetensors"' in get(server.address)[1]


def test_the_page_asks_for_nothing_but_the_state(run: Path) -> None:
    with serving(run) as server:
        page = get(server.address)[1]
    assert "default-src 'none'" in page
    assert "connect-src 'self'" in page
    assert re.findall(r"fetch\((.*?)\)", page) == ['"state"']
    assert '<noscript><meta http-equiv="refresh"' in page
    assert "fetch(" not in (run / "report.html").read_text()


def test_other_names_of_this_machine_and_other_files_are_refused(run: Path) -> None:
    with serving(run) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert get(server.address, Host="stranger.example")[0] == 403
        for path in ("provenance.json", "../", "state/", "samples/prompts.json"):
            assert get(server.address + path)[0] == 404


def test_a_damaged_folder_is_told_and_the_server_goes_on(run: Path) -> None:
    kept = (run / "provenance.json").read_text()
    with serving(run) as server:
        write_text(run / "provenance.json", "{")
        status, told, headers = get(server.address)
        assert status == 500
        assert "provenance.json" in told
        assert headers["Refresh"] == "2"  # the page's own script, which looks again, is not in this answer
        write_text(run / "provenance.json", kept)
        assert get(server.address)[0] == 200


def test_a_browser_that_goes_away_leaves_no_traceback(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with serving(run) as server:
            with socket.create_connection(server.server_address[:2]) as browser:
                browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it resets at once
                browser.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert get(server.address)[0] == 200
    assert capfd.readouterr().err == ""


def test_an_error_of_the_server_itself_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(run: object, watched: object) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr("ether_diffusion.runs.watch.report_page", broken)
    with serving(run) as server, pytest.raises(http.client.RemoteDisconnected):
        get(server.address)
    assert "RuntimeError: a defect" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["RUN", "RUN", "--watch"], "give one folder, and no --output"),
        (["RUN", "--watch", "--output", "page.html"], "give one folder, and no --output"),
        (["NOTHING", "--watch"], "is not a run folder"),
        (["DAMAGED", "--watch"], "provenance.json is damaged"),
        (["DAMAGED"], "provenance.json is damaged"),
        (["RUN", "--port", "80"], "--port is for --watch"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    arguments: list[str], told: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    write_text(damaged / "config.yaml", (run / "config.yaml").read_text())
    write_text(damaged / "provenance.json", "{")
    places = {"RUN": str(run), "NOTHING": str(tmp_path / "nothing"), "DAMAGED": str(damaged)}
    with pytest.raises(SystemExit, match="2"):
        main([places.get(argument, argument) for argument in arguments])
    assert told in capsys.readouterr().err
