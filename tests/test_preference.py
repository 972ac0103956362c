# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Preference data sets: counts, determinism over processes and interruptions, flat memory, files without our code."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from preference_rows import random_row
from video_files import write_video

from d2vlm_hf.data.importers import import_rows
from d2vlm_hf.data.perturb import KINDS, PerturbConfig, perturb
from d2vlm_hf.data.preference import D2VLMPreference, make_preferences, row_seed, write_parquet
from d2vlm_hf.data.schema import make_row, validate_rows
from d2vlm_hf.data.vocabulary import Vocabulary


def rows_of(count, seed=5):
    rng = np.random.default_rng(seed)
    return [random_row(rng, index)[0] for index in range(count)]


def build(tmp_path, name="all", num_proc=None, **options):
    """A prepared builder and its data set, videos not decoded."""
    builder = D2VLMPreference(config_name=name, cache_dir=str(tmp_path / "cache"), **options)
    builder.download_and_prepare(num_proc=num_proc)
    return builder, plain(builder.as_dataset(split="train"))


def plain(dataset):
    return dataset.cast_column("video", datasets.Video(decode=False))


def test_counts_say_what_became_of_every_row():
    rows = rows_of(300)
    made = make_preferences(rows)
    found = list(made)
    assert validate_rows(found) == []  # ids unique too
    counts = made.counts()
    assert counts["rows"] == 300
    for kind in KINDS:
        assert counts["made"][kind] == sum(row["perturbation"] == kind for row in found)
        assert counts["made"][kind] + sum(counts["impossible"][kind].values()) == 300
    assert counts["factors"] == {
        factor: sum(row["factor"] == factor for row in found) for factor in ("grounding", "text")
    }
    assert list(made) == found  # a second pass makes the same and counts anew
    assert made.counts() == counts
    json.dumps(counts)


def test_a_row_can_be_made_again_from_its_columns():
    rows = rows_of(60)
    vocabulary = Vocabulary.from_rows(rows)
    by_id = {row["id"]: row for row in rows}
    for made in make_preferences(rows, vocabulary=vocabulary, seed=9):
        source = by_id[made["id"].rpartition("/")[0]]
        assert perturb(source, made["perturbation"], made["seed"], vocabulary) == made
        assert made["seed"] == row_seed(9, source["id"], made["perturbation"])


def test_order_of_rows_and_kinds_do_not_matter():
    rows = rows_of(80)
    vocabulary = Vocabulary.from_rows(rows)
    one = {row["id"]: row for row in make_preferences(rows, vocabulary=vocabulary)}
    two = {row["id"]: row for row in make_preferences(rows[::-1], KINDS[::-1], vocabulary=vocabulary)}
    assert one == two
    other = {row["id"]: row for row in make_preferences(rows, vocabulary=vocabulary, seed=1)}
    assert other != one


def test_per_row_limits_and_mixes_the_kinds():
    rows = rows_of(400)
    for limit in (1, 2):
        found = list(make_preferences(rows, per_row=limit))
        per_source = {}
        for row in found:
            per_source.setdefault(row["id"].rpartition("/")[0], set()).add(row["perturbation"])
        assert {len(kinds) for kinds in per_source.values()} == {limit}
        assert {row["perturbation"] for row in found} == set(KINDS)
    assert {row["perturbation"] for row in make_preferences(rows, ["drop", "merge"])} == {"drop", "merge"}


def test_choices_ask_which_answer_is_right():
    """Beside the rejected answers of a row, one row that names a wrong one of them; the spans stay as they are."""
    rows = rows_of(60)
    made = make_preferences(rows, choices=True)
    found = list(made)
    assert validate_rows(found) == []
    asked = [row for row in found if row["id"].endswith("/mcqa/tamper")]
    plain_rows = [row for row in found if row not in asked]
    assert plain_rows == list(make_preferences(rows))  # what was there without choices
    assert made.counts()["made"]["mcqa"] == len(asked) > 20
    assert sum(made.counts()["factors"].values()) == len(found)
    for row in asked:
        assert (row["factor"], row["perturbation"]) == ("text", "tamper")
        assert row["chosen_spans"] == row["rejected_spans"] == row["spans"]
        letters = [re.search(r"Best option: \((.)\)", row[side][0]["content"])[1] for side in ("chosen", "rejected")]
        assert ord(letters[0]) - 65 == row["correct_option"] != ord(letters[1]) - 65 < len(row["options"])
        assert f"option '{row['options'][row['correct_option']]}' -> " in row["edit"]
    limited = list(make_preferences(rows, per_row=1, choices=True))
    per_row = Counter(row["id"].rsplit("/mcqa", 1)[0].split("/")[0] for row in limited)
    assert max(per_row.values()) == 2  # one rejected answer, and the question about it
    assert made.impossible["mcqa", "the row has options already"] > 0


def test_a_stream_that_can_be_read_once_is_enough():
    rows = rows_of(100)
    assert list(make_preferences(iter(rows))) == list(make_preferences(rows))


def test_limits_and_rewriter_are_handed_on():
    rows = rows_of(80)
    config = PerturbConfig(repeats=(9, 9))
    made = list(make_preferences(rows, ["repeat"], config=config))
    assert all("9 times" in row["edit"] for row in made)
    made = make_preferences(rows, ["tamper"], rewriter=lambda answer, question, seed: answer)
    assert list(made) == []
    assert made.counts()["impossible"]["tamper"] == {"the rewriting changes no key information": 80}


def test_bad_arguments_say_what_to_do():
    rows = rows_of(2)
    with pytest.raises(ValueError, match="these are no perturbations: \\['swap'\\]"):
        make_preferences(rows, ["shift", "swap"])
    with pytest.raises(ValueError, match="no rejected answer would be made"):
        make_preferences(rows, per_row=0)
    with pytest.raises(ValueError, match=r"Row 1 .*there are"):
        list(make_preferences([rows[0], {**rows[1], "answer": "<evi>" * 9}]))


# --- speed and memory ------------------------------------------------------------------------------------------------


def captions_file(path, videos):
    """A captioning file with five events per video, in words that look like language."""
    rng = np.random.default_rng(0)
    who, does = ("man", "woman", "boy", "girl", "dog"), ("cuts", "lifts", "throws", "washes", "paints", "opens")
    what = ("onion", "door", "ball", "window", "rope", "table", "bottle")
    data = {}
    for k in range(videos):
        starts = np.sort(rng.uniform(0, 100, 5)).round(2).tolist()
        said = [
            f"The {rng.choice(who)} {rng.choice(does)} a {rng.choice(what)} near the {rng.choice(what)}."
            for _ in starts
        ]
        data[f"v{k}"] = {"duration": 120.0, "timestamps": [[s, round(s + 8, 2)] for s in starts], "sentences": said}
    path.write_text(json.dumps(data))
    return path


def test_ten_thousand_rows_are_a_matter_of_seconds(tmp_path):
    """10,000 rows in 60 s of one core are asked for; counted are a tenth of it, in seconds of this process alone."""
    import time

    path = captions_file(tmp_path / "c.json", 200)
    start = time.process_time()
    made = list(make_preferences(import_rows("activitynet_captions", path)))
    assert len(made) >= 1000
    assert time.process_time() - start < 6 * len(made) / 1000


def test_memory_does_not_grow_with_the_rows():
    vocabulary = Vocabulary.from_rows(rows_of(50))

    def peak(count):
        rng = np.random.default_rng(0)
        rows = (random_row(rng, index)[0] for index in range(count))
        tracemalloc.start()
        made = sum(len(json.dumps(row)) for row in make_preferences(rows, vocabulary=vocabulary))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size, made

    (small, few), (large, many) = peak(60), peak(240)
    assert many > 3 * few > 1e5
    assert large - small < 0.02 * (many - few)


# --- builder ---------------------------------------------------------------------------------------------------------


def test_builder_gives_what_make_preferences_gives(tmp_path):
    rows = rows_of(60)
    builder, dataset = build(tmp_path, source=rows, rows_per_shard=25)
    expected = make_preferences(rows)
    assert dataset["id"] == [row["id"] for row in expected]
    assert builder.counts() == expected.counts()
    for mine, theirs in zip(expected, dataset, strict=True):
        assert {**theirs, "video": theirs["video"]["path"]} == mine
    assert list((tmp_path / "cache" / "d2vlm_preference_work").iterdir()) == []


@pytest.mark.parametrize(("name", "kinds"), [("grounding", KINDS[:4]), ("text", KINDS[4:]), ("merge", ("merge",))])
def test_configurations_by_factor_and_kind(tmp_path, name, kinds):
    _, dataset = build(tmp_path, name, source=rows_of(40))
    assert set(dataset["perturbation"]) == set(kinds)


def test_processes_do_not_change_the_result(tmp_path):
    rows = rows_of(60)
    one, first = build(tmp_path / "one", source=rows, rows_per_shard=10)
    two, second = build(tmp_path / "two", num_proc=2, source=rows, rows_per_shard=10)
    assert first[:] == second[:]
    assert one.counts() == two.counts()


def test_another_process_makes_the_same():
    code = (
        "import hashlib, json, numpy as np; from preference_rows import random_row;"
        "from d2vlm_hf.data.preference import make_preferences;"
        "rng = np.random.default_rng(5); rows = [random_row(rng, index)[0] for index in range(60)];"
        "print(hashlib.md5(json.dumps(list(make_preferences(rows))).encode()).hexdigest())"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    paths = os.pathsep.join([here, os.path.dirname(here)])
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.md5(json.dumps(list(make_preferences(rows_of(60)))).encode()).hexdigest()


class StoppingRewriter:
    """Writes down its calls, and fails once a file lies there."""

    model = "a model"

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, answer, question, seed):
        with open(os.path.join(self.folder, "calls"), "a") as file:
            file.write("x")
        if os.path.getsize(os.path.join(self.folder, "calls")) == 25 and os.path.exists(self.folder + "/stop"):
            raise KeyboardInterrupt
        return answer.replace("the", "the not").replace("zq", "qz")


def test_an_interrupted_build_goes_on_where_it_was(tmp_path):
    rows = rows_of(40)
    options = {"source": rows, "rewriter": StoppingRewriter(tmp_path), "rows_per_shard": 10}
    (tmp_path / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, "tamper", **options)
    (tmp_path / "stop").unlink()
    builder, dataset = build(tmp_path, "tamper", **options)
    assert len((tmp_path / "calls").read_text()) == 25 + 20  # two finished shards of ten were not made again
    assert builder.counts()["rows"] == 40
    (tmp_path / "again").mkdir()
    _, expected = build(tmp_path / "again", "tamper", **options)
    assert dataset[:] == expected[:]


def test_a_changed_source_is_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    for count in (12, 20):
        path.write_text("\n".join(json.dumps(row) for row in rows_of(count)))
        builder, _ = build(tmp_path, "repeat", source=str(path))
        assert builder.counts()["rows"] == count


def test_sources_of_every_kind(tmp_path):
    rows = rows_of(12)
    _, expected = build(tmp_path, "repeat", source=rows)
    _, called = build(tmp_path, "repeat", source=lambda: iter(rows))
    assert called[:] == expected[:]
    _, named = build(tmp_path, "repeat", source=(row for row in rows), source_id="twelve rows")
    assert named[:] == expected[:]
    captions = captions_file(tmp_path / "c.json", 3)
    options = {"importer": "activitynet_captions", "importer_options": {"task": "tvg"}, "source": str(captions)}
    builder, _ = build(tmp_path, "shift", **options)
    assert builder.counts()["rows"] == 15
    with pytest.raises(ValueError, match="source is None: there are no rows to perturb"):
        build(tmp_path, "shift")
    with pytest.raises(ValueError, match=r"which is no file\. Pass a JSON lines file of rows"):
        build(tmp_path, "shift", source=str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="The source has no rows: there is nothing to perturb"):
        build(tmp_path, "shift", source=[])
    with pytest.raises(ValueError, match="call download_and_prepare\\(\\) first"):
        D2VLMPreference(config_name="drop", cache_dir=str(tmp_path / "new"), source=rows).counts()


# --- files -----------------------------------------------------------------------------------------------------------


def video_rows(tmp_path, count=5):
    rows = []
    for k in range(count):
        video = str(write_video(tmp_path / f"video-{k}.mp4", count=20 + k, rate=2))
        answer, spans = "A red star sings at <evi> and <evi>.", [[1.0, 3.0], [6.0, 8.0]]
        rows.append(make_row(id=f"r{k}", video=video, duration=10.0, question="When?", answer=answer, spans=spans))
    return rows


STRANGER = """
import sys, json, datasets
sys.modules["d2vlm_hf"] = None  # importing it fails
for streaming in (False, True):
    data = datasets.load_dataset(sys.argv[1], split="train", streaming=streaming)
    data = data.cast_column("video", datasets.Video(decode=False))
    print(json.dumps([{**row, "video": len(row["video"]["bytes"])} for row in data]))
"""


def test_parquet_is_loaded_without_our_code(tmp_path):
    rows = video_rows(tmp_path)
    made = list(make_preferences(rows, ["shift", "drop", "repeat"]))
    files = write_parquet(made, tmp_path / "out", shard_size=6)
    assert [os.path.basename(file) for file in files] == [f"train-0000{k}-of-00003.parquet" for k in range(3)]
    (tmp_path / "else").mkdir()
    arguments = [sys.executable, "-c", STRANGER, str(tmp_path / "out")]
    run = subprocess.run(arguments, cwd=tmp_path / "else", capture_output=True, text=True, check=True)
    expected = [{**row, "video": os.path.getsize(row["video"])} for row in made]
    assert [json.loads(line) for line in run.stdout.splitlines()] == [expected, expected]


def test_parquet_features_and_paths(tmp_path):
    rows = video_rows(tmp_path, 2)
    write_parquet(rows, tmp_path / "sft")
    loaded = datasets.load_dataset(str(tmp_path / "sft"), split="train")
    assert isinstance(loaded.features["video"], datasets.Video)
    assert "rejected" not in loaded.features
    video = plain(loaded)[1]["video"]
    assert video["path"] == "video-1.mp4"  # no path of this machine is published
    assert video["bytes"] == Path(rows[1]["video"]).read_bytes()
    write_parquet(rows, tmp_path / "paths", embed_video=False)
    kept = plain(datasets.load_dataset(str(tmp_path / "paths"), split="train"))
    assert kept["video"] == [{"bytes": None, "path": row["video"]} for row in rows]


def test_videos_embedded_in_the_source_are_kept(tmp_path):
    write_parquet(video_rows(tmp_path, 2), tmp_path / "sft")
    source = datasets.load_dataset(str(tmp_path / "sft"), split="train")
    _, dataset = build(tmp_path, "shift", source=source)
    write_parquet(dataset, tmp_path / "out")
    again = plain(datasets.load_dataset(str(tmp_path / "out"), split="train"))
    assert [row["bytes"] for row in again["video"]] == [row["bytes"] for row in plain(source)["video"]]


def test_parquet_refuses_what_it_cannot_write(tmp_path):
    rows = video_rows(tmp_path, 1)
    write_parquet(rows, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"has files of the split 'train' already\. Remove them, or use another folder"
    ):
        write_parquet(rows, tmp_path / "out")
    write_parquet(rows, tmp_path / "out", split="test")
    with pytest.raises(ValueError, match="There are no rows to write"):
        write_parquet([], tmp_path / "empty")
    with pytest.raises(ValueError, match=r"a file needs rows\. Pass 1 or more"):
        write_parquet(rows, tmp_path / "zero", shard_size=0)
    with pytest.raises(ValueError, match="is not a file, so it cannot be embedded"):
        write_parquet([{**rows[0], "video": "gone.mp4"}], tmp_path / "gone")
