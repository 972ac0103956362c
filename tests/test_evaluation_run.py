# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation runner: predictions on disk, resumed and byte-identical; metrics, blind controls, comparison."""

import json
import logging

import pytest
from datasets import Dataset, DatasetDict
from tiny_runs import sft_rows, tiny
from transformers import pipeline

import d2vlm_hf
from d2vlm_hf.data.sources import load_rows
from d2vlm_hf.evaluation.prediction_files import PredictionFile, read_predictions
from d2vlm_hf.evaluation.run import EvaluationArguments, compare, evaluate, main, predict, run_evaluation, table
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, *tiny())
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sft_rows(tmp_path_factory.mktemp("videos"), videos=2)


@pytest.fixture(scope="module")
def row_file(tmp_path_factory, rows) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def perfect(row) -> dict:
    evidence = [{"start": s, "end": e, "score": 0.9} for s, e in row["spans"]]
    return {"answer": row["answer"].replace("<evi>", ""), "evidence": evidence, "references": []}


def test_perfect_answers_score_1_and_empty_ones_0(rows):
    asked = [row for row in rows if row["task"] in ("tvg", "tal") and row["spans"]]
    right = evaluate("shapes", asked, [perfect(row) for row in asked])
    wrong = evaluate("shapes", asked, [{"answer": "", "evidence": [], "references": []} for _ in asked])
    assert [row["score"] for row in right["rows"]] == [1.0] * len(asked)
    assert [row["score"] for row in wrong["rows"]] == [0.0] * len(asked)
    assert d2vlm_hf.evaluate is evaluate
    with pytest.raises(ValueError, match="benchmark='videos' is unknown"):
        evaluate("videos", asked, [])


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, checkpoint, rows):
    pipe = pipeline("video-grounding", model=checkpoint)
    whole = PredictionFile(tmp_path / "whole.jsonl", {"model": "m"})
    predict(pipe, rows, whole, batch_size=2, max_new_tokens=8)
    cut = tmp_path / "cut.jsonl"
    lines = whole.path.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while writing the fourth line
    resumed = PredictionFile(cut, {"model": "m"})
    assert list(resumed.read()) == [row["id"] for row in rows[:2]]
    predict(pipe, rows, resumed, batch_size=2, max_new_tokens=8)
    assert cut.read_bytes() == whole.path.read_bytes()
    with pytest.raises(ValueError, match=r"made with other settings \(model differ\). Use another output folder"):
        PredictionFile(cut, {"model": "other"})


def test_predictions_of_another_system(tmp_path, rows, row_file):
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(json.dumps({"id": row["id"], **perfect(row)}) for row in rows))
    arguments = EvaluationArguments(dataset=row_file, predictions=[str(file)], output_dir=str(tmp_path / "out"))
    results = run_evaluation(arguments)
    assert results["rows_scored"] == len(rows)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["predictions"] == ["theirs.jsonl"]
    with pytest.raises(ValueError, match="does not exist: it should hold predictions"):
        read_predictions([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").write_text('{"settings": {}}\n')
    with pytest.raises(ValueError, match=r'holds no predictions: each line should be an object with an "id"'):
        read_predictions([tmp_path / "empty.jsonl"])


def test_the_whole_run_with_blind_controls(tmp_path, checkpoint, row_file, caplog):
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"dataset: {row_file}\nmodel: {checkpoint}\nblind: [swapped, black]\nlimit: 8\nmax_new_tokens: 6\n"
        f"batch_size: 4\noutput_dir: {tmp_path / 'out'}\n"
    )
    with caplog.at_level(logging.WARNING):
        main(["--config", str(config)])
    assert "| metric | model | swapped | black |" in caplog.text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"settings", "model", "swapped", "black"} <= set(results)
    assert str(tmp_path) not in json.dumps(results["settings"])
    assert (tmp_path / "out" / "results.md").read_text() == table(results) + "\n"
    first = (tmp_path / "out" / "predictions-model-000.jsonl").read_bytes()
    main(["--config", str(config), "--output_dir", str(tmp_path / "again")])
    assert (tmp_path / "again" / "predictions-model-000.jsonl").read_bytes() == first


def test_a_paired_comparison(tmp_path, caplog):
    files = []
    for name, better in (("a", 0.0), ("b", 0.25)):
        rows = [{"id": str(i), "task": "tvg", "score": 0.5 + better * (i % 2)} for i in range(40)]
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"model": {"rows": rows}}))
        files.append(str(file))
    text = compare(*files)
    assert "| tvg | 40 | 0.500 | 0.625 | +0.125 |" in text
    assert text.splitlines()[2].endswith("| 20 | 0 | 20 |")
    with caplog.at_level(logging.WARNING):
        main(["--compare", *files])
    assert "+0.125" in caplog.text
    other = tmp_path / "c.json"
    other.write_text(json.dumps({"model": {"rows": [{"id": "x", "score": 1.0}]}}))
    with pytest.raises(ValueError, match="share 0 of 40 and 1 scored rows"):
        compare(files[0], str(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "films", "dataset": "x"}, "benchmark='films' is unknown"),
        ({"dataset": "x", "blind": ["grey"]}, r"has unknown controls \['grey'\]. Use 'swapped' and 'black'."),
        ({"compare": ["a"]}, "names 1 files: two are compared. Give two."),
        ({}, "dataset=None, shapes=None: rows come from exactly one"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**options)


def test_one_split_of_a_saved_data_set(tmp_path, rows):
    part = Dataset.from_list([{"id": row["id"]} for row in rows])
    DatasetDict({"train": part, "test": part.select(range(2))}).save_to_disk(tmp_path / "both")
    assert len(load_rows(str(tmp_path / "both"), "test")) == 2
    part.save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one"))["id"] == [row["id"] for row in rows]
