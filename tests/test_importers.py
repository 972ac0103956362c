# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Importers on small files in the published formats, made here: what is kept, dropped for which reason, and mended."""

import json
import os
import tracemalloc

import pytest
import torch
from video_files import write_video

from d2vlm_hf.data.import_conversations import times_to_evidence
from d2vlm_hf.data.import_formats import Dropped, ImportFilter, is_mapping_of, is_pairs, resolve_video, stream_json
from d2vlm_hf.data.importers import IMPORTERS, import_rows
from d2vlm_hf.data.schema import validate_rows


def save(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(result):
    """The rows of an import, whose counts must add up and which must all be valid."""
    rows = list(result)
    assert result.read == result.kept + sum(result.dropped.values())
    assert result.kept == len(rows)
    assert validate_rows(rows) == []
    return rows


def talk(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# --- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "times", "result"),
    [
        ("It happens in <vid> - <vid>.", [3, 7.5], ("It happens in <evi>.", [[3, 7.5]], 2)),
        ("From <vid>s to <vid> seconds it rains", [1, 2], ("From <evi> it rains", [[1, 2]], 2)),
        ("between <vid> and <vid>, he sits", [1, 2], ("between <evi>, he sits", [[1, 2]], 2)),
        ("at <vid> and <vid>", [1, 2], ("at <evi> and <evi>", [[1, 1], [2, 2]], 2)),
        ("at <vid> seconds", [4, 9], ("at <evi>", [[4, 4]], 1)),
        ("<vid>–<vid>, a. <vid> — <vid>, b.", [1, 2, 3, 4], ("<evi>, a. <evi>, b.", [[1, 2], [3, 4]], 4)),
        ("no time", [], ("no time", [], 0)),
        ("<vid> - <vid>", [1], Dropped("times and tokens differ in number")),
    ],
)
def test_time_tokens_become_evidence(text, times, result):
    assert times_to_evidence(text, times) == result


def test_et_instruct(tmp_path):
    choice = "<image>\nWhat does he do at <vid> - <vid>?\n(A) sit\n(B) stand\n(C) run"
    samples = [
        {
            "task": "slc", "source": "how_to_step", "video": "how_to_step/x.mp4", "duration": 200.767,
            "tgt": [36, 44, 49, 57],
            "conversations": talk("<image>\nList the steps.", "<vid> - <vid>, cut. <vid> - <vid>, chop."),
        },
        {
            "task": "rar", "source": "pt", "video": "y.mp4", "duration": 60, "src": [12, 18],
            "conversations": talk(choice, "(B) stand"),
        },
        {
            "task": "vhd", "source": "s", "video": "z.mp4", "duration": 60, "tgt": [59.8],
            "conversations": talk("<image>\nBest moment?", "It is at <vid> seconds."),
        },
        {
            "task": "tvg", "source": "s", "video": "w.mp4", "duration": 60, "src": [5], "tgt": [1, 2, 3, 4],
            "conversations": talk("When?", "At <vid> - <vid>.") + talk("And after <vid>?", "At <vid> - <vid>."),
        },
    ]  # fmt: skip
    result = import_rows("et_instruct", save(tmp_path / "a.json", samples))
    rows = rows_of(result)
    assert [row["id"] for row in rows] == [
        "et_instruct-0",
        "et_instruct-1",
        "et_instruct-2",
        "et_instruct-3",
        "et_instruct-3-1",
    ]
    assert rows[0]["answer"] == "<evi>, cut. <evi>, chop."
    assert rows[0]["spans"] == [[36, 44], [49, 57]]
    assert (rows[0]["question"], rows[0]["task"], rows[0]["source"]) == ("List the steps.", "slc", "how_to_step")
    assert rows[1]["question"].startswith("What does he do at <evi>?")
    assert rows[1]["question_spans"] == [[12, 18]]
    assert (rows[1]["options"], rows[1]["correct_option"]) == (["sit", "stand", "run"], 1)
    assert rows[2]["spans"] == [[59.0, 60.0]]  # one second, inside the video
    assert rows[4]["question_spans"] == [[5, 6]]
    assert rows[4]["spans"] == [[3, 4]]
    assert result.summary() == "et_instruct: read 5, kept 5, dropped 0"


def test_et_instruct_counts_what_it_drops(tmp_path):
    def sample(**columns):
        fine = {"video": "v.mp4", "duration": 60, "tgt": [1, 2], "conversations": talk("When?", "At <vid> - <vid>.")}
        return fine | columns

    samples = [
        sample(),
        sample(duration=4.9),
        sample(duration=350.5),
        sample(duration=None),
        sample(tgt=[1, 2, 3]),
        sample(tgt=[1]),
        sample(tgt=[7, 2]),
        sample(tgt=[float("nan"), 2]),
        sample(tgt=[58, 60.9]),  # within the overshoot: clipped
        sample(tgt=[58, 62]),
        sample(tgt=[-5, 2]),
        sample(conversations=talk("word " * 150, "At <vid> - <vid>, " + "word " * 60)),
        sample(conversations=talk("When?", "At <vid> - <vid> </evi>.")),
        sample(conversations=talk("<image>\n", "At <vid> - <vid>.")),
        sample(conversations=talk("When?", "At <vid> - <vid>.")[::-1]),
        sample(conversations="none"),
        sample(video=""),
        {"video": "v.mp4"},
        "no record",
    ]
    result = import_rows("et_instruct", save(tmp_path / "a.json", samples))
    rows = rows_of(result)
    assert result.read == len(samples)
    assert result.kept == 2
    assert rows[1]["spans"] == [[58, 60]]
    assert result.dropped == {
        "video is shorter or longer than allowed": 2,
        "duration is unknown": 1,
        "times and tokens differ in number": 2,
        "span ends before it starts": 1,
        "time is not a number": 1,
        "span lies outside the video": 2,
        "question and answer have too many words": 1,
        "text holds a reserved token": 1,
        "question or answer is empty": 1,
        "conversation is malformed": 2,
        "no video is named": 1,
        "record is malformed": 2,
    }
    assert "2 record is malformed" in result.summary()
    loose = import_rows(
        "et_instruct", tmp_path / "a.json", min_duration=0, max_duration=1e9, max_words=10**6, reversed_spans="swap",
        overshoot=10,
    )  # fmt: skip
    assert len(rows_of(loose)) == 8


def test_d2vlm_sft(tmp_path):
    samples = [
        {
            "task": "dvc", "source": "s", "video": "a.mp4", "duration": 60, "src": [5, 9], "tgt": [1, 2, 3, 4],
            "conversations": talk("<image>\nAfter <evi>?", "<evi><evi></evi>He sits at <evi>, then stands at <evi>."),
        },
        {"task": "rvq", "video": "a.mp4", "duration": 60, "conversations": talk("Why?", "</evi>He is tired.")},
        {"video": "a.mp4", "duration": 60, "tgt": [1, 2], "conversations": talk("When?", "<evi> At <evi>.")},
        {"video": "a.mp4", "duration": 60, "tgt": [1, 2], "conversations": talk("When?", "<evi><evi></evi>At <evi>.")},
        {"video": "a.mp4", "duration": 60, "tgt": [1, 2, 3], "conversations": talk("When?", "<evi></evi>At <evi>.")},
        {"video": "a.mp4", "duration": 60, "tgt": [7], "conversations": talk("When?", "<evi></evi>At <evi>.")},
    ]  # fmt: skip
    result = import_rows("d2vlm_sft", save(tmp_path / "a.json", samples))
    first, second, point = rows_of(result)
    assert first["answer"] == "He sits at <evi>, then stands at <evi>."
    assert (first["question"], first["question_spans"]) == ("After <evi>?", [[5, 9]])
    assert first["spans"] == [[1, 2], [3, 4]]
    assert (second["answer"], second["spans"], second["source"]) == ("He is tired.", [], "d2vlm_sft")
    assert point["spans"] == [[7, 8]]
    assert result.dropped == {
        "answer has no </evi>": 1,
        "grounding part and answer name different numbers of events": 1,
        "times and tokens differ in number": 1,
    }


CHOSEN = "<evi><evi></evi>He sits at <evi>, then stands at <evi>."
ONE = "<evi></evi>He sits at <evi>."


def preference_sample():
    sides = {
        "chosen": (CHOSEN, [1, 9, 13, 20]),
        "reject_1_f": (CHOSEN.replace("sits", "lies"), [1, 9, 13, 20]),
        "reject_1_repeat_x": (CHOSEN.replace("sits", "sits sits"), [1, 9, 13, 20]),
        "reject_1_qwen": (CHOSEN.replace("sits", "jumps"), [1, 9, 13, 20]),
        "reject_1_shifting": (CHOSEN, [1, 9, 33, 40]),
        "reject_2_unnamed": (CHOSEN, [21, 29, 13, 20]),
        "reject_3_unnamed": (ONE, [1, 9]),
        "reject_4_unnamed": (ONE, [1, 20]),
        "reject_5_unnamed": ("<evi>" + CHOSEN.replace("He", "It rains at <evi>. He"), [30, 35, 1, 9, 13, 20]),
        "reject_6_unnamed": (CHOSEN.replace("He", "She"), [1, 9, 13, 20]),
        "reject_7_equal": (CHOSEN, [1, 9, 13, 20]),
        "reject_8_broken": (CHOSEN, [1, 9]),
    }
    return {
        "video": "a.mp4",
        "duration": 60,
        "task": "dvc",
        "source": "s",
        "src": [2, 3],
        "conversations": {key: talk("<image>\nAfter <evi>?", answer) for key, (answer, _) in sides.items()},
        "tgt": {key: times for key, (_, times) in sides.items()},
    }


def test_d2vlm_fpo(tmp_path):
    several = {
        **preference_sample(),
        "conversations": {"chosen": talk("a", "</evi>b") * 2, "reject_0_f": talk("a", "</evi>c")},
    }
    lonely = {"video": "a.mp4", "duration": 60, "conversations": {"chosen": talk("a", "</evi>b")}}
    path = save(
        tmp_path / "a.json", [preference_sample(), {**several, "src": [], "tgt": []}, lonely, {"video": "a.mp4"}]
    )
    result = import_rows("d2vlm_fpo", path)
    rows = rows_of(result)
    kinds = {row["id"].removeprefix("d2vlm_fpo-0-"): (row["factor"], row["perturbation"]) for row in rows}
    assert kinds == {
        "reject_1_f": ("text", "tamper"),
        "reject_1_repeat_x": ("text", "repeat"),
        "reject_1_qwen": ("text", "tamper"),
        "reject_1_shifting": ("grounding", "shift"),
        "reject_2_unnamed": ("grounding", "shift"),
        "reject_3_unnamed": ("grounding", "drop"),
        "reject_4_unnamed": ("grounding", "merge"),
        "reject_5_unnamed": ("grounding", "add"),
        "reject_6_unnamed": ("text", "tamper"),
    }
    assert rows[0]["prompt"] == [{"role": "user", "content": "After <evi>?"}]
    assert rows[0]["rejected"] == [{"role": "assistant", "content": "He lies at <evi>, then stands at <evi>."}]
    assert rows[4]["rejected_spans"] == [[21, 29], [13, 20]]
    assert rows[4]["chosen_spans"] == rows[4]["spans"] == [[1, 9], [13, 20]]
    assert result.dropped == {
        "rejected side equals the chosen one": 1,
        "times and tokens differ in number": 1,
        "preference conversation has several turns": 1,
        "record has no rejected side": 1,
        "record is malformed": 1,
    }
    named = import_rows("d2vlm_fpo", path, kinds={"unnamed": "repeat", "reject_3_unnamed": "drop"})
    found = {row["id"][-16:]: row["perturbation"] for row in named}
    assert (found["reject_2_unnamed"], found["reject_3_unnamed"]) == ("repeat", "drop")
    with pytest.raises(ValueError, match="is 'swap', which is no perturbation"):
        import_rows("d2vlm_fpo", path, kinds={"unnamed": "swap"})


class Letters:
    """A tokenizer of characters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_d2vlm_fpo_from_tokens(tmp_path):
    sample = preference_sample()
    for turns in sample["conversations"].values():
        for turn in turns:
            text = turn["value"].replace("<image>\n", "")
            turn["value"] = torch.tensor([-200, *map(ord, text)])
    sample["tgt"] = {key: torch.tensor(times) for key, times in sample["tgt"].items()}
    path = tmp_path / "a.pth"
    torch.save([sample], path)
    rows = rows_of(import_rows("d2vlm_fpo", path, tokenizer=Letters()))
    expected = rows_of(import_rows("d2vlm_fpo", save(tmp_path / "a.json", [preference_sample()])))
    assert rows == expected
    with pytest.raises(ValueError, match="holds token ids: they mean nothing without their tokenizer"):
        list(import_rows("d2vlm_fpo", path))
    torch.save({"rows": 1}, path)
    with pytest.raises(ValueError, match="holds a dict where a list of samples is needed"):
        list(import_rows("d2vlm_fpo", path))
    torch.save([Letters()], path)
    with pytest.raises(ValueError, match="holds pickled objects other than tensors"):
        list(import_rows("d2vlm_fpo", path, tokenizer=Letters()))


# --- moments and captions --------------------------------------------------------------------------------------------

CHARADES = """AB12C 24.3 30.4##person turns a light on.
AB12C 8.0 7.0##person is holding a bag.
XY34Z 0.0 3.4##a person's dog barks.

this is no line
XY34Z 1.0 2.0 person opens a door
NO000 1.0 2.0##person opens a door.
"""


def test_charades_sta(tmp_path):
    path = save(tmp_path / "train.txt", CHARADES)
    table = save(tmp_path / "charades.csv", "id,subject,length\nAB12C,S1,31.25\nXY34Z,S2,20.5\n")
    result = import_rows("charades_sta", path, durations=table)
    first, second = rows_of(result)
    assert first["question"] == "When does this happen in the video: 'person turns a light on'?"
    assert (first["answer"], first["spans"], first["duration"]) == (
        "The event happens in <evi>.",
        [[24.3, 30.4]],
        31.25,
    )
    assert (first["task"], first["source"], first["video"]) == ("tvg", "charades_sta", "AB12C.mp4")
    assert second["id"] == "charades_sta-2"
    assert result.dropped == {"span ends before it starts": 1, "line is malformed": 2, "duration is unknown": 1}
    assert result.read == 6
    lengths = save(tmp_path / "lengths.json", {"AB12C": 31.25})
    swapped = rows_of(import_rows("charades_sta", path, durations=lengths, reversed_spans="swap"))
    assert [row["spans"] for row in swapped] == [[[24.3, 30.4]], [[7.0, 8.0]]]
    told = import_rows(
        "charades_sta", path, durations={"XY34Z": 20.5}, answer="{Query} at {evidence}.", question="{query}?"
    )
    (row,) = rows_of(told)
    assert (row["question"], row["answer"]) == ("a person's dog barks?", "A person's dog barks at <evi>.")
    assert rows_of(told) == [row]  # a second pass reads the file anew
    assert (told.read, told.kept) == (6, 1)


def test_charades_asks_the_video_for_its_duration(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "AB12C.mp4", count=56, rate=8)
    path = save(tmp_path / "train.txt", "AB12C 1.0 3.0##person sits.\nXY34Z 1.0 3.0##person stands.\n")
    result = import_rows("charades_sta", path, video_root=tmp_path / "videos")
    (row,) = rows_of(result)
    assert row["duration"] == pytest.approx(7.0, abs=0.05)
    assert row["video"] == os.path.join(tmp_path, "videos", "AB12C.mp4")
    assert result.dropped == {"video file is missing": 1}
    kept = import_rows("charades_sta", path, video_root=tmp_path, durations={"XY34Z": 9}, require_video=False)
    assert [row["video"] for row in kept] == [os.path.join(tmp_path, "XY34Z.mp4")]


def test_qvhighlights(tmp_path):
    lines = [
        {
            "qid": 7,
            "query": "A cat sleeps.",
            "vid": "abc_60.0_210.0",
            "duration": 150,
            "relevant_windows": [[60, 80], [2, 4]],
        },
        {"qid": 8, "query": "A dog", "vid": "d", "duration": 150},
        {"qid": 9, "query": "A dog", "vid": "d", "duration": 150, "relevant_windows": [[1, 2, 3]]},
        {"qid": 10},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"qid": 11,\n'
    result = import_rows("qvhighlights", save(tmp_path / "train.jsonl", text))
    (row,) = rows_of(result)
    assert row["answer"] == "The event happens in <evi> and <evi>."
    assert (row["spans"], row["video"], row["id"]) == ([[2, 4], [60, 80]], "abc_60.0_210.0.mp4", "qvhighlights-7")
    assert result.dropped == {"record has no window": 1, "record is malformed": 1, "line is malformed": 2}


CAPTIONS = {
    "v_one": {
        "duration": 55.5,
        "timestamps": [[30, 55.9], [0.28, 20]],
        "sentences": [" A man   sits down.", "A red car stops."],
    },
    "v_long": {"duration": 400, "timestamps": [[0, 5]], "sentences": ["Rain falls."]},
    "v_odd": {"duration": 50, "timestamps": [[0, 5]], "sentences": []},
    "v_none": {"duration": 50, "timestamps": [[0, 5]], "sentences": ["  "]},
    "v_bad": 3,
}


def test_activitynet_captions(tmp_path):
    path = save(tmp_path / "train.json", CAPTIONS)
    other = save(tmp_path / "val_2.json", {"v_one": {"duration": 55.5, "timestamps": [[1, 50]], "sentences": ["All."]}})
    result = import_rows("activitynet_captions", path, others=[other])
    (row,) = rows_of(result)
    assert row["answer"] == "<evi>, A red car stops. <evi>, A man sits down."
    assert row["spans"] == [[0.28, 20], [30, 55.5]]
    assert row["captions"] == ["A red car stops.", "A man sits down."]
    assert row["annotations"] == [[[1, 50]]]
    assert (row["task"], row["id"]) == ("dvc", "activitynet_captions-v_one")
    assert result.dropped == {
        "video is shorter or longer than allowed": 1,
        "record is malformed": 2,
        "caption is empty": 1,
    }
    single = import_rows("activitynet_captions", path, task="tvg", max_duration=500)
    rows = rows_of(single)
    assert [row["id"][-7:] for row in rows] == ["v_one-0", "v_one-1", "_long-0"]
    assert rows[0]["question"] == "When does this happen in the video: 'A man sits down'?"
    with pytest.raises(ValueError, match="task is 'tal': captions can be asked for as 'dvc', 'slc' or 'tvg'"):
        import_rows("activitynet_captions", path, task="tal")


def test_youcook2_in_both_formats(tmp_path):
    own = {
        "database": {
            "abc": {
                "duration": 100.5,
                "subset": "training",
                "annotations": [{"segment": [9, 12], "id": 0, "sentence": "cut the ends"}],
            }
        }
    }
    plain = {"abc": {"duration": 100.5, "timestamps": [[9, 12]], "sentences": ["cut the ends"]}}
    rows = [rows_of(import_rows("youcook2", save(tmp_path / "y.json", data), task="slc")) for data in (own, plain)]
    assert rows[0] == rows[1]
    assert (rows[0][0]["answer"], rows[0][0]["task"]) == ("<evi>, cut the ends.", "slc")
    assert rows[0][0]["question"].startswith("Describe all the cooking steps")


def test_tacos_turns_frames_into_seconds(tmp_path):
    data = {
        "s1.avi": {
            "fps": 29.4,
            "num_frames": 2940,
            "timestamps": [[147, 294], [294, 588]],
            "sentences": ["He cuts", "He eats"],
        },
        "s2.avi": {"fps": 0, "num_frames": 2940, "timestamps": [[147, 294]], "sentences": ["He cuts"]},
    }
    result = import_rows("tacos", save(tmp_path / "t.json", data))
    rows = rows_of(result)
    assert [row["spans"] for row in rows] == [[[5.0, 10.0]], [[10.0, 20.0]]]
    assert (rows[0]["duration"], rows[0]["video"], rows[0]["task"]) == (100.0, "s1.avi", "tvg")
    assert result.dropped == {"frame rate is unknown": 1}
    assert len(rows_of(import_rows("tacos", tmp_path / "t.json", task="dvc"))) == 1


# --- files, paths, arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.mp4", "a/../../x.mp4", "/etc/passwd", "..", "C:\\x.mp4", "..\\x.mp4"])
def test_a_video_path_may_not_leave_its_root(tmp_path, name):
    sample = {"video": name, "duration": 60, "tgt": [1, 2], "conversations": talk("When?", "At <vid> - <vid>.")}
    path = save(tmp_path / "a.json", [sample])
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match=r"leads out of its root .* an annotation may only name files below it"):
            list(import_rows("et_instruct", path, video_root=root))
    assert resolve_video("a/./b.mp4", "root") == os.path.join("root", "a", "b.mp4")
    assert resolve_video("a/../b.mp4", None) == "b.mp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ', "is not valid JSON at character 11"),
        ('{"a": 1 "b": 2}', "where one of"),
        ('{"a" 1}', "where one of"),
        ("3", "where one of"),
        ("", "where one of"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    path = save(tmp_path / "a.json", text)
    with pytest.raises(ValueError, match=message):
        list(stream_json(path))


def test_json_is_read_as_json_reads_it(tmp_path):
    long = "ä" * 200_000  # longer than the buffer
    for value in (
        [],
        {},
        [1, 2.5, "x", None, True, long],
        {"a": [1, {"b": long}], "c": 12345678901},
        [{"x": k} for k in range(9999)],
    ):
        path = save(tmp_path / "a.json", json.dumps(value, indent=1, ensure_ascii=False))
        expected = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        assert list(stream_json(path)) == expected
        assert list(stream_json(save(path, json.dumps(value)))) == expected


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(count):
        turns = talk("When? " * 5, "At <vid> - <vid>.")
        sample = {"video": "v.mp4", "duration": 60, "tgt": [1, 2], "conversations": turns}
        path = save(tmp_path / f"{count}.json", [sample] * count)
        tracemalloc.start()
        assert sum(1 for _ in import_rows("et_instruct", path)) == count
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, path.stat().st_size

    (small, short), (large, long) = peak(1000), peak(4000)
    assert large - small < 0.1 * (long - short)


def test_bad_arguments_say_what_to_do(tmp_path):
    path = save(tmp_path / "a.txt", CHARADES)
    with pytest.raises(ValueError, match="which is no format that can be imported"):
        import_rows("charades", path)
    with pytest.raises(ValueError, match="does not exist: nothing to import"):
        list(import_rows("et_instruct", tmp_path / "gone.json"))
    with pytest.raises(ValueError, match="durations are looked up in 'id' and 'length'"):
        import_rows("charades_sta", path, durations=save(tmp_path / "b.csv", "name,seconds\n"))
    with pytest.raises(ValueError, match=r"which cannot be filled in .* are known\. Write other braces twice"):
        import_rows("charades_sta", path, question="When {action}?")
    with pytest.raises(ValueError, match="the times belong into it"):
        import_rows("charades_sta", path, answer="{query}")
    with pytest.raises(ValueError, match="no video can be that long"):
        ImportFilter(min_duration=10, max_duration=5)
    with pytest.raises(ValueError, match="reversed_spans is 'keep', which is unknown"):
        ImportFilter(reversed_spans="keep")
    with pytest.raises(ValueError, match="and a tolerance at least 0"):
        ImportFilter(point_seconds=0)
    assert sorted(IMPORTERS) == list(IMPORTERS)
    assert not is_pairs([[1, 2], [3]])
    assert not is_mapping_of([], "a")
