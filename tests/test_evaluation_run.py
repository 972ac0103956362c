# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The evaluation runner: predictions on disk, resumed and byte-identical; metrics, blind controls, comparison."""

import importlib.util
import json

import pytest
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny_runs import sft_rows, tiny
from transformers import pipeline

import d2vlm_hf
from d2vlm_hf.data.sources import load_rows
from d2vlm_hf.evaluation.prediction_files import PredictionFile, read_predictions
from d2vlm_hf.evaluation.run import (
    EvaluationArguments,
    RunningScore,
    evaluate,
    main,
    predict,
    run_evaluation,
    table,
)
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


def test_a_run_cut_anywhere_goes_on_and_gives_the_same_bytes(tmp_path, checkpoint, rows):
    """Also in the middle of a batch, whose rows are answered together again: rounding depends on the neighbours."""
    pipe = pipeline("video-grounding", model=checkpoint)
    whole = PredictionFile(tmp_path / "whole.jsonl", {"model": "m"})
    predict(pipe, rows, whole, batch_size=3, max_new_tokens=8)
    data = whole.path.read_bytes()
    lines = data.splitlines(keepends=True)
    assert len(lines) == 1 + len(rows)
    for kept in (0, 2, 5):  # whole lines that were written before the kill
        cut = tmp_path / f"cut-{kept}.jsonl"
        cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        resumed = PredictionFile(cut, {"model": "m"})
        assert list(resumed.read()) == [row["id"] for row in rows[: max(0, kept - 1)]]
        predict(pipe, rows, resumed, batch_size=3, max_new_tokens=8)
        assert cut.read_bytes() == data
    with pytest.raises(ValueError, match=r"made with other settings \(model differ\). Use another output folder"):
        PredictionFile(cut, {"model": "other"})


def test_the_running_score_is_the_mean_of_tasks(rows):
    running = RunningScore("shapes")
    assert running.add([], []) is None
    for row in rows:
        last = running.add([row], [perfect(row)])
    assert last == pytest.approx(evaluate("shapes", rows, [perfect(row) for row in rows])["metrics"]["mean"]["value"])


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


def test_the_whole_run_with_blind_controls(tmp_path, checkpoint, row_file, capsys):
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"dataset: {row_file}\nmodel: {checkpoint}\nblind: [swapped, black, constant]\nlimit: 8\nmax_new_tokens: 6\n"
        f"batch_size: 4\nexamples: 1\noutput_dir: {tmp_path / 'out'}\n"
    )
    main(["--config", str(config)])
    shown = capsys.readouterr()
    assert "| metric | model | swapped | black | constant |" in shown.out
    assert "score=" in shown.err  # the bar
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"settings", "model", "swapped", "black", "constant"} <= set(results)
    assert str(tmp_path) not in json.dumps(results["settings"])
    written = (tmp_path / "out" / "results.md").read_text()
    assert written.startswith(table(results) + "\n\n![headlines](figures/headlines.png)\n")
    assert {"recall.png", "iou.png", "headlines.png", "best-1.png", "worst-1.png"} == {
        path.name for path in (tmp_path / "out" / "figures").iterdir()
    }
    name, entries = model_index_to_eval_results(
        yaml.safe_load((tmp_path / "out" / "card.yaml").read_text())["model-index"]
    )
    assert name == results["settings"]["model"]
    assert entries[0].metric_value == pytest.approx(100 * results["model"]["metrics"]["tasks"]["tvg"]["IoU"]["value"])
    header = json.loads((tmp_path / "out" / "predictions-model-000.jsonl").read_text().splitlines()[0])["settings"]
    assert (header["fps"], header["batch_size"], header["dtype"], header["dataset"]) == (
        1.0,
        4,
        "float32",
        "rows.jsonl",
    )

    main(["--config", str(config), "--output_dir", str(tmp_path / "again")])
    for name in ("predictions-model-000.jsonl", "predictions-black-000.jsonl", "results.json", "figures/worst-1.png"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_folder_trained_further_is_not_taken_for_the_same_model(tmp_path, row_file):
    options = {"dataset": row_file, "model": str(tmp_path / "m"), "output_dir": str(tmp_path / "out"), "limit": 1}
    arguments = EvaluationArguments(**options, max_new_tokens=2, figures=False)
    for seed in (0, 1):
        save_checkpoint(tmp_path / "m", *tiny(seed))
        if seed == 0:
            run_evaluation(arguments)
            assert not (tmp_path / "out" / "figures").exists()
    with pytest.raises(ValueError, match=r"made with other settings \(weights differ\)"):
        run_evaluation(arguments)


def test_sampled_answers_do_not_depend_on_where_a_run_was_stopped(tmp_path, checkpoint, rows):
    pipe = pipeline("video-grounding", model=checkpoint)
    options = {"batch_size": 2, "max_new_tokens": 6, "generate_kwargs": {"do_sample": True}, "seed": 5}
    files = [PredictionFile(tmp_path / f"{n}.jsonl", {}) for n in range(2)]
    predict(pipe, rows[:6], files[0], **options)
    predict(pipe, rows[:2], files[1], **options)
    predict(pipe, rows[:6], files[1], **options)
    assert files[0].path.read_bytes() == files[1].path.read_bytes()


def test_without_matplotlib_there_are_results_and_no_figures(tmp_path, rows, row_file, monkeypatch, caplog):
    file = tmp_path / "theirs.jsonl"
    file.write_text("\n".join(json.dumps({"id": row["id"], **perfect(row)}) for row in rows))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "matplotlib" else find(name))
    run_evaluation(EvaluationArguments(dataset=row_file, predictions=[str(file)], output_dir=str(tmp_path / "out")))
    assert "No figures: matplotlib is not installed" in caplog.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "results.md", "card.yaml"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "films", "dataset": "x"}, "benchmark='films' is unknown"),
        (
            {"dataset": "x", "blind": ["grey"]},
            r"unknown controls \['grey'\]. Use 'swapped', 'black' and 'constant'.",
        ),
        ({"compare": ["a"]}, "names 1 files: two are compared. Give two."),
        ({}, "dataset=None, shapes=None: rows come from exactly one"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**options)


def test_rows_that_would_share_a_prediction(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    with pytest.raises(ValueError, match="stands for 2 rows, which would share one prediction"):
        run_evaluation(EvaluationArguments(dataset=str(file), model="m"))
    blind = EvaluationArguments(dataset=str(file), predictions=["p.jsonl"], blind=["black"], limit=2)
    with pytest.raises(ValueError, match="asks the model about other videos, but predictions="):
        run_evaluation(blind)


def test_a_published_file_whose_ids_repeat_from_task_to_task(tmp_path):
    sample = {"version": 1.0, "idx": 0, "source": "s", "video": "a.mp4", "duration": 9.0, "q": "When?", "tgt": [1, 2]}
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "etbench.json"
    file.write_text(json.dumps([{**sample, "task": "tvg"}, {**sample, "task": "epm"}]))
    answers = [{"id": f"{task}/s/0", "evidence": [{"start": 1, "end": 2}], "answer": "x"} for task in ("tvg", "epm")]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    results = run_evaluation(
        EvaluationArguments(
            benchmark="etbench",
            dataset=str(file.parent),
            predictions=[str(tmp_path / "answers.jsonl")],
            output_dir=str(tmp_path / "out"),
            figures=False,
        )
    )
    assert [row["score"] for row in results["model"]["rows"]] == [1.0, 1.0]


def test_one_split_of_a_saved_data_set(tmp_path, rows):
    part = Dataset.from_list([{"id": row["id"]} for row in rows])
    DatasetDict({"train": part, "test": part.select(range(2))}).save_to_disk(tmp_path / "both")
    assert len(load_rows(str(tmp_path / "both"), "test")) == 2
    part.save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one"))["id"] == [row["id"] for row in rows]
