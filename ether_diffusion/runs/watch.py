"""The report of a training that goes on, served on this machine alone and renewed when the run's files change."""

from __future__ import annotations

import hashlib
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ether_diffusion.pipelines.file import FILE_NAME
from ether_diffusion.pipelines.schema import LORA_FILE
from ether_diffusion.reading import DamagedFileError
from ether_diffusion.runs.choosing import SAMPLE_SCORES
from ether_diffusion.runs.record import BEST_FILE, read_run
from ether_diffusion.runs.report import report_page

HOST, PORT = "127.0.0.1", 8765
WATCHED = (
    *("config.yaml", "provenance.json", "metrics.jsonl", "validation.jsonl", SAMPLE_SCORES, "scores.json"),
    *(FILE_NAME, BEST_FILE, LORA_FILE),
)
"""The files that the page is made of, or lists, beside the samples."""


def state_of(folder: Path) -> str:
    """Sixteen hexadecimal digits that change when a file changes that the page is made of."""
    paths = [*(folder / name for name in WATCHED), *sorted((folder / "samples").glob("*"))]
    digest = hashlib.sha256()
    for path in paths:
        try:
            facts = path.stat()
        except FileNotFoundError:  # not there yet, or just being replaced
            continue
        digest.update(f"{path.relative_to(folder)}\0{facts.st_mtime_ns}\0{facts.st_size}\0".encode())
    return digest.hexdigest()[:16]


class ReportServer(ThreadingHTTPServer):
    """Answers ``/`` with the page and ``/state`` with :func:`state_of`; to this machine alone.

    The page is made when it is asked for, once for each state of the folder.

    Args:
        folder: the run folder.
        port: to listen at; 0 for a free one.

    Raises:
        FileNotFoundError: the folder is not a run's.
        RunRecordError: a file of it is damaged.
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        read_run(folder)
        self.folder = folder
        self._lock = threading.Lock()
        self._state, self._page = "", b""
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> tuple[str, bytes]:
        """The state of the folder and its page.

        Raises:
            DamagedFileError, OSError: the folder cannot be read now.
        """
        with self._lock:
            state = state_of(self.folder)
            if state != self._state:
                page = report_page(read_run(self.folder), watched=state).encode()
                self._state, self._page = state, page
            return self._state, self._page

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that went away before it had its answer; tell any other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer the two addresses; a page that the browser has already is not sent again."""
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "this page is for this machine alone")  # another site's name for it
        elif self.path == "/state":
            self._answer(HTTPStatus.OK, state_of(self.server.folder))
        elif self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "there is the page / alone")
        else:
            self._answer_page()

    def _answer_page(self) -> None:
        try:
            state, page = self.server.page()
        except (DamagedFileError, OSError) as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), again=True)
            return
        if self.headers.get("If-None-Match") == f'"{state}"':
            self._answer(HTTPStatus.NOT_MODIFIED, b"", etag=state)
        else:
            self._answer(HTTPStatus.OK, page, "text/html", state)

    def _answer(
        self,
        status: HTTPStatus,
        content: str | bytes,
        kind: str = "text/plain",
        etag: str | None = None,
        again: bool = False,
    ) -> None:
        """Send an answer.

        Args:
            status: of the answer.
            content: of the page.
            kind: of the content.
            etag: the state that a page is of.
            again: whether the browser is to ask again by itself, for an answer without the page's script.
        """
        body = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        if etag is not None:
            self.send_header("ETag", f'"{etag}"')
        if again:
            self.send_header("Refresh", "2")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page that looks every two seconds would fill the terminal."""


def watch(folder: Path, port: int | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        folder: the run folder.
        port: to listen at; where none is given :data:`PORT`, or a free one if it is taken.

    Raises:
        FileNotFoundError: the folder is not a run's.
        RunRecordError: a file of it is damaged.
        OSError: the port is taken.
    """
    with _server(folder, port) as server:
        print(f"{server.address} has the report of {folder}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def _server(folder: Path, port: int | None) -> ReportServer:
    if port is not None:
        return ReportServer(folder, port)
    try:
        return ReportServer(folder, PORT)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        return ReportServer(folder, 0)
