# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network beyond this machine, no touching of the user's caches, seeded numbers.

Everything a test needs (models, tokenizers, videos, data sets) is made by the test or lies in `tests/`. The settings
below are environment variables, so that the processes a test starts have them too; they are set before any library
reads them. A test that talks to a Hub asks for the fixture `hub`, a server on localhost (`hub_server.py`).
"""

import ipaddress
import os
import random
import shutil
import socket
import sys
import tempfile

import numpy as np
import pytest


pytest_plugins = ("hub_server",)  # the fixtures `hub` and `hub_here`: a Hub on localhost

_CACHE = tempfile.mkdtemp(prefix="d2vlm-hf-tests-")
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

os.environ.update(
    {
        "HF_HOME": _CACHE,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }
)
for _name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(_name, None)
os.environ.setdefault("OMP_NUM_THREADS", str(_CORES))  # torch takes its number of threads from here


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine. No `OSError`, so that no library takes it for a network that is down."""


def _refuse_beyond_localhost(host: object) -> None:
    """Raises unless `host` is this machine: empty, `localhost` or a loopback address."""
    name = host.decode() if isinstance(host, bytes) else host
    if name is None or name in ("", "localhost"):
        return
    try:
        address = ipaddress.ip_address(str(name).partition("%")[0])
    except ValueError:
        address = None
    if address is None or not (address.is_loopback or address.is_unspecified):
        raise NetworkBlockedError(f"A test tried to reach {name!r}; tests may only talk to localhost.")


def _guarded(function, host_of):
    """`function`, refusing every host beyond this machine; `host_of` finds the host among its arguments."""

    def guarded(*args, **kwargs):
        _refuse_beyond_localhost(host_of(*args, **kwargs))
        return function(*args, **kwargs)

    return guarded


def _host_of_socket_call(sock, *args):
    # connect(address), connect_ex(address), sendto(data, [flags,] address); a Unix socket's address is a path
    address = args[-1]
    return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None


def _host_of_create_connection(address, *args, **kwargs):
    return address[0]


def _host_of_getaddrinfo(host, *args, **kwargs):
    return host


def pytest_configure(config):
    """Blocks the network before the first test module is imported, for as long as pytest runs."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    config.add_cleanup(lambda: shutil.rmtree(_CACHE, ignore_errors=True))
    for name in ("connect", "connect_ex", "sendto"):
        patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name), _host_of_socket_call))
    patch.setattr(socket, "create_connection", _guarded(socket.create_connection, _host_of_create_connection))
    patch.setattr(socket, "getaddrinfo", _guarded(socket.getaddrinfo, _host_of_getaddrinfo))


@pytest.fixture(autouse=True)
def _seed():
    """The same global random state at the start of every test, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of its own, seeded with 0, for a test's random data."""
    return np.random.default_rng(0)
