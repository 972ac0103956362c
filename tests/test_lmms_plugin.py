# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The plug-in for lmms-eval. What needs the harness itself runs with `make test-lmms`, where it is installed."""

import importlib.util
import json
from configparser import ConfigParser
from pathlib import Path

import pytest
from tiny_runs import sft_rows, tiny

from d2vlm_hf.evaluation.shapes_benchmark import score
from d2vlm_hf.lmms_plugin.answers import (
    mean_of_tasks,
    process_results,
    question_text,
    read_answer,
    target_text,
    video_path,
    write_answer,
)
from d2vlm_hf.lmms_plugin.task import write_task
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: make test-lmms installs it"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows and videos as `d2vlm shapes` lays them out, and a checkpoint."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = sft_rows(folder, videos=2)
    rows = [{**row, "video": row["video"].rpartition("/")[2]} for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    save_checkpoint(folder / "checkpoint", *tiny())
    return folder


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "evidence", "references"),
    [
        ("1.0 - 2.5 4 - 5</evi>It moves at 1.0s - 2.5s.", [(1.0, 2.5), (4.0, 5.0)], [(1.0, 2.5)]),
        ("From 3 to 7.25 seconds.", [(3.0, 7.25)], [(3.0, 7.25)]),
        ("between 9 s – 2 s", [(2.0, 9.0)], [(2.0, 9.0)]),
        ("(A) red", [], []),
        ("</evi>Nothing moves.", [], []),
    ],
)
def test_any_model_s_text_is_read_into_spans(text, evidence, references):
    found = read_answer(text)
    assert [(span["start"], span["end"]) for span in found["evidence"]] == evidence
    assert [(span["start"], span["end"]) for span in found["references"]] == references
    for span in found["references"]:
        assert found["answer"][span["char_start"]].isdigit()


def test_a_right_answer_in_text_scores_as_the_result_it_was_written_from(folder):
    for row in rows_of(folder):
        spans = [{"start": start, "end": end, "score": 0.9} for start, end in row["spans"]]
        parts, answer, references = row["answer"].split("<evi>"), "", []
        for n, part in enumerate(parts):
            answer += part
            if n < len(parts) - 1:
                place = {"char_start": len(answer), "char_end": len(answer) + 4}
                references.append({**spans[n], **place, "evidence": n})
                answer += "0 - 0"[:4]
        result = {"answer": answer, "evidence": spans, "references": references}
        _, (expected,) = score([row], [result])
        scored = process_results(row, [write_answer(result, evidence=True)])
        assert scored[f"shapes_{row['task']}"] == pytest.approx(expected["score"], abs=0.02)  # times of 2 decimals
        assert scored["shapes_mean"]["task"] == row["task"]
    assert write_answer(result, evidence=False) == answer


def test_questions_and_targets_in_text():
    row = {"question": "What happens in <evi>?", "question_spans": [[1.0, 2.5]], "video": "a.mp4", "spans": [[3, 4]],
           "answer": "It falls at <evi>."}  # fmt: skip
    assert question_text(row) == "What happens in 1.0s - 2.5s?"
    assert question_text(row, {"post_prompt": " Answer."}) == "What happens in 1.0s - 2.5s? Answer."
    assert target_text(row) == "It falls at 3.0s - 4.0s."
    assert video_path(row, {"root": "/videos"}) == ["/videos/a.mp4"]
    scores = [("tvg", 1.0), ("tvg", 0.0), ("rar", 1.0)]
    assert mean_of_tasks([{"task": task, "score": score} for task, score in scores]) == 0.75


def test_the_task_names_the_rows_and_the_functions(folder, tmp_path):
    text = write_task(folder).read_text()
    assert f'data_files: {{test: "{folder / "rows.jsonl"}"}}' in text
    assert "process_results: !function d2vlm_hf.lmms_plugin.answers.process_results" in text
    with pytest.raises(ValueError, match=r"has no rows.jsonl, so there is no task to make"):
        write_task(tmp_path)


def test_the_model_is_announced_to_the_harness():
    package = ConfigParser()
    package.read(Path(__file__).parent.parent / "setup.cfg")
    announced = package["options.entry_points"]["lmms_eval.models"].split("=", 1)[1].strip()
    module, name = announced.split(":")
    assert callable(getattr(importlib.import_module(module), name))


# ---- with the harness ------------------------------------------------------------------------------------------------


@needs_harness
def test_the_harness_runs_the_model_on_shapes(folder):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from d2vlm_hf.commands.ground import load_pipeline

    write_task(folder, max_new_tokens=8)
    results = simple_evaluate(
        model="d2vlm",
        model_args=f"pretrained={folder / 'checkpoint'},evidence=true",
        tasks=["d2vlm_shapes"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False, model_name="d2vlm"),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    pipe = load_pipeline(str(folder / "checkpoint"), "cpu")
    items = []
    for row in rows_of(folder):
        asked = {key: row[key] for key in ("question", "question_spans")}
        (answer,) = pipe([{"video": str(folder / row["video"]), **asked}], max_new_tokens=8)
        items.append(process_results(row, [write_answer(answer, evidence=True)])["shapes_mean"])
    assert results["results"]["d2vlm_shapes"]["shapes_mean,none"] == pytest.approx(mean_of_tasks(items), abs=1e-6)


@needs_harness
def test_what_the_model_does_not_offer_to_the_harness(folder):
    from lmms_eval.models import get_model

    model = get_model("d2vlm")(pretrained=str(folder / "checkpoint"), device="cpu")
    with pytest.raises(NotImplementedError, match="d2vlm answers in text, and the likelihood of a given answer"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="d2vlm answers one question at a time"):
        model.generate_until_multi_round([])
    model.task_dict = {"pictures": {"test": [{}]}}
    with pytest.raises(ValueError, match="at a time, but this model answers about one video file"):
        model._input("?", {}, lambda doc: [1, 2], 0, "pictures", "test")


@needs_harness
def test_options_of_the_harness():
    from d2vlm_hf.lmms_plugin.wrapper import _batches, _decoding, _until

    greedy = {"max_new_tokens": 256, "generate_kwargs": {}}
    assert _decoding({"temperature": 0, "do_sample": False, "top_p": 1.0, "num_beams": 1}) == greedy
    assert _decoding({"max_new_tokens": 9, "temperature": 0.2, "top_p": 0.9}) == {
        "max_new_tokens": 9,
        "generate_kwargs": {"do_sample": True, "temperature": 0.2, "top_p": 0.9},
    }
    assert _until("yes\n\nno", {"until": ["\n\n"]}) == "yes"
    requests = [("a", {"n": 1}), ("b", {"n": 1}), ("c", {"n": 1}), ("d", {"n": 2})]
    assert [[name for name, _ in batch] for batch, _ in _batches(requests, 2)] == [["a", "b"], ["c"], ["d"]]
