# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Annotation files in the published formats (look-alikes of our own making) and the prompts."""

import json

import pytest

from d2vlm_hf.data.schema import validate_row
from d2vlm_hf.evaluation import dense_captioning, etbench, moment_retrieval, multiple_choice
from d2vlm_hf.evaluation.benchmarks import BENCHMARKS, PROMPTS, etbench_row, load_annotations


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


CAPTIONS = {
    "v_one": {"duration": 30.5, "timestamps": [[0, 4.5], [6, 20]], "sentences": ["A man sits.", " He stands {up}."]},
    "v_two": {"duration": 9.0, "timestamps": [[8, 2]], "sentences": ["Rain falls."]},
}
ETBENCH = {"version": 1.0, "idx": 7, "source": "s", "video": "s/a.mp4", "duration": 60.0}
FILES = {
    "charades_sta": ("t.txt", "AB12 1.5 9.0##person opens a door.\nCD34 8.0 7.0##a dog's tail wags.\n\n"),
    "qvhighlights": (
        "t.jsonl",
        json.dumps(
            {
                "qid": 5,
                "query": "A cat naps.",
                "duration": 150,
                "vid": "xyz_0.0_150.0",
                "relevant_windows": [[10, 20]],
                "relevant_clip_ids": [5, 6],
                "saliency_scores": [[1, 2, 3], [4, 4, 4]],
            }
        )
        + "\n",
    ),
    "tacos": (
        "t.json",
        {
            "s1-d2.avi": {
                "timestamps": [[50, 100], [100, 350]],
                "sentences": ["He peels a carrot", "He eats."],
                "fps": 25.0,
                "num_frames": 500,
            }
        },
    ),
    "youcook2": ("t.json", CAPTIONS),
    "activitynet_captions": ("t.json", CAPTIONS),
    "mvbench": (
        "action_order.json",
        [{"video": "m.mp4", "question": "What {first}?", "candidates": ["A cat.", "A dog"], "answer": "A dog"}],
    ),
    "video_mme": (
        "t.json",
        [
            {
                "videoID": "vid",
                "question_id": "001-1",
                "duration": "short",
                "question": "Who?",
                "options": ["A. Anna.", "B. Ben.", "C. Cleo.", "D. Dan."],
                "answer": "C",
            }
        ],
    ),
    "etbench": ("t.json", [ETBENCH | {"task": "tvg", "tgt": [3.0, 9.0], "q": "When is it?"}]),
}


@pytest.fixture
def load(tmp_path):
    return lambda benchmark, **options: load_annotations(benchmark, written(tmp_path, *FILES[benchmark]), **options)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_rows_follow_the_schema(load, benchmark):
    rows = load(benchmark)
    assert rows
    for index, row in enumerate(rows):
        columns = {**row, "answer": "x", "duration": row["duration"] or 200.0, "spans": [], "captions": []}
        validate_row(columns, index)
        assert row["question"]
        assert row["source"].split("/")[0] in (benchmark, "s")


def test_charades_sta(load):
    first, second = load("charades_sta")
    assert first["question"] == (
        "You are given a video about indoor activities. Watch the video carefully and find a visual event described by "
        "the sentence: 'person opens a door'. The format of your response should be: 'The event happens in <start "
        "time> - <end time>'."
    )
    assert (first["id"], first["video"], first["task"], first["spans"]) == ("0", "AB12.mp4", "tvg", [[1.5, 9.0]])
    assert (second["spans"], second["published_spans"]) == ([[7.0, 8.0]], [[8.0, 7.0]])
    assert "published_spans" not in first
    summary, _ = moment_retrieval.score([first, second], ["1 - 2 </evi>1.5 - 9.0"] * 2, "d2vlm")
    assert summary["R1@0.7"] == 0.5


def test_qvhighlights(load):
    (row,) = load("qvhighlights")
    assert (row["id"], row["video"], row["duration"]) == ("5", "xyz_0.0_150.0.mp4", 150.0)
    assert "described by the sentence: 'A cat naps'." in row["question"]
    given = [{"qid": 5, "pred_relevant_windows": [[10, 20, 0.9]], "pred_saliency_scores": [0.0] * 6 + [1.0]}]
    summary, _ = moment_retrieval.score([row], given, benchmark="qvhighlights")
    assert summary["brief"]["MR-full-mAP"] == summary["brief"]["HL-min-VeryGood-Hit1"] == 100.0


def test_tacos_counts_frames(load):
    rows = load("tacos")
    assert [row["spans"] for row in rows] == [[[2.0, 4.0]], [[4.0, 14.0]]]
    assert (rows[0]["duration"], rows[0]["video"]) == (20.0, "s1-d2.avi")


def test_dense_captions(load, tmp_path):
    first, second = load("youcook2")
    assert (first["captions"], first["spans"]) == (["A man sits.", "He stands {up}."], [[0.0, 4.5], [6.0, 20.0]])
    assert second["published_spans"] == [[8.0, 2.0]]
    other = {"v_two": {"duration": 9.0, "timestamps": [[1, 2]], "sentences": ["It rains."]}}
    paths = [written(tmp_path, "1.json", CAPTIONS), written(tmp_path, "2.json", other)]
    rows = load_annotations("activitynet_captions", paths)
    assert [row["id"] for row in rows] == ["v_one", "v_two"]
    assert "annotation_captions" not in rows[0]
    assert rows[1]["annotation_captions"] == [["Rain falls."], ["It rains."]]
    assert rows[1]["annotations"] == [[[2.0, 8.0]], [[1.0, 2.0]]]
    summary, _ = dense_captioning.score(rows, [None, None], "d2vlm", "activitynet_captions", captions=False)
    assert summary["F1"] == 0.0


def test_the_papers_youcook2_prompt_is_an_option(load):
    paper, default = load("youcook2", prompt="paper")[0]["question"], load("youcook2")[0]["question"]
    assert paper == (
        "You are given a video about 'making fattoush'. Watch the video carefully and densly describe all the cooking "
        "steps. For each step, you need to determine the start and ends times and provide a concise description. The "
        "format of your response should be: '<start time> - <end time>, <description>'."
    )
    assert "fattoush" not in default
    assert set(PROMPTS["youcook2"]) == {"default", "paper"}


def test_mvbench(load):
    (row,) = load("mvbench")
    assert row["question"].startswith(
        "Carefully watch the video and pay attention to the cause and sequence of events,"
    )
    assert row["question"].endswith("question.\nQuestion: What {first}?\nOptions:\n(A) A cat.\n(B) A dog.")
    assert (row["source"], row["correct_option"]) == ("mvbench/action_order", 1)
    assert multiple_choice.score([row], ["(B) A dog."], "d2vlm")[0]["Acc"] == 1.0


def test_video_mme(load, tmp_path):
    (row,) = load("video_mme")
    assert row["question"] == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWho?\nA. Anna.\nB. Ben.\nC. Cleo.\nD. Dan.\nThe best answer is:"
    )
    assert (row["id"], row["options"][2], row["correct_option"]) == ("001-1", "Cleo.", 2)
    assert (row["video"], row["source"]) == ("vid.mp4", "video_mme/short")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(FILES["video_mme"][1]).to_parquet(str(tmp_path / "t.parquet"))
    assert load_annotations("video_mme", str(tmp_path / "t.parquet")) == [row]


def test_etbench_rows():
    highlight = etbench_row(ETBENCH | {"task": "vhd", "q": "?", "tgt": [[[0, 4]], [[7, 9], [11, 12]]]})
    assert (highlight["spans"], highlight["annotations"]) == ([[0.0, 4.0]], [[[0, 4]], [[7, 9], [11, 12]]])
    choice = etbench_row(ETBENCH | {"task": "rvq", "q": "?", "o": [[3.0, 8.0], "no"], "p": 0})
    assert (choice["options"], choice["correct_option"], choice["id"]) == (["3.0 - 8.0", "no"], 0, "7")
    dense = etbench_row(ETBENCH | {"task": "dvc", "q": "?", "tgt": [[3, 8]], "g": ["he eats"]})
    assert (dense["spans"], dense["captions"]) == ([[3.0, 8.0]], ["he eats"])


def test_given_moments_of_etbench():
    asked = {"task": "rar", "q": "What at <vid>, and in <vid> - <vid>?", "src": [10.0, [3.0, 9.0]], "o": ["a"], "p": 0}
    row = etbench_row(ETBENCH | asked)
    assert row["question"] == "What at <evi>, and in <evi>?"
    assert row["question_spans"] == [[10.0, 10.0], [3.0, 9.0]]
    assert etbench_row(ETBENCH | asked | {"src": []})["question"] == asked["q"]


def test_etbench_is_scored_from_its_file(load):
    summary, _ = etbench.score(load("etbench"), {"7": "3 - 9 </evi>3 - 9"}, "d2vlm")
    assert summary["overall"] == {"TVG": 1.0}


def test_reversed_spans_are_reported(load, caplog):
    load("charades_sta")
    assert "1 of 2 rows of charades_sta have a span that ends before it starts" in caplog.text


def test_bad_input(load, tmp_path):
    with pytest.raises(ValueError, match="benchmark is 'didemo', which is not known; use one of"):
        load_annotations("didemo", "x.json")
    with pytest.raises(ValueError, match="prompt is 'short', which youcook2 does not have; use one of"):
        load("youcook2", prompt="short")
    with pytest.raises(ValueError, match="where no file is; give the annotation file of tacos"):
        load_annotations("tacos", tmp_path / "missing.json")
    with pytest.raises(ValueError, match="which is no Charades-STA line"):
        load_annotations("charades_sta", written(tmp_path, "c.txt", "AB12 1.5 door"))
    for benchmark, content in (("youcook2", "[1]"), ("tacos", "{"), ("mvbench", '[{"video": "v"}]')):
        with pytest.raises(ValueError, match="is not in the published format of"):
            load_annotations(benchmark, written(tmp_path, "x.json", content))
