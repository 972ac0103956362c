# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what importing it costs and registers, its public names, and what its papers say."""

import json
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

import d2vlm_hf


ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "av",
    "datasets",
    "gradio",
    "matplotlib",
    "peft",
    "pycocoevalcap",
    "sentence_transformers",
    "torchcodec",
    "trl",
}


@pytest.fixture(scope="module")
def imported():
    """Top-level packages loaded by transformers' usual imports, and those that our own import adds to them."""
    code = (
        "import json, sys\n"
        "from transformers import AutoModel, AutoProcessor, pipeline\n"
        "before = set(sys.modules)\n"
        "import d2vlm_hf\n"
        "print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_importing_the_package_loads_nothing_heavy(imported):
    _, added = imported
    assert "d2vlm_hf" in added
    assert {name.split(".")[0] for name in added} & HEAVY == set()


def test_importing_the_package_loads_no_library_beyond_transformers(imported):
    # Time itself is measured in speed/, not here: what it costs is what it loads.
    before, added = imported
    loaded = {name.split(".")[0] for name in before}
    assert {name.split(".")[0] for name in added} - loaded - set(sys.stdlib_module_names) == {"d2vlm_hf"}
    assert len(added) < 60, added


def test_version_is_stated_once():
    assert re.fullmatch(r"\d+\.\d+\.\d+", d2vlm_hf.__version__)
    assert metadata.version("d2vlm-hf") == d2vlm_hf.__version__


def test_package_is_typed():
    assert (ROOT / "d2vlm_hf" / "py.typed").is_file()


@pytest.mark.parametrize("name", d2vlm_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(d2vlm_hf, name) is not None
    assert name in dir(d2vlm_hf)


def test_lazy_names_are_public_and_the_rest_is_an_error():
    assert set(d2vlm_hf._LAZY) <= set(d2vlm_hf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'evalute'; its public names are"):
        d2vlm_hf.evalute  # noqa: B018


def test_auto_classes_know_the_model():
    config_class = d2vlm_hf.D2VLMConfig
    assert isinstance(AutoConfig.for_model("d2vlm"), config_class)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert auto_class._model_mapping[config_class] is d2vlm_hf.D2VLMForConditionalGeneration
    assert AutoProcessor is not None
    assert MODEL_MAPPING[config_class] is d2vlm_hf.D2VLMForConditionalGeneration


def test_the_task_has_a_default_that_no_saved_pipeline_sees():
    task = PIPELINE_REGISTRY.supported_tasks["video-grounding"]
    assert task["impl"] is d2vlm_hf.VideoGroundingPipeline
    assert task["default"]["model"][0] == d2vlm_hf.bundled_checkpoint()
    saved = d2vlm_hf.VideoGroundingPipeline._registered_impl["video-grounding"]
    assert saved == {key: value for key, value in task.items() if key != "default"}


def test_registering_again_is_harmless(caplog):
    task = PIPELINE_REGISTRY.supported_tasks["video-grounding"]
    d2vlm_hf.register()
    assert PIPELINE_REGISTRY.supported_tasks["video-grounding"] is task
    assert caplog.records == []


def test_readme_says_at_once_whose_work_this_is():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "ndependent implementation" in lines[1]
    assert "not by the paper's authors" in lines[1]
    top = "\n".join(lines[:20])
    assert "make demo" in top
    assert "make test" in top


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == d2vlm_hf.__version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] == "Factorized Learning for Temporally Grounded Video-Language Models"
    authors = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert authors == ["Wenzheng Zeng", "Difei Gao", "Mike Zheng Shou", "Hwee Tou Ng"]
    assert paper["year"] == 2025
    assert {"type": "other", "value": "arXiv:2512.24097"}.items() <= paper["identifiers"][0].items()


def test_licence_notice_and_changelog():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    notice = (ROOT / "NOTICE").read_text()
    for fact in ("2512.24097", "BSD-3-Clause", "no code"):
        assert fact in notice, fact
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "Keep a Changelog" in changelog
    assert "## [Unreleased]" in changelog


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid", "2001:db8::1"])
def test_tests_cannot_reach_another_machine(host):
    for attempt in (
        lambda: socket.create_connection((host, 80), timeout=1),
        lambda: socket.getaddrinfo(host, 80),
        lambda: socket.socket().connect((host, 80)),
        lambda: socket.socket().connect_ex((host, 80)),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", (host, 80)),
    ):
        with pytest.raises(RuntimeError, match="tests may only talk to localhost"):
            attempt()


def test_tests_can_reach_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("localhost", "127.0.0.1"):
            socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
    left, right = socket.socketpair(socket.AF_UNIX)
    left.sendall(b"x")
    assert right.recv(1) == b"x"
    left.close()
    right.close()
