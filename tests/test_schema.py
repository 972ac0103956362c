# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The row schema: its types in `datasets`, its defaults, and a message for every fault a row can have."""

import math
import re
import subprocess
import sys

import datasets
import pytest

from d2vlm_hf.data.schema import (
    COLUMNS,
    PERTURBATIONS,
    PREFERENCE_COLUMNS,
    TASKS,
    features,
    make_row,
    validate_row,
    validate_rows,
)


def grounding_row(**changes):
    row = make_row(
        id="a",
        video="a.mp4",
        duration=10.0,
        task="tal",
        source="test",
        question="When does the door open?",
        answer="It opens at <evi> and <evi>.",
        spans=[(1, 2.5), (6, 8)],
        options=["yes", "no"],
        correct_option=1,
        captions=["it opens", "it opens again"],
    )
    return {**row, **changes}


def preference_row(**changes):
    row = make_row(
        preference=True,
        **{**grounding_row(), "captions": []},
        prompt=[{"role": "user", "content": "When does the door open?"}],
        chosen=[{"role": "assistant", "content": "At <evi>."}],
        rejected=[{"role": "assistant", "content": "At <evi>."}],
        chosen_spans=[[1.0, 2.5]],
        rejected_spans=[[3.0, 4.5]],
        factor="grounding",
        perturbation="shift",
        edit="span 0 by 2.0 s",
        seed=3,
    )
    return {**row, **changes}


def test_the_columns_are_those_of_the_documented_schema():
    assert list(features()) == [
        *("id", "video", "duration", "task", "source", "question", "question_spans", "answer", "spans"),
        *("options", "correct_option", "captions", "annotations"),
    ]
    extra = ["prompt", "chosen", "rejected", "chosen_spans", "rejected_spans", "factor", "perturbation", "edit", "seed"]
    assert list(features(preference=True)) == [*features(), *extra]
    assert isinstance(features()["video"], datasets.Video)
    assert features()["spans"] == datasets.List(datasets.List(datasets.Value("float64")))
    assert {"tvg", "tal", "dvc", "gvq", "rar"} < set(TASKS)
    assert PERTURBATIONS == {"grounding": ("shift", "add", "drop", "merge"), "text": ("tamper", "repeat")}


def test_rows_go_through_datasets_unchanged(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"bytes of a video")
    absent = {"spans": [], "answer": "It stays shut.", "captions": [], "annotations": [[[0, 1]]]}
    rows = [grounding_row(video=str(file)), grounding_row(id="b", video=str(file), **absent)]
    data = datasets.Dataset.from_list(rows, features=features()).cast_column("video", datasets.Video(decode=False))
    assert [{**row, "video": row["video"]["path"]} for row in data] == rows
    data.save_to_disk(str(tmp_path / "saved"))
    again = datasets.load_from_disk(str(tmp_path / "saved"))
    assert again.features == data.features
    for row in again:
        validate_row(row)
        assert row["video"]["bytes"] == b"bytes of a video"
    preferences = datasets.Dataset.from_list([preference_row()], features=features(preference=True))
    assert preferences.cast_column("video", datasets.Video(decode=False))[0]["chosen"] == preference_row()["chosen"]


def test_importing_the_schema_does_not_import_datasets():
    code = "import sys, d2vlm_hf.data.schema, d2vlm_hf.data.shapes; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_make_row_fills_in_every_column():
    row = make_row(id="a", spans=[(0, 1)])
    assert list(row) == list(COLUMNS)
    assert row["spans"] == [[0.0, 1.0]]
    assert (row["correct_option"], row["options"]) == (-1, [])
    assert make_row()["options"] is not make_row()["options"]
    assert list(make_row(preference=True)) == [*COLUMNS, *PREFERENCE_COLUMNS]
    with pytest.raises(ValueError, match=r"Unknown columns \['colour'\]: a row has only the columns of the schema"):
        make_row(colour="red")
    with pytest.raises(ValueError, match="preference=True"):
        make_row(chosen=[])


def test_good_rows_are_valid(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(b"0")
    for row in (
        grounding_row(),
        grounding_row(answer="The door stays shut.", spans=[], captions=[]),
        grounding_row(question="What opens at <evi>?", question_spans=[[1, 2]]),
        grounding_row(spans=[[1, 1], [6, 10.04]]),
        grounding_row(video={"bytes": b"0", "path": None}),
        grounding_row(video={"bytes": None, "path": "a.mp4"}),
        grounding_row(correct_option=-1, options=[], task="my_task"),
        preference_row(),
        preference_row(
            factor="text",
            perturbation="tamper",
            rejected_spans=[[1.0, 2.5]],
            rejected=[{"role": "assistant", "content": "Never, but <evi>."}],
        ),
    ):
        validate_row(row)
    validate_row(grounding_row(video=str(file)), check_file=True)
    validate_row(grounding_row(video="https://example.org/a.mp4"), check_file=True)
    assert validate_rows([grounding_row(), grounding_row(id="b")]) == []


FAULTS = [
    ("video", {"video": ""}, "is empty. Give the path"),
    ("video", {"video": None}, "is empty. Give the path"),
    ("video", {"video": {"bytes": None, "path": None}}, "has neither a path nor bytes"),
    ("duration", {"duration": 0}, "finite number of seconds above 0"),
    ("duration", {"duration": math.nan}, "finite number of seconds above 0"),
    ("duration", {"duration": "10"}, "finite number of seconds above 0"),
    ("id", {"id": " "}, "is empty. Every row needs one"),
    ("id", {"id": 3}, "must be a string, not int"),
    ("task", {"task": ""}, "is empty. Every row needs one"),
    ("question", {"question": ""}, "is empty. Every row needs one"),
    ("answer", {"answer": "\n"}, "is empty. Every row needs one"),
    ("question", {"question": "<video> When?"}, "holds '<video>', which only the processor may write"),
    ("answer", {"answer": "<evi><evi></evi> twice"}, "holds '</evi>', which only the processor may write"),
    ("spans", {"spans": [[1, 2]]}, "there are 1 spans and 2 '<evi>' in 'answer'"),
    ("spans", {"answer": "It opens."}, "there are 2 spans and 0 '<evi>' in 'answer'"),
    ("question_spans", {"question": "What is at <evi>?"}, "there are 0 spans and 1 '<evi>' in 'question'"),
    ("question_spans", {"question_spans": [[1, 2]]}, "there are 1 spans and 0 '<evi>' in 'question'"),
    ("spans", {"spans": [[2.5, 1], [6, 8]]}, "span 0 [2.5, 1] ends before it starts"),
    ("spans", {"spans": [[1, 2], [-1, 8]]}, "span 1 [-1, 8] starts before the video"),
    ("spans", {"spans": [[1, 2], [6, 10.5]]}, "ends after the video (10.0 s)"),
    ("spans", {"spans": [[math.nan, 2], [6, 8]]}, "is not finite"),
    ("spans", {"spans": [[1, math.inf], [6, 8]]}, "is not finite"),
    ("spans", {"spans": [1, 2]}, "must be a list of [start, end] in seconds"),
    ("spans", {"spans": [[1, 2, 3], [6, 8]]}, "must be a list of [start, end] in seconds"),
    ("spans", {"spans": [["1", "2"], [6, 8]]}, "must be a list of [start, end] in seconds"),
    ("spans", {"spans": None}, "must be a list of [start, end] in seconds"),
    ("annotations", {"annotations": [[1, 2]]}, "one list per annotator"),
    ("annotations", {"annotations": [[[3, 2]]]}, "span 0 [3, 2] ends before it starts"),
    ("options", {"options": "yes no"}, "must be a list of strings"),
    ("options", {"options": ["yes", "yes"]}, "holds the same option twice"),
    ("correct_option", {"correct_option": 2}, "is not among the 2 options"),
    ("correct_option", {"correct_option": -2}, "is not among the 2 options"),
    ("correct_option", {"correct_option": True}, "must be an integer, not bool"),
    ("correct_option", {"correct_option": 1.0}, "must be an integer, not float"),
    ("captions", {"captions": ["once"]}, "there are 1 captions and 2 spans"),
]
PREFERENCE_FAULTS = [
    ("chosen", {"chosen": "At <evi>."}, "must be a list of {'role': str, 'content': str}"),
    ("prompt", {"prompt": []}, "with at least one turn"),
    ("chosen", {"chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}, "Keep contents plain strings"),
    ("rejected", {"rejected": [{"role": "assistant", "content": ""}]}, "is empty. Every preference row needs one"),
    ("prompt", {"prompt": [{"role": "user", "content": "<video> When?"}]}, "holds '<video>'"),
    ("chosen_spans", {"chosen_spans": []}, "there are 0 spans and 1 '<evi>' in 'chosen'"),
    ("rejected_spans", {"rejected_spans": [[1, 2], [3, 4]]}, "there are 2 spans and 1 '<evi>' in 'rejected'"),
    ("rejected_spans", {"rejected_spans": [[9, 12]]}, "ends after the video"),
    ("rejected", {"rejected_spans": [[1.0, 2.5]]}, "is the same as 'chosen', text and spans"),
    ("factor", {"factor": "style"}, "is unknown. Use one of ['grounding', 'text']"),
    ("perturbation", {"perturbation": "tamper"}, "is not a perturbation of the factor 'grounding'"),
    ("perturbation", {"factor": "text"}, "Use one of ['tamper', 'repeat']"),
    ("seed", {"seed": "3"}, "must be an integer, not str"),
]


@pytest.mark.parametrize(
    ("make", "column", "changes", "message"),
    [(grounding_row, *case) for case in FAULTS] + [(preference_row, *case) for case in PREFERENCE_FAULTS],
)
def test_every_fault_is_named_with_row_column_value_and_remedy(make, column, changes, message):
    row = make(**changes)
    with pytest.raises(ValueError) as caught:
        validate_row(row, index=7, source="rows.jsonl")
    text = str(caught.value)
    identity = f" (id '{row['id']}')" if isinstance(row["id"], str) and row["id"] else ""
    assert text.startswith(f"Row 7{identity} of rows.jsonl, column '{column}', value ")
    assert message in text
    assert repr(row[column])[:80] in text
    assert re.search(r"\. [A-Z].{10,}\.$", text)  # what is wrong; what to do


@pytest.mark.parametrize("column", [*COLUMNS, *PREFERENCE_COLUMNS])
def test_a_missing_column_is_named(column):
    row = preference_row()
    del row[column]
    if column == "rejected":  # then it is no preference row
        validate_row(row)
        return
    with pytest.raises(ValueError, match=f"column '{column}', value missing: the column is missing"):
        validate_row(row)


def test_files_are_looked_for_where_wanted(tmp_path):
    row = grounding_row(video=str(tmp_path / "none.mp4"))
    validate_row(row)
    with pytest.raises(ValueError, match=r"is not a file\. Correct the path"):
        validate_row(row, check_file=True)


def test_all_faults_of_a_file_are_listed():
    rows = [grounding_row(), grounding_row(spans=[[5, 1]], captions=[]), 3, grounding_row(id="c", duration=-1, task="")]
    faults = validate_rows(rows, source="x.jsonl")
    assert [(fault.row.split(" (")[0].split(" of")[0], fault.column) for fault in faults] == [
        ("Row 1", "spans"),
        ("Row 1", "spans"),
        ("Row 1", "id"),
        ("Row 2", "*"),
        ("Row 3", "duration"),
        ("Row 3", "task"),
    ]
    assert faults[3].value == "3"
    assert "row 0 has the same id" in faults[2].message
    assert "must be a mapping" in faults[3].message
