# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The cards of `hub_cards/` say what their facts say; facts come from what runs and evaluations have left."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hub_server import REPO_ROOT
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.numpy import save_file

from d2vlm_hf.bundled import bundled_clip
from d2vlm_hf.data.preference import make_preferences
from d2vlm_hf.data.shapes import ShapesConfig, make_rows
from d2vlm_hf.hub.card_data import DatasetCardInfo, Result
from d2vlm_hf.hub.convert import write_card
from d2vlm_hf.hub.key_maps import ConversionReport
from d2vlm_hf.hub.measured import (
    SHAPES_FIGURES,
    describe_settings,
    results_of_evaluation,
    results_of_log,
    summarise,
)
from d2vlm_hf.hub.records import RunRecord, read_run_record, write_run_record
from d2vlm_hf.hub.render_cards import describe_rows, load_card, main, missing_files, render, take


CARDS = REPO_ROOT / "hub_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/facts.json"))
RUN = RunRecord("SFT", command="d2vlm sft --config x.yaml", seed=3, effective_batch=30, wall_time_s=3600.0)


def figure(value: float) -> dict:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "rows": 50}


def evaluation() -> dict:
    """What `d2vlm evaluate` writes for shapes, shortened."""

    def part(value: float) -> dict:
        tasks = {
            "tvg": {"IoU": figure(value), "R1@0.5": figure(value + 0.02)},
            "rar": {"accuracy": figure(value / 2)},
        }
        metrics = {"protocol": "clean", "unit": "fraction", "tasks": tasks, "absent": None, "failed": 2}
        return {"benchmark": "shapes", "protocol": "clean", "metrics": metrics, "rows": [{"id": "a", "score": 1.0}]}

    settings = {"model": "x", "fps": None, "prompt": "default", "generate_kwargs": {}, "protocol": "clean"}
    return {"settings": settings, "rows_scored": 50, "model": part(0.8), "swapped": part(0.1), "black": part(0.2)}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a training run leaves, as far as cards look."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_run_record(RUN, folder)
    parts = {"text_config": {"model_type": "qwen2", "num_hidden_layers": 6}, "vision_config": {"model_type": "vit"}}
    (folder / "config.json").write_text(json.dumps({**parts, "connector_type": "qformer"}))
    (folder / "processor_config.json").write_text(json.dumps({"video_processor": {"fps": 2.0}}))
    save_file({"a": np.zeros((1000, 12), np.float16), "b": np.zeros(500, np.float16)}, folder / "model.safetensors")
    (folder / "loss_curves.png").write_bytes(b"loss")
    (folder / "timeline.png").write_bytes(b"timeline")
    return folder


# -- the cards of this repository -------------------------------------------------------------------------------------


def test_every_card_that_is_wanted_has_its_facts() -> None:
    kinds = {folder.name: json.loads((folder / "facts.json").read_text())["card"] for folder in FOLDERS}
    assert kinds == {"d2vlm-shapes": "model", "d2vlm-shapes-preference": "dataset", "d2vlm-phi3": "converted"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_cards_are_those_of_their_facts(folder: Path, tmp_path: Path) -> None:
    if missing := missing_files(folder):
        assert not (folder / "README.md").exists()
        pytest.skip(f"{folder.name} has no card yet: {', '.join(missing)} will come with the trained checkpoint")
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    info, _ = load_card(folder)
    for name in filter(None, (getattr(info, "loss_picture", None), getattr(info, "timeline_picture", None))):
        shutil.copy(folder / name, tmp_path)
    written = {path.relative_to(tmp_path) for path in render(tmp_path)}
    there = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".md", ".yaml")}
    assert written == there
    again = "python -m d2vlm_hf.hub.render_cards"
    for name in written:
        assert (folder / name).read_text() == (tmp_path / name).read_text(), f"{folder / name} is old: run `{again}`"
    text = (folder / "README.md").read_text()
    assert not re.search(r"\n{3}|More information needed|\bNone\b|\bnan\b|\]\(/|file://", text)


def test_the_converted_card_measures_nothing() -> None:
    card = ModelCard.load(CARDS / "d2vlm-phi3" / "README.md")
    assert (card.data.license, card.data.eval_results, card.data.base_model) == (
        "other",
        None,
        ["wenzhengzeng/D2VLM-Models"],
    )
    assert "## Figures as reported by the authors, not measured with this package" in card.text
    assert not (CARDS / "d2vlm-phi3" / ".eval_results").exists()


def test_the_preference_card_shows_the_rows_of_the_recipe() -> None:
    """Made again without the videos, of which rows do not depend; `d2vlm make-preferences` gives the same rows."""
    recipe = yaml.safe_load((REPO_ROOT / "recipes" / "shapes" / "preferences.yaml").read_text())
    config = ShapesConfig(**recipe["shapes"])
    rows = [
        row
        for index in config.indices
        for row in make_rows(config.scene(index), config.rows_per_video, config.task_weights)
    ]
    made = make_preferences(
        rows, **{name: recipe[name] for name in ("kinds", "per_row", "seed", "choices") if name in recipe}
    )
    counted = describe_rows(DatasetCardInfo.from_rows("", {"train": made}, license=""))
    kept = json.loads((CARDS / "d2vlm-shapes-preference" / "rows.json").read_text())
    assert json.loads(json.dumps(counted)) == kept, "the recipe has changed: take the data set that it makes"


@pytest.mark.parametrize("family", ["d2vlm", "etchat"])
def test_a_conversion_writes_its_card(tmp_path: Path, family: str) -> None:
    """With what it had to decide; the paper's figures stand beside D2VLM-Phi3 alone."""
    report = ConversionReport(family=family, text_model="phi3", notes=["<video> is token 7, </evi> 9"])
    report.source = str(tmp_path / "theirs")
    write_card(tmp_path, "d2vlm-phi3", report)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.base_model, card.data.eval_results) == ("other", None, None)
    assert "The weights of `theirs` in the format of `d2vlm_hf`" in card.text
    assert "- `<video>` is token 7, `</evi>` 9" in card.text
    assert "d2vlm convert theirs d2vlm-phi3" in card.text
    assert ("Figures as reported by the authors" in card.text) == (family == "d2vlm")
    assert str(tmp_path) not in card.text
    report.source = "owner/theirs"
    write_card(tmp_path, "d2vlm-phi3", report)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["owner/theirs"]


# -- from what runs have left -----------------------------------------------------------------------------------------


def test_from_runs_to_a_card_that_can_be_pushed(tmp_path: Path, run_folder: Path) -> None:
    """The way that the shipped checkpoint takes: its facts fetched, rendered, and put into its folder."""
    folder = tmp_path / "hub_cards" / "d2vlm-shapes"
    folder.mkdir(parents=True)
    (tmp_path / "LICENSE").write_text("Apache License")
    facts = json.loads((CARDS / "d2vlm-shapes" / "facts.json").read_text())
    runs = [run for run in facts["runs"] if run != "run-fpo.json"]  # one run stands for both
    (folder / "facts.json").write_text(json.dumps({**facts, "runs": runs}))
    wanted = ["run-sft.json", "results.json", "model.json", "example.json", "loss-sft.png", "timeline.png"]
    assert missing_files(folder) == wanted
    with pytest.raises(ValueError, match=r"lacks run-sft\.json, results\.json, .* names\. Fetch them with --take"):
        load_card(folder)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps(evaluation()))
    moment = {"start": 4.0, "end": 6.5, "score": 0.9}
    answer = {"answer": "It appears at 4.0s - 6.5s.", "evidence": [moment]}
    (tmp_path / "answer.json").write_text(json.dumps({"video": "/home/me/demo.mp4", "question": "When?", **answer}))
    sources = [str(run_folder), str(tmp_path / "evaluation"), str(tmp_path / "answer.json")]
    main([str(folder), "--take", *sources, "--into", str(run_folder)])
    assert missing_files(folder) == []
    assert "rows" not in json.loads((folder / "results.json").read_text())["model"]
    card = ModelCard.load(run_folder / "README.md")
    assert (folder / "README.md").read_text() == (run_folder / "README.md").read_text()
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ("mIoU (Temporal video grounding)", 80.0),
        ("R1@0.5 (Temporal video grounding)", 82.0),
        ("accuracy (Referred action recognition)", 40.0),
    ]
    for line in (
        "Data: Shapes, middle difficulty (test). Protocol: clean; greedy.",
        "| Temporal video grounding | mIoU | **80.0** | 75.0 to 85.0 | 10.0 | 20.0 |",
        "| Parameters | 0.01 M |",
        "| Language model | qwen2, 6 layers |",
        "| Sampling | 2 fps |",
        "| Wall time | 1 h 00 min |",
        "![Loss curves](loss-sft.png)",
        "![Frames, frame scores and the moments that were found](timeline.png)",
    ):
        assert line in card.text.splitlines(), line
    shown = json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1])
    assert shown == answer
    assert "/home/me" not in card.text
    kept = (run_folder / ".eval_results" / "org--d2vlm-shapes.yaml").read_text()
    first = parse_eval_result_entries(yaml.safe_load(kept))[0]
    assert (first.task_id, first.value) == ("temporal_video_grounding_miou", 80.0)
    clip = Path(bundled_clip())
    assert (run_folder / clip.name).read_bytes() == clip.read_bytes()
    assert clip.name in card.text
    assert (run_folder / "LICENSE").read_text() == "Apache License"
    assert {"loss-sft.png", "timeline.png"} <= {path.name for path in run_folder.iterdir()}


def test_facts_of_a_data_set_from_its_files(tmp_path: Path) -> None:
    say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    rows = [
        {
            "video": {"bytes": b"x", "path": None}, "task": "tvg", "question": "When?", "answer": f"At <evi> {number}.",
            "spans": spans, "prompt": say("When?"), "chosen": say("At <evi>."), "rejected": say(f"No {number}."),
            "chosen_spans": spans, "rejected_spans": [], "factor": "grounding", "perturbation": "shift", "edit": "e",
        }
        for number, spans in enumerate(([], [[1.0, 2.0]], [[3.0, 4.0]]))
    ]  # fmt: skip
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows), ("validation", rows[:1])):
        pa.parquet.write_table(pa.Table.from_pylist(part), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    folder = tmp_path / "card"
    assert [path.name for path in take(folder, tmp_path)] == ["rows.json"]
    facts = {"card": "dataset", "repo_id": "org/x", "license": "mit", "rows": "rows.json", "run": asdict(RUN)}
    (folder / "facts.json").write_text(json.dumps(facts))
    info, card = load_card(folder)
    assert (info.splits, info.kinds) == ({"train": 3, "validation": 1}, {("grounding", "shift"): 4})
    assert "rejected  No 1." in str(card)  # the first that has an event
    assert "| **grounding** | all | **4** |" in str(card)
    assert "d2vlm sft --config x.yaml" in str(card)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (None, r"facts\.json is missing: a card is rendered from what it says"),
        ("{", r"facts\.json is no JSON \(.*\). Correct it, or fetch it again."),
        ("[1]", r"facts\.json holds list where a JSON object with names and values is needed"),
        ('{"card": "poster"}', r"has card='poster'\. Use one of model, converted, dataset"),
        ('{"card": "model", "title": "x", "colour": 1}', r"has facts that no model card has: \['colour'\], and lacks"),
        ('{"card": "dataset", "run": {"seed": 1}}', r"is no record of a run: it has a stage, and of other facts only"),
        ('{"card": "model", "runs": [{"stage": "SFT", "speed": 1}]}', "is no record of a run"),
    ],
)
def test_facts_that_make_no_card(tmp_path: Path, facts: str | None, message: str) -> None:
    if facts is not None:
        (tmp_path / "facts.json").write_text(facts)
    with pytest.raises(ValueError, match=message):
        load_card(tmp_path)


def test_nothing_to_take_and_nothing_to_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"has nothing for a card: neither run_record\.json of a run, nor results"):
        take(tmp_path / "card", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there are 0 folders of cards: --take and --into need one"):
        main([])
    with pytest.raises(ValueError, match="there are 2 folders of cards"):
        main(["a", "b", "--into", "c"])


def test_all_cards_are_rendered_by_one_command(tmp_path: Path) -> None:
    """Those whose facts are complete; the others are named."""
    shutil.copytree(CARDS, tmp_path / "hub_cards", ignore=shutil.ignore_patterns("*.md", "*.yaml"))
    extra = tmp_path / "hub_cards" / "later"
    extra.mkdir()
    (extra / "facts.json").write_text('{"card": "model", "repo_id": "o/x", "license": "mit", "runs": ["gone.json"]}')
    command = [sys.executable, "-m", "d2vlm_hf.hub.render_cards"]
    env = {"PYTHONPATH": str(REPO_ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "hub_cards/later: not rendered, there is no gone.json yet" in done.stderr
    for name in ("d2vlm-phi3", "d2vlm-shapes-preference"):
        assert f"wrote hub_cards/{name}/README.md" in done.stderr
        assert (tmp_path / "hub_cards" / name / "README.md").read_text() == (CARDS / name / "README.md").read_text()


# -- measured numbers -------------------------------------------------------------------------------------------------


def test_results_of_an_evaluation() -> None:
    results = results_of_evaluation(evaluation(), "org/shapes", dataset_name="Shapes", split="test")
    assert [(r.task, r.metric) for r in results] == [
        SHAPES_FIGURES["tasks/tvg/IoU"],
        SHAPES_FIGURES["tasks/tvg/R1@0.5"],
        SHAPES_FIGURES["tasks/rar/accuracy"],
    ]
    first = results[0]
    assert (first.value, first.interval) == (pytest.approx(80.0), pytest.approx((75.0, 85.0)))
    assert first.blind == pytest.approx({"videos swapped": 10.0, "black frames": 20.0})
    assert (first.protocol, first.settings, first.split) == ("clean", "greedy", "test")
    named = results_of_evaluation(summarise(evaluation()), "shapes", figures={"failed": ("all", "failed rows")})
    assert [(r.metric, r.value, r.interval) for r in named] == [("failed rows", 2, None)]
    with pytest.raises(ValueError, match=r"the evaluation has no figure 'tasks/tvg/F1'\. Name paths .*tasks/tvg/IoU,"):
        results_of_evaluation(evaluation(), "shapes", figures={"tasks/tvg/F1": ("a", "b")})
    for nothing in ({}, {"model": {"rows": []}}, []):
        with pytest.raises(ValueError, match=r"these are no results of an evaluation: there is no model/metrics"):
            summarise(nothing)


def test_settings_in_words() -> None:
    assert describe_settings({"predictions": ["a.jsonl"]}) is None
    sampled = {"generate_kwargs": {"do_sample": True, "temperature": 0.7}, "fps": 2.0, "prompt": "official"}
    assert describe_settings(sampled) == "sampled at temperature 0.7, 2 fps, prompt official"
    assert describe_settings({"generate_kwargs": None, "fps": 0.5}) == "greedy, 0.5 fps"


def test_results_of_a_training_run() -> None:
    log = [
        {"loss": 1.0},
        {"eval_loss": 2.0, "eval_grounding/miou": 0.25},
        {"eval_generated/miou": 0.125, "eval_generated/f1": 0.5},
        {"eval_grounding/miou": 0.75},
    ]
    assert results_of_log(log, "rows") == [
        Result("Grounding", "mIoU, true answer given", 75.0, "rows", settings="last evaluation of the run"),
        Result("Grounding", "mIoU, answer generated", 12.5, "rows", settings="last evaluation of the run"),
        Result("Grounding", "F1, answer generated", 50.0, "rows", settings="last evaluation of the run"),
    ]
    assert results_of_log(log[:1], "rows") == []


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write_run_record(RUN, tmp_path)
    assert "git_commit" not in path.read_text()
    assert read_run_record(json.loads(path.read_text())) == RUN
