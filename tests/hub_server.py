# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A small Hugging Face Hub on 127.0.0.1 for the tests: real revisions, real uploads, faults on demand.

The server keeps everything in memory. The HF libraries read `HF_ENDPOINT` when they are imported, so tests either run a
script in a new process (`run_script`) or point the imported library at the server (`hub_here`).
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_handler import Entry, HubHandler, with_no_peer


REPO_ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_me"
LFS_NAMES = re.compile(r"\.(safetensors|parquet|mp4|bin|arrow|gz|zip|pt|png|model)$")
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Commit:
    """One revision of a repository."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    tree: dict[str, Entry]


@dataclass
class Repo:
    """One repository: its commits by oid, and its branches and tags."""

    kind: str  # model | dataset | space
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, tag or oid (full, or a prefix of at least 7 digits)."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits and len(oid) >= 7:
            oid = next((full for full in self.commits if full.startswith(oid)), oid)
        return self.commits.get(oid)

    def history(self, oid: str) -> list[Commit]:
        """Return the commit and its ancestors, newest first."""
        out = [self.commits[oid]]
        while out[-1].parent:
            out.append(self.commits[out[-1].parent])
        return out


@dataclass
class Fault:
    """What shall happen, for which requests and how often (see `LocalHub.fail`, `cut`, `lose_answer`, `before`)."""

    action: str  # status | cut | lose | call
    method: str
    path: str
    times: int | None
    status: int = 500
    message: str = ""
    code: str | None = None
    after_bytes: int = 0
    call: Callable[[], object] | None = None
    hits: int = 0

    def matches(self, method: str, path: str) -> bool:
        """Tell whether the fault strikes this request."""
        spent = self.times is not None and self.hits >= self.times
        return not spent and self.method in ("*", method) and re.search(self.path, path) is not None


class LocalHub:
    """The server and its content; `start()` listens, `env()` gives the variables that point a process at it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}  # multipart uploads that are not completed yet
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path with query, status (0: connection broken)
        self.connections: set[socket.socket] = set()
        self.page_size = 1000  # entries of one page of a tree
        self.lfs_threshold = 10_000_000  # bytes from which any file is stored as LFS
        self.part_size: int | None = None  # bytes of one part; None uploads every file in one piece
        self.lock = threading.RLock()
        self.server: ThreadingHTTPServer | None = None
        self.port = 0

    # -- life -----------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        """The value of `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "LocalHub":
        """Listen on the port of the last time, or on a free one."""
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (HubHandler,), {"hub": self}))
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening and break the open connections."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        for connection in list(self.connections):
            with_no_peer(connection.shutdown, socket.SHUT_RDWR)

    def env(self, token: str | None = TOKEN, home: Path | None = None) -> dict[str, str]:
        """Return the environment variables that make the HF libraries of a new process use this Hub."""
        out = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return out | ({"HF_TOKEN": token} if token else {})

    # -- faults ---------------------------------------------------------------------------------------------------
    def fail(
        self, method: str, path: str, status: int, message: str = "", code: str | None = None, times: int | None = None
    ) -> AbstractContextManager[Fault]:
        """Answer requests whose path matches the pattern with an error status (context manager)."""
        return self._fault(Fault("status", method, path, times, status, message or f"injected {status}", code))

    def cut(
        self, method: str, path: str, after_bytes: int = 0, times: int | None = None
    ) -> AbstractContextManager[Fault]:
        """Break the connection once so many bytes of the body went over the line (context manager)."""
        return self._fault(Fault("cut", method, path, times, after_bytes=after_bytes))

    def lose_answer(self, method: str, path: str, times: int | None = None) -> AbstractContextManager[Fault]:
        """Do what the request asks, then break the connection instead of answering (context manager)."""
        return self._fault(Fault("lose", method, path, times))

    def before(self, method: str, path: str, call: Callable[[], object]) -> AbstractContextManager[Fault]:
        """Call a function before the first request that matches is looked at (context manager)."""
        return self._fault(Fault("call", method, path, times=1, call=call))

    @contextmanager
    def _fault(self, fault: Fault) -> Iterator[Fault]:
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections for a while."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    # -- content --------------------------------------------------------------------------------------------------
    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        """Return a repository that exists."""
        return self.repos[kind, repo_id]

    def head(self, repo_id: str, kind: str = "model", revision: str = "main") -> str:
        """Return the oid that a branch stands at."""
        return self.repo(repo_id, kind).branches[revision]

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Return path and content of every file of a revision."""
        commit = self.repo(repo_id, kind).find(revision)
        return {path: self.blobs[entry.sha256] for path, entry in sorted(commit.tree.items())}

    def create(self, repo_id: str, kind: str = "model", private: bool = False, author: str = "me") -> Repo:
        """Make a repository with the first commit that the Hub makes (`.gitattributes`)."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        tree = {".gitattributes": self.store(GIT_ATTRIBUTES)}
        self.add_commit(repo, "main", tree, "initial commit", author=author)
        return repo

    def write(
        self, repo_id: str, files: Mapping[str, bytes], title: str = "A push by somebody else", kind: str = "model"
    ) -> str:
        """Commit files to `main` as another client would, and return the new oid."""
        repo = self.repo(repo_id, kind)
        tree = repo.find("main").tree | {path: self.store(data, path) for path, data in files.items()}
        return self.add_commit(repo, "main", tree, title, author="other").oid

    def store(self, data: bytes, path: str = "") -> Entry:
        """Keep a blob and return the entry that stands for it."""
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha] = data
        return Entry(sha, self.is_lfs(path, len(data)))

    def is_lfs(self, path: str, size: int) -> bool:
        """Tell whether a file of this name and size is stored as LFS."""
        return bool(LFS_NAMES.search(path)) or size >= self.lfs_threshold

    def add_commit(
        self, repo: Repo, branch: str, tree: dict[str, Entry], title: str, message: str = "", author: str = "me"
    ) -> Commit:
        """Put a commit on a branch."""
        parent = repo.branches.get(branch)
        state = json.dumps([repo.kind, repo.id, parent, title, sorted(tree.items()), len(repo.commits)])
        oid = hashlib.sha1(state.encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = repo.commits[oid] = Commit(oid, parent, title, message, author, date, tree)
        repo.branches[branch] = oid
        return commit


PREAMBLE = """
import socket, sys, time

def _local_only(event, args):
    host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else None
    host = args[0] if event == "socket.getaddrinfo" else host
    if host not in (None, "", "127.0.0.1", "::1", "localhost", b"127.0.0.1", b"localhost"):
        raise socket.gaierror(f"tests reach no host but this one, not {host}")

sys.addaudithook(_local_only)

class _Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCK else self.finder.find_spec(name, path, target)

if BLOCK:
    sys.meta_path[:] = [_Hidden(finder) for finder in sys.meta_path]
if FAST_RETRIES:
    _sleep = time.sleep
    time.sleep = lambda seconds: _sleep(min(seconds, 0.01))
"""


def run_script(
    code: str,
    hub: LocalHub,
    block: Sequence[str] = (),
    *,
    token: str | None = TOKEN,
    home: Path | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fast_retries: bool = False,
    check: bool = True,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own whose Hub is the local one.

    Args:
        code (`str`): The script. The package can be imported in it unless blocked.
        hub (`LocalHub`): The server.
        block (`Sequence[str]`): Top-level modules that must look as if they were not installed.
        token (`str`, *optional*): Value of `HF_TOKEN`; None for a user who is not logged in.
        home (`Path`, *optional*): Another `HF_HOME`, for a process that starts with an empty cache.
        cwd (`Path`, *optional*): Working directory; by default the `HF_HOME`.
        env (`Mapping[str, str]`, *optional*): More environment variables.
        fast_retries (`bool`): Cut every sleep to 0.01 s, so that the retries of huggingface_hub (23 s) do not last.
        check (`bool`): Fail the test, with the output of the script, when it exits with an error.
        timeout (`float`): Seconds.

    Returns:
        `subprocess.CompletedProcess`: With `stdout` and `stderr` as text.
    """
    taken = ("HF_", "HUGGING", "TRANSFORMERS_", "D2VLM_", "PYTHONPATH")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(taken)}
    started = {**inherited, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1", **hub.env(token, home), **(env or {})}
    preamble = PREAMBLE.replace("BLOCK", repr(tuple(block))).replace("FAST_RETRIES", repr(fast_retries))
    done = subprocess.run(
        [sys.executable, "-c", preamble + code],
        env=started,
        cwd=cwd or hub.home,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        pytest.fail(f"the script ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """The local Hub, running for the whole session; its `HF_HOME` is an empty temporary folder."""
    server = LocalHub(tmp_path_factory.mktemp("hf_home")).start()
    yield server
    server.stop()


@pytest.fixture
def hub_here(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The local Hub for huggingface_hub in this process, which has read its endpoint already; retries do not wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hub.home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    for name, value in hub.env().items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture
def hub_of_all(hub_here: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """The local Hub also for `transformers` and `datasets` in this process, which have read the endpoint as well."""
    import datasets
    import transformers
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.api, "endpoint", hub_here.url)  # behind `huggingface_hub.upload_file` and its like
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub_here.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # peft looks here
    return hub_here
