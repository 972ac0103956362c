# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Every Python block of README.md and of the cards is run as it stands, on the shipped checkpoint and on a tiny one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Video
from hub_server import REPO_ROOT, LocalHub
from tiny_runs import preference_dataset, sft_rows, tiny
from transformers.pipelines import PIPELINE_REGISTRY

import d2vlm_hf
from d2vlm_hf.hub.cards import ConvertedCardInfo, ModelCardInfo, render_converted_card, render_model_card
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own call

CARDS = REPO_ROOT / "hub_cards"
DOCUMENTS = [REPO_ROOT / "README.md", *sorted(CARDS.glob("*/README.md"))]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_blocks(text: str, name: str) -> dict[str, Any]:
    """Run the blocks of a document one after the other, as a reader would, and return what they have defined."""
    blocks, defined = python_blocks(text), {"__name__": "__main__"}
    assert blocks, f"{name} has no Python block"
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"<block {number} of {name}>", "exec"), defined)
    return defined


def is_answer(result: Any) -> bool:
    return isinstance(result["answer"], str) and all(0 <= e["start"] <= e["end"] for e in result["evidence"])


@pytest.fixture(params=["shipped", "tiny"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the checkpoint that ships with the package, and of a tiny one in its place; the clip is `video.mp4`."""
    folder = Path(d2vlm_hf.bundled_checkpoint())
    if request.param == "tiny":
        folder = tmp_path / "tiny"
        save_checkpoint(folder, *tiny())
        monkeypatch.setattr(d2vlm_hf, "bundled_checkpoint", lambda: str(folder))
        task = PIPELINE_REGISTRY.supported_tasks["video-grounding"]
        monkeypatch.setitem(task, "default", {"model": (str(folder), "main")})
    elif not (folder / "model.safetensors").is_file():
        pytest.skip("the trained checkpoint is not in this revision yet; the blocks run on the tiny one")
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(d2vlm_hf.bundled_clip(), here / "video.mp4")
    monkeypatch.chdir(here)
    return folder


def test_the_readme_runs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defined = run_blocks((REPO_ROOT / "README.md").read_text(), "README.md")
    assert is_answer(defined["result"])
    assert capsys.readouterr().out.startswith(defined["result"]["answer"])
    assert defined["model"].config.model_type == "d2vlm"
    assert type(defined["processor"]).__name__ == "D2VLMProcessor"


def quick_start(folder: Path) -> str:
    """The card of a model, or one with the same quick start while it waits for its facts."""
    if (folder / "README.md").is_file():
        return (folder / "README.md").read_text()
    facts = json.loads((folder / "facts.json").read_text())
    info_class, render = {
        "model": (ModelCardInfo, render_model_card),
        "converted": (ConvertedCardInfo, render_converted_card),
    }[facts["card"]]
    known = ("repo_id", "license", "source", "example_video", "example_question")
    return str(render(info_class(**{name: facts[name] for name in known if name in facts})))


def test_the_cards_of_models_run(checkpoint: Path, hub_of_all: LocalHub, tmp_path: Path) -> None:
    """Each repository of a card holds the checkpoint as its pipeline saves it, and the example video."""
    transformers.pipeline("video-grounding", model=str(checkpoint), device="cpu").save_pretrained(tmp_path / "saved")
    files = {p.relative_to(tmp_path / "saved").as_posix(): p for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    clip = Path(d2vlm_hf.bundled_clip())
    contents = {name: path.read_bytes() for name, path in files.items()} | {clip.name: clip.read_bytes()}
    ran = []
    for folder in sorted(path.parent for path in CARDS.glob("*/facts.json")):
        facts = json.loads((folder / "facts.json").read_text())
        if facts["card"] == "dataset":
            continue
        if ("model", facts["repo_id"]) not in hub_of_all.repos:
            hub_of_all.create(facts["repo_id"])
        hub_of_all.write(facts["repo_id"], contents)
        defined = run_blocks(quick_start(folder), f"hub_cards/{folder.name}")
        assert is_answer(defined["result"])
        ran.append(folder.name)
    assert ran == ["d2vlm-phi3", "d2vlm-shapes"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return sft_rows(tmp_path_factory.mktemp("videos"), videos=2)


def test_the_card_of_the_preferences_runs(hub_of_all: LocalHub, rows: list[dict], capsys) -> None:
    folder = CARDS / "d2vlm-shapes-preference"
    repo_id = json.loads((folder / "facts.json").read_text())["repo_id"]
    data = preference_dataset(rows, per_row=1)
    data.push_to_hub(repo_id)
    defined = run_blocks((folder / "README.md").read_text(), "the card of the preferences")
    first = data.cast_column("video", Video(decode=False))[0]
    assert {**defined["row"], "video": None} == {**first, "video": None}
    assert defined["row"]["video"]["bytes"] == Path(first["video"]["path"]).read_bytes()
    assert first["question"] in capsys.readouterr().out


def test_every_document_with_code_is_run_here() -> None:
    """A document of another kind that gains a Python block must be named in this file."""
    kinds = {path.relative_to(REPO_ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "hub_cards/d2vlm-phi3/README.md"} <= kinds
    others = [path for name in ("docs", "recipes", "speed") for path in (REPO_ROOT / name).rglob("*.md")]
    others += [CARDS / "README.md", REPO_ROOT / "CHANGELOG.md"]
    assert [path.name for path in others if python_blocks(path.read_text())] == []
