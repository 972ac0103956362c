# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The ladder of `recipes/shapes/ladder`: every arm for a step or two on a tiny model, resumed, scored and reported."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import tiny

from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint


LADDER = Path(__file__).resolve().parent.parent / "recipes" / "shapes" / "ladder"
sys.path.insert(0, str(LADDER))

import ladder_report  # noqa: E402
import ladder_scores  # noqa: E402
import run as ladder  # noqa: E402
from ladder_arms import ARMS  # noqa: E402
from ladder_videos import PatchStore  # noqa: E402


def test_every_arm_runs_and_a_second_call_only_reports(tmp_path):
    model, processor = tiny()
    save_checkpoint(tmp_path / "stage0", model, processor)
    readme = tmp_path / "README.md"
    readme.write_text((LADDER / "README.md").read_text())
    recipe = yaml.safe_load((LADDER / "ladder.yaml").read_text())
    recipe |= {
        "stage0": str(tmp_path / "stage0"), "output_dir": str(tmp_path / "out"), "readme": str(readme), "seeds": [0],
        "difficulty": "easy", "fps": 1.0, "train_videos": 3, "train_rows": 2, "preference_videos": 3,
        "preferences_per_row": 1, "test_videos": 2, "test_rows": 3, "steps": 2, "videos_per_step": 1, "save_steps": 0,
        "further_steps": 2, "pairs_per_step": 2, "max_new_tokens": 6,
    }  # fmt: skip
    config = tmp_path / "ladder.yaml"
    config.write_text(yaml.safe_dump(recipe))
    ladder.main(["--config", str(config)])
    text = readme.read_text()
    assert "not measured yet" not in text
    assert all(f"| {arm.title} |" in text for arm in ARMS.values())
    assert "| consistency | fpo |" in text
    assert text.count(ladder_report.BEGIN) == text.count(ladder_report.END) == 1
    assert (tmp_path / "ladder.png").stat().st_size > 0

    weights = {name: load_file(tmp_path / "out" / f"{name}-0" / "model" / "model.safetensors") for name in ARMS}
    start = load_file(tmp_path / "stage0" / "model.safetensors")
    for name, own in weights.items():
        assert all(torch.equal(own[key], start[key]) for key in start if "vision_tower" in key), name
        assert not torch.equal(own["frame_head.1.weight"], start["frame_head.1.weight"]), name
    for first, second in combinations(ARMS, 2):
        assert any(not torch.equal(weights[first][key], weights[second][key]) for key in start), (first, second)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ladder.main(["--config", str(config), "--arms", "fpo"])
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.name for path in after if before.get(path) != after[path]} <= {"settings.json"}
    assert readme.read_text() == text  # the arms that are done stay in the report
    with pytest.raises(ValueError, match="holds features of other settings"):
        PatchStore(tmp_path / "out" / "patches-train", {"fps": 3.0})


def test_an_arm_that_is_unknown_is_an_error():
    with pytest.raises(ValueError, match=r"arms has unknown names \['sft'\]"):
        ladder.LadderArguments(stage0="x", arms=["sft"])


def test_answers_come_in_one_form():
    span, other = {"start": 1.0, "end": 2.0, "score": 0.5}, {"start": 4.0, "end": 6.0, "score": 0.4}
    coupled = {"answer": "It jumps at 1.0s - 2.0s.", "evidence": [], "references": [{**span, "evidence": None}] * 2}
    assert ladder_scores.in_one_form(coupled, "answer", "tvg")["evidence"] == [span]
    told = {"answer": "First, the red circle jumps. Finally, the blue square waits.", "evidence": [span, other]}
    told["references"] = []
    captions = ladder_scores.in_one_form(told, "grounding", "dvc")["captions"]
    assert captions == ["First, the red circle jumps.", "Finally, the blue square waits."]
    told["answer"] = "The red circle jumps, then the blue square waits, then a star turns."
    captions = ladder_scores.in_one_form(told, "grounding", "dvc")["captions"]
    assert captions == ["The red circle jumps", "the blue square waits"]
    assert "captions" not in ladder_scores.in_one_form(told, "both", "dvc")


def test_the_report_pairs_rows_and_spreads_seeds():
    def scores(value):
        return [{"id": f"r{i}", "video": f"v{i // 2}", "accuracy": value + 0.1 * (i % 2)} for i in range(8)]

    runs = {"consistency": {0: scores(0.2), 1: scores(0.4)}, "fpo": {0: scores(0.5), 1: scores(0.5)}}
    entry = ladder_report.summary(runs)["consistency"]["accuracy"]
    assert entry["value"] == pytest.approx(0.35)
    assert entry["seeds"] == pytest.approx([0.25, 0.45])
    assert entry["spread"] == pytest.approx(0.2 / 2**0.5)
    (line,) = ladder_report.differences(runs)
    assert (line["before"], line["after"]) == ("consistency", "fpo")
    assert line["accuracy"]["difference"] == pytest.approx(0.2)
    assert line["accuracy"]["low"] <= 0.2 + 1e-9
    assert "+0.200" in ladder_report.tables(runs, {"fpo": 1.25})
