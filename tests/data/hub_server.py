"""A small Hugging Face hub on this machine, and a process that takes it for the real one.

The server answers what huggingface_hub and datasets ask of the hub for reading: what a repository
is, which files it has, and their bytes, by HTTP 1.1 with ETag, X-Repo-Commit and ranges. Both
libraries read the hub's address when they are imported, so reading it needs a process of its own.
"""

import hashlib
import json
import multiprocessing
import os
import re
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")
_PATHS = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_PIECE = 1 << 16

# What the hub answers whoever has not logged in where it has nothing for him, a private repository
# or none. Over https huggingface_hub knows that by the status, over http by the code alone.
NOT_FOUND = (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username."})
GATED = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})


class HubServer:
    """Repositories in `root`: models/USER/NAME and datasets/USER/NAME are folders of files.

    Attributes:
        address: the hub's, for HF_ENDPOINT.
        requests: "METHOD path" of all that was asked so far.
        refused: repository -> (status, headers) that answers all requests for it.
        cut: path of a file -> where it is cut: nothing from this byte on is sent, and the
            connection ends.
        cut_once: the first cut ends these faults.
        dropped: parts of paths; a request for a path that has one gets no answer, but the end of
            the connection.
        silent: the same, but the connection stays open until the server is healed or closed.
        heals_after: how many more requests without an answer there are before the faults end.
    """

    def __init__(self, root):
        self.root = root
        self.requests = []
        self.refused = {}
        self.cut = {}
        self.cut_once = False
        self.dropped = set()
        self.silent = set()
        self.heals_after = None
        self.healed = threading.Event()
        self.connections = set()
        self._open(0)

    def _open(self, port):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _close(self):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        self.heal()
        self._close()

    @contextmanager
    def away(self):
        """Within it nobody is at the address, and every connection has ended."""
        self._close()
        try:
            yield
        finally:
            self._open(self._port)

    def folder(self, kind, name):
        """The folder of a repository, to put files in."""
        folder = self.root / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def heal(self):
        """End all faults."""
        for faults in (self.refused, self.cut, self.dropped, self.silent):
            faults.clear()
        self.heals_after, self.cut_once = None, False
        self.healed.set()
        self.healed = threading.Event()

    def asked(self, *parts):
        """The requests whose paths have all these parts."""
        return [request for request in self.requests if all(part in request for part in parts)]

    def answers(self, path):
        """Whether this path has an answer; where it has none, known after the wait."""
        silent = any(part in path for part in self.silent)
        if not silent and not any(part in path for part in self.dropped):
            return True
        if self.heals_after is not None:
            self.heals_after -= 1
            if self.heals_after == 0:
                self.heal()
        elif silent:
            self.healed.wait()
        return False


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _commit(folder):
    """Forty digits that change with the repository's files."""
    digest = hashlib.sha1()
    for path in _files(folder):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._respond()

    def do_HEAD(self):
        self._respond()

    def do_POST(self):
        self._respond()

    def _respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if not self.hub.answers(path):
            self.close_connection = True
            return
        try:
            for pattern, answer in (
                (_TREE, self._tree),
                (_PATHS, self._paths_info),
                (_INFO, self._info),
                (_FILE, self._file),
            ):
                if match := pattern.fullmatch(path):
                    kind, name, revision, *rest = match.groups()
                    kind = (kind or "models").rstrip("/")
                    folder = self.hub.root / kind / name
                    if name in self.hub.refused:
                        return self._refuse(*self.hub.refused[name])
                    if not folder.is_dir():
                        return self._refuse(*NOT_FOUND)
                    if revision not in (None, "main", _commit(folder)):
                        return self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
                    return answer(folder, name, *rest, body)
            self._refuse(404, {})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _info(self, folder, name, body):
        siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in _files(folder)]
        self._json(
            {
                "_id": "0" * 24,
                "id": name,
                "sha": _commit(folder),
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
                "lastModified": "2024-01-01T00:00:00.000Z",
                "createdAt": "2024-01-01T00:00:00.000Z",
            }
        )

    def _tree(self, folder, name, under, body):
        query = parse_qs(urlsplit(self.path).query)
        base = folder / (under or "")
        if not base.is_dir():
            return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        deep = query.get("recursive", ["false"])[0].lower() == "true"
        entries = sorted(base.rglob("*") if deep else base.iterdir())
        self._json([self._entry(folder, p) for p in entries])

    def _paths_info(self, folder, name, body):
        asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        self._json([self._entry(folder, folder / p) for p in asked if (folder / p).exists()])

    def _entry(self, folder, path):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        size = path.stat().st_size
        return {"type": "file", "path": name, "oid": _etag(path), "size": size}

    def _file(self, folder, name, inner, body):
        path = folder / inner
        if not path.is_file():
            return self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        start, end, size = 0, len(content), len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            end = min(int(asked[2]) + 1, size) if asked[2] else size
            if start >= size:
                return self._refuse(416, {"Content-Range": f"bytes */{size}"})
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", _commit(folder))
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = min(end, self.hub.cut.get(inner, end))
        for at in range(start, stop, _PIECE):
            self.wfile.write(content[at : min(at + _PIECE, stop)])
        if stop < end:
            self.close_connection = True
            if self.hub.cut_once:
                self.hub.heal()

    def _json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status, headers):
        body = json.dumps({"error": headers.get("X-Error-Message", "refused")}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def hub_environment(address, home):
    """What a process needs of its environment to take `address` for the hub."""
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _adopt(environment):
    os.environ.update(environment)


@contextmanager
def hub_reader(address, home):
    """A process for functions to be called in: call(function, *arguments) is what it returns."""
    spawn = multiprocessing.get_context("spawn")
    environment = hub_environment(address, home)
    with ProcessPoolExecutor(1, spawn, initializer=_adopt, initargs=(environment,)) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result(60)


@dataclass
class Read:
    """What came of reading, in such a process.

    Attributes:
        value: what was read; of documents, those before the error.
        error: in place of the rest, or None.
        slept: seconds that the libraries would have slept between their tries.
        settings_stay: the libraries' settings afterwards are those from before.
    """

    value: Any = None
    error: Exception | None = None
    slept: float = 0.0
    settings_stay: bool = False


@contextmanager
def _hurried(answer):
    """Within it nobody sleeps, and an answer must come within so many seconds; a Read."""
    import datasets
    from huggingface_hub import constants, get_session

    from bertkern.data import hub

    def settings():
        limits = [v for k, v in vars(datasets.config).items() if k.startswith("STREAMING_")]
        return [limits, get_session().event_hooks]

    read, before, sleep = Read(), settings(), time.sleep

    def note(seconds):
        if seconds < 1:
            sleep(seconds)
        else:
            read.slept += seconds

    with ExitStack() as stack:
        for where, name, value in (
            (time, "sleep", note),
            (hub, "ANSWER", answer),
            (constants, "HF_HUB_DOWNLOAD_TIMEOUT", answer),
            (constants, "HF_HUB_ETAG_TIMEOUT", answer),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        try:
            yield read
        except Exception as error:  # the test looks at it
            read.error = error
    read.settings_stay = settings() == before


def hub_documents(place, count=None, answer=10):
    """The documents of a hub name, or the first so many."""
    from bertkern.data import stream_documents

    with _hurried(answer) as read:
        read.value = []
        for document in islice(stream_documents([place]), count):
            read.value.append(document)
    return read


def hub_pairs(place, source, target):
    """The pairs of a hub name."""
    from bertkern.data import read_parallel

    with _hurried(10) as read:
        read.value = read_parallel([place], source, target)
    return read


def hub_model(name, answer=10, **options):
    """The tensors of a masked language model of the hub, as arrays."""
    from bertkern.models import BertForMaskedLM

    with _hurried(answer) as read:
        model = BertForMaskedLM.from_pretrained(name, **options)
        read.value = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return read
