# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The shapes world: what rows say is what frames show, questions have one answer, and text alone does not tell it."""

import dataclasses
import hashlib
import json
import math
import re
import signal
import subprocess
import sys
import time
import wave
from collections import Counter, defaultdict
from itertools import pairwise

import av
import datasets
import numpy as np
import pytest
from PIL import Image

from d2vlm_hf.data import shapes_language as language
from d2vlm_hf.data.schema import EVIDENCE_TOKEN, validate_row, validate_rows
from d2vlm_hf.data.shapes import (
    CHOICE_TASKS,
    DIFFICULTIES,
    HELD_OUT_PAIRS,
    SPLITS,
    TASK_WEIGHTS,
    ShapesConfig,
    best_constant_span,
    blind_controls,
    contact_sheet,
    generate,
    iterate,
    load_rows,
    make_rows,
    make_scene,
    object_states,
    render_frames,
    write_frames,
    write_video,
)
from d2vlm_hf.data.shapes_builder import ShapesBuilder
from d2vlm_hf.data.shapes_world import COLOURS, FILE_FPS, MOVES, pairs_of, scene_rng


LEVELS = tuple(DIFFICULTIES)
MARGIN = 0.03  # blind scores stay within three points of chance


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(stream)]
        about = (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.duration * stream.time_base))
    return np.stack([frame for frame, _ in frames]), np.array([moment for _, moment in frames]), about


def pixels_of(frames, colour):
    """(T, H, W) where a frame has an object's plain colour."""
    return (np.abs(frames.astype(int) - COLOURS[colour]) < 42).all(-1)


def plain_objects(difficulty, kind, count, split="train"):
    """Yield scenes and events of a kind that are all their object does, no other object having its colour."""
    for index in range(10_000):
        scene = make_scene(difficulty, split, index, seed=1)
        colours = Counter(thing.colour for thing in scene.objects)
        for event in scene.events:
            alone = sum(other.actor == event.actor for other in scene.events) == 1
            if event.kind == kind and alone and colours[scene.objects[event.actor].colour] == 1:
                yield scene, event
                count -= 1
                if not count:
                    return


# ---------------------------------------------------------------- the same every time


def test_scenes_rows_and_frames_are_the_same_every_time():
    for difficulty in LEVELS:
        first, second = (make_scene(difficulty, "test", 5, seed=3) for _ in range(2))
        assert first == second
        assert make_rows(first) == make_rows(second)
        np.testing.assert_array_equal(render_frames(first, size=32), render_frames(second, size=32))
        some = first.times[[3, 40, 41]]
        np.testing.assert_array_equal(render_frames(first, some, 32), render_frames(first, size=32)[[3, 40, 41]])


def test_splits_seeds_levels_and_indices_share_no_scene():
    scenes = [
        make_scene(difficulty, split, index, seed)
        for difficulty in LEVELS
        for split in SPLITS
        for index in (0, 1, 10**9)
        for seed in (0, 1)
    ]
    assert (
        len({(scene.objects, scene.events) for scene in scenes}) == len({scene.name for scene in scenes}) == len(scenes)
    )


def test_another_process_makes_the_same_bytes_and_a_killed_run_continues(tmp_path):
    # Large enough that the process is still at it when it is killed.
    config = ShapesConfig(difficulty="middle", split="validation", num_videos=40, rows_per_video=2, size=96)
    code = (
        "from d2vlm_hf.data.shapes import ShapesConfig, generate\n"
        f"generate(ShapesConfig(**{dataclasses.asdict(config)!r}), {str(tmp_path / 'killed')!r}, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        while len(list((tmp_path / "killed" / "videos").glob("*.mp4"))) < 3 and process.poll() is None:
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = sorted((tmp_path / "killed" / "videos").glob("*.mp4"))
    assert 3 <= len(kept) < config.num_videos
    assert not (tmp_path / "killed" / "rows.jsonl").exists()
    with pytest.raises(
        ValueError, match=r"has no rows\.jsonl: nothing was generated there, or the run was interrupted"
    ):
        load_rows(tmp_path / "killed")
    written = [path.stat().st_mtime_ns for path in kept]

    generate(config, tmp_path / "killed", progress=False)
    assert [path.stat().st_mtime_ns for path in kept] == written  # complete files are kept
    generate(config, tmp_path / "whole", progress=False)
    digests = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in [*(tmp_path / run / "videos").glob("*.mp4"), *(tmp_path / run).glob("*.json*")]
        }
        for run in ("killed", "whole")
    ]
    assert len(digests[0]) == config.num_videos + 2
    assert digests[0] == digests[1]
    rows = load_rows(tmp_path / "whole")
    assert len(rows) > config.num_videos
    assert validate_rows(rows, check_file=True) == []


def test_more_processes_and_more_videos_give_the_same(tmp_path):
    config = ShapesConfig(difficulty="easy", num_videos=3, size=32)
    generate(config, tmp_path / "a", progress=False)
    more = dataclasses.replace(config, num_videos=5)
    generate(more, tmp_path / "a", progress=False)
    generate(more, tmp_path / "b", num_proc=2, progress=False)
    for name in ("rows.jsonl", *(f"videos/{scene.name}.mp4" for scene, _ in iterate(more))):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(ValueError, match=r"holds shapes of another configuration: \{'seed': 0\} instead of"):
        generate(dataclasses.replace(more, seed=1), tmp_path / "a", progress=False)


# ---------------------------------------------------------------- annotations are exact


@pytest.mark.parametrize("difficulty", LEVELS)
def test_scenes_keep_to_their_level(difficulty):
    level = DIFFICULTIES[difficulty]
    for index in range(60):
        scene = make_scene(difficulty, "train", index)
        assert level.objects[0] <= len(scene.objects) <= level.objects[1]
        assert 1 <= len(scene.events) <= level.events[1]
        assert level.seconds[0] <= scene.duration <= level.seconds[1]
        assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)
        starts = sorted(event.start for event in scene.events)
        assert all(second - first >= 0.75 for first, second in pairwise(starts))
        for event in scene.events:
            assert level.event_seconds[0] <= event.end - event.start <= level.event_seconds[1]
            assert event.start % level.grid == 0
            assert event.end % level.grid == 0
            assert event.start >= 0.5
            assert event.end <= scene.times[-1] - 0.5
            assert event.kind in level.kinds
            for other in scene.events:
                apart = max(event.start, other.start) - min(event.end, other.end)
                if other is not event and other.actor == event.actor:
                    assert apart >= 1.5
                elif other is not event and difficulty == "easy":
                    assert apart >= 0.5
        inside = object_states(scene, scene.times)
        reach = inside["radius"][..., None]
        assert (inside["centre"] - reach >= 0).all()
        assert (inside["centre"] + reach <= 1).all()


@pytest.mark.parametrize("difficulty", ["easy", "middle"])
def test_an_object_appears_in_the_frames_of_its_span_and_in_no_other(difficulty):
    for scene, event in plain_objects(difficulty, "appear", 8):
        area = pixels_of(render_frames(scene, size=96), scene.objects[event.actor].colour).sum((1, 2))
        inside = (scene.times >= event.start) & (scene.times <= event.end)
        assert (area[inside] > 100).all()
        assert (area[~inside] < 3).all()


@pytest.mark.parametrize("kind", list(MOVES))
def test_an_object_moves_in_its_span_only_and_in_the_direction_said(kind):
    for difficulty in ("easy", "middle"):
        for scene, event in plain_objects(difficulty, kind, 4):
            frames = render_frames(scene, size=96)
            shown = pixels_of(frames, scene.objects[event.actor].colour)
            rows, columns = np.indices(shown.shape[1:])
            weight = shown.sum((1, 2))
            path = np.stack([(columns * shown).sum((1, 2)) / weight, (rows * shown).sum((1, 2)) / weight], -1) / 96
            before, after = scene.times <= event.start, scene.times >= event.end
            assert np.ptp(path[before], axis=0).max() < 0.01
            assert np.ptp(path[after], axis=0).max() < 0.01
            along = path @ np.array(MOVES[kind])
            across = path @ np.abs(np.array(MOVES[kind])[::-1])
            assert along[after][0] - along[before][-1] >= 0.35
            assert np.ptp(across) < 0.01
            during = along[~before & ~after]
            assert (np.diff(during[::2]) > 0).all()  # every quarter of a second brings it on


@pytest.mark.parametrize(
    ("kind", "difficulty"), [("flash", "easy"), ("flash", "middle"), ("grow", "middle"), ("shrink", "hard")]
)
def test_an_object_looks_different_in_its_span_only(kind, difficulty):
    for scene, event in plain_objects(difficulty, kind, 6):
        frames = render_frames(scene, size=96)
        area = pixels_of(frames, scene.objects[event.actor].colour).sum((1, 2)).astype(float)
        inside = (scene.times >= event.start) & (scene.times <= event.end)
        area /= np.median(area[~inside])
        low, high = {"flash": (0, 0.25), "grow": (2.1, 3), "shrink": (0.05, 0.6)}[kind]
        assert (area[~inside] > 0.65).all()
        assert (area[~inside] < 1.4).all()
        assert (area[inside] >= low).all()
        assert (area[inside] <= high).all()


def test_flashing_is_seen_at_two_frames_per_second_whatever_their_phase():
    for scene, event in plain_objects("middle", "flash", 5):
        for phase in (0, 0.1, 0.125, 0.25, 0.4):
            looks = object_states(scene, np.arange(phase, scene.duration, 0.5))["flash"][event.actor]
            sampled = looks[looks > 0]
            assert len(sampled) >= 4
            assert (np.diff(sampled) != 0).all()


def test_shapes_and_colours_can_be_told_apart_at_48_pixels():
    scene = make_scene("hard", "train", 1)
    calm = dataclasses.replace(scene, difficulty="easy", events=(), distractors=())
    pictures = {}
    for colour in COLOURS:
        for shape in ("circle", "square", "triangle", "star", "cross", "ring"):
            thing = dataclasses.replace(scene.objects[0], colour=colour, shape=shape, radius=0.11, start=(0.5, 0.5))
            one = dataclasses.replace(calm, objects=(thing,))
            pictures[colour, shape] = render_frames(one, np.zeros(1), 48)[0].astype(float)
    keys = list(pictures)
    for place, key in enumerate(keys):
        for other in keys[:place]:
            different = (np.abs(pictures[key] - pictures[other]).max(-1) > 40).sum()
            assert different >= 12, (key, other)


def test_a_scene_looks_the_same_at_every_size():
    for difficulty in LEVELS:
        scene = make_scene(difficulty, "test", 2)
        times = np.array([1.0, 4.5, 7.0])
        small, large = render_frames(scene, times, 48), render_frames(scene, times, 192)
        shrunk = np.stack(
            [np.asarray(Image.fromarray(frame).resize((48, 48), Image.Resampling.BOX)) for frame in large]
        )
        assert np.abs(small.astype(float) - shrunk).mean() < (2 if difficulty == "easy" else 8)
    with pytest.raises(ValueError, match="size=8 is too small to draw shapes"):
        render_frames(scene, size=8)


def test_files_are_h264_with_true_times_and_nearly_the_rendered_pixels(tmp_path):
    for difficulty, size in (("easy", 128), ("middle", 96), ("hard", 64)):
        scene = make_scene(difficulty, "test", 0)
        path = write_video(scene, tmp_path / "new" / f"{difficulty}.mp4", size=size)
        frames, times, about = decode(path)
        assert about == ("h264", "yuv420p", scene.duration)
        np.testing.assert_allclose(times, scene.times, atol=1e-6)
        difference = np.abs(frames.astype(int) - render_frames(scene, size=size))
        assert difference.mean() < (3 if difficulty == "easy" else 8)
        assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")  # it can be streamed
        again = write_video(scene, tmp_path / "again.mp4", size=size)
        assert again.read_bytes() == path.read_bytes()
        assert [item.name for item in path.parent.glob(".*")] == []
    with pytest.raises(ValueError, match="Frames of 33x33 pixels are not yuv420p"):
        write_frames(np.zeros((2, 33, 33, 3), np.uint8), 8, tmp_path / "odd.mp4")
    with pytest.raises(ValueError, match="would be a video of 0 frames"):
        write_frames(np.zeros((0, 16, 16, 3), np.uint8), 8, tmp_path / "odd.mp4")
    assert not (tmp_path / "odd.mp4").exists()


def test_files_may_have_more_frames_per_second(tmp_path):
    config = ShapesConfig("easy", num_videos=1, size=48, file_fps=16)
    (row, *_) = load_rows(generate(config, tmp_path, progress=False))
    frames, times, _ = decode(row["video"])
    np.testing.assert_allclose(times, np.arange(row["duration"] * 16) / 16, atol=1e-6)
    plain = render_frames(make_scene("easy"), size=48)
    assert np.abs(frames[::2].astype(int) - plain).mean() < 4


# ---------------------------------------------------------------- questions have one answer


PHRASES = [  # how a reader understands the verbs, the more special ones first
    ("appear", r"appears?|shows? up|becomes? visible"),
    ("flash", r"flash(es)?|blinks?"),
    ("grow", r"(becomes?|turns?) big"),
    ("shrink", r"(becomes?|turns?) small"),
    ("move_left", r"(moves?|goes|go) (to the )?left"),
    ("move_right", r"(moves?|goes|go) (to the )?right"),
    ("move_up", r"(moves?|goes|go) (up|upwards)\b"),
    ("move_down", r"(moves?|goes|go) (down|downwards)\b"),
    ("move", r"moves?|changes? its place|goes|go"),
]
SUBJECT = re.compile(rf"\b(?:the|a) (?:({'|'.join(COLOURS)}) )?(circle|square|triangle|star|cross|ring|shape)\b")
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "top": (0, -1), "bottom": (0, 1)}


def understand(text):
    """(colour or None, shape or None, verb) of a sentence."""
    colour, shape = SUBJECT.search(text).groups() if SUBJECT.search(text) else (None, None)
    verb = next((kind for kind, phrase in PHRASES if re.search(rf"\b({phrase})(?!\w)", text)), None)
    return colour, None if shape == "shape" else shape, verb


def happening(scene, colour, shape, verb):
    return [
        event
        for event in scene.events
        if colour in (None, scene.objects[event.actor].colour)
        and shape in (None, scene.objects[event.actor].shape)
        and verb in (event.kind, event.kind.split("_")[0])
    ]


def check_choice(scene, row, stem, right):
    kind = f"{row['task']}/{row['source'].split('/')[2]}"
    colour, shape, verb = understand(stem)
    found = happening(scene, colour, shape, verb)
    if kind == "gvq/order":
        starts = {option: happening(scene, *understand(option)) for option in row["options"]}
        assert all(len(events) == 1 for events in starts.values())
        assert len({events[0].start for events in starts.values()}) == len(starts)
        assert right == min(starts, key=lambda option: starts[option][0].start)
        assert row["spans"] == [list(starts[right][0].span)]
        return
    if row["task"] == "gvq":
        assert row["spans"] == [list(event.span) for event in found]
    else:
        assert row["spans"] == row["question_spans"]
        ((start, end),) = row["question_spans"]
        found = [event for event in found if event.start < end and start < event.end]
    if kind == "gvq/count":
        assert right == ("never", "once", "twice", "three times")[len(found)]
    elif kind == "rar/position":
        (actor,) = [n for n, thing in enumerate(scene.objects) if (thing.colour, thing.shape) == (colour, shape)]
        states = object_states(scene, np.linspace(start, end, 9))
        assert states["visible"][actor].all()
        offset = states["centre"][actor] - 0.5
        assert np.ptp(offset, axis=0).max() == 0
        scores = {option: offset[0] @ np.array(DIRECTION[option]) for option in row["options"]}
        assert right == max(scores, key=scores.get)
        assert sorted(scores.values())[-1] - sorted(scores.values())[-2] > 0.09
    else:
        assert len({event.actor for event in found}) == 1
        thing = scene.objects[found[0].actor]
        if kind.endswith("motion"):
            assert len(found) == 1
            assert MOVES[found[0].kind] == DIRECTION[right]
        else:
            told = {"colour": thing.colour, "shape": thing.shape, "object": f"the {thing.colour} {thing.shape}"}
            assert right == told[kind.split("/")[1]]


@pytest.mark.parametrize(("difficulty", "split"), [*((level, "train") for level in LEVELS), ("middle", "heldout")])
def test_every_answer_is_what_a_reader_of_the_question_finds_in_the_scene(difficulty, split):
    seen = Counter()
    for scene, rows in iterate(ShapesConfig(difficulty, split, num_videos=80, rows_per_video=8, seed=2)):
        assert len({(row["task"], row["question"]) for row in rows}) == len(rows)
        for row in rows:
            validate_row(row)
            seen[row["task"]] += 1
            stem, _, listed = row["question"].partition(" Options: ")
            if row["task"] in CHOICE_TASKS:
                right = row["options"][row["correct_option"]]
                assert listed == " ".join(
                    f"({letter}) {option}" for letter, option in zip("ABCD", row["options"], strict=False)
                )
                letter = "ABCD"[row["correct_option"]]
                assert f"{right} ({letter.lower()})" in row["answer"].lower()  # the content, then the letter
                assert row["answer"].count("(") == 1
                check_choice(scene, row, stem, right)
            elif row["task"] == "dvc":
                assert row["spans"] == [list(event.span) for event in scene.events]
                said = re.findall(r"([^.,]+?) at <evi>", re.sub(r"(First,|Then|then|Finally,)", "", row["answer"]))
                for event, clause, caption in zip(scene.events, said, row["captions"], strict=True):
                    thing = scene.objects[event.actor]
                    assert understand(clause.lower()) == understand(caption) == (thing.colour, thing.shape, event.kind)
            else:
                found = happening(scene, *understand(stem))
                assert row["spans"] == [list(event.span) for event in found]
                assert len(found) <= (1 if row["task"] == "tvg" else 3)
                assert all(first.end < second.start for first, second in pairwise(found))
                about = understand(row["answer"].lower())
                assert about[2] in (None, understand(stem)[2])
                assert bool(re.search(r"never|no moment|not happen", row["answer"])) == (not found)
    assert set(seen) == set(TASK_WEIGHTS)


def test_held_out_pairs_occur_in_their_split_only():
    pairs = {f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS}
    assert {colour for colour, _ in HELD_OUT_PAIRS} == set(COLOURS)
    for split in SPLITS:
        for difficulty in LEVELS:
            for scene, rows in iterate(ShapesConfig(difficulty, split, num_videos=25, rows_per_video=6)):
                shown = {f"{thing.colour} {thing.shape}" for thing in scene.objects}
                text = json.dumps(
                    [[row[name] for name in ("question", "answer", "options", "captions")] for row in rows]
                )
                said = {" ".join(match) for match in SUBJECT.findall(text) if all(match) and match[1] != "shape"}
                if split == "heldout":
                    assert shown | said <= pairs
                else:
                    assert not (shown | said) & pairs
    seen = {name for pair in pairs_of("middle", "train") for name in pair}
    assert seen >= {name for pair in HELD_OUT_PAIRS for name in pair}


# ---------------------------------------------------------------- text alone tells nothing


@pytest.fixture(scope="module")
def choice_rows():
    config = ShapesConfig(num_videos=1100, rows_per_video=4, task_weights={"gvq": 1, "rar": 1})
    return [row for _, rows in iterate(config) for row in rows]


def kind_of(row):
    return f"{row['task']}/{row['source'].split('/')[2]}"


def template_of(row):
    stem = row["question"].partition(" Options:")[0]
    return re.sub(r"\b(circle|square|triangle|star)\b", "S", re.sub(rf"\b({'|'.join(COLOURS)})\b", "C", stem))


def frequent_content(rows, context, words):
    """How often each option (or word of one) is right where it is offered, by context; returns a scorer of options."""
    right, offered = Counter(), Counter()
    for row in rows:
        for place, option in enumerate(row["options"]):
            for unit in option.split() if words else [option]:
                offered[context(row), unit] += 1
                right[context(row), unit] += place == row["correct_option"]

    def score(row, place):
        units = row["options"][place].split() if words else [row["options"][place]]
        chance = 1 / len(row["options"])
        return sum(
            math.log((right[context(row), unit] + 4 * chance) / (offered[context(row), unit] + 4)) for unit in units
        )

    return score


def most_frequent_letter(rows):
    letters = Counter((len(row["options"]), row["correct_option"]) for row in rows)
    return lambda row, place: letters[len(row["options"]), place]


def shared_words(rows):
    return lambda row, place: sum(
        word in option.split() for word in row["options"][place].split() for option in row["options"]
    )


BLIND = {
    "letter": most_frequent_letter,
    "words shared among the options": shared_words,
    "content by kind": lambda rows: frequent_content(rows, kind_of, words=False),
    "words by kind": lambda rows: frequent_content(rows, kind_of, words=True),
    "content by template": lambda rows: frequent_content(
        rows, lambda row: (kind_of(row), template_of(row)), words=False
    ),
    "words by template": lambda rows: frequent_content(rows, lambda row: (kind_of(row), template_of(row)), words=True),
}


@pytest.mark.parametrize("name", list(BLIND))
def test_blind_predictors_stay_within_three_points_of_chance(choice_rows, name):
    assert len(choice_rows) >= 4000
    half = len(choice_rows) // 2
    gains = []
    for known, asked in ((choice_rows[:half], choice_rows[half:]), (choice_rows[half:], choice_rows[:half])):
        score = BLIND[name](known)
        for row in asked:
            scores = [score(row, place) for place in range(len(row["options"]))]
            best = [place for place, value in enumerate(scores) if value == max(scores)]
            gains.append((row["correct_option"] in best) / len(best) - 1 / len(row["options"]))
    assert np.mean(gains) < MARGIN


def test_right_letters_and_contents_are_balanced(choice_rows):
    by_kind = defaultdict(list)
    for row in choice_rows:
        by_kind[kind_of(row)].append(row)
    assert set(by_kind) == {kind for kind in language.QUESTIONS if "/" in kind}
    four = [row for row in choice_rows if len(row["options"]) == 4]
    letters = np.bincount([row["correct_option"] for row in four]) / len(four)
    np.testing.assert_allclose(letters, 0.25, atol=MARGIN)
    for kind, rows in by_kind.items():
        assert len(rows) > 150
        if kind in ("gvq/order", "rar/object"):  # free text
            continue
        contents = Counter(row["options"][row["correct_option"]] for row in rows)
        share = 1 / len(contents)
        tolerance = 3.5 * math.sqrt(share * (1 - share) / len(rows))
        assert all(abs(count / len(rows) - share) < tolerance for count in contents.values()), (kind, contents)


def test_a_tenth_of_the_grounding_rows_asks_for_nothing_and_the_text_does_not_tell():
    config = ShapesConfig(num_videos=1300, rows_per_video=2, task_weights={"tvg": 0.5, "tal": 0.5}, seed=1)
    rows = [row for _, rows in iterate(config) for row in rows]
    absent = np.array([not row["spans"] for row in rows])
    assert abs(absent.mean() - 0.1) < 0.015
    half = len(rows) // 2
    for units in (lambda row: set(row["question"].split()), lambda row: {template_of(row)}):
        seen, total = [Counter(), Counter()], np.bincount(absent[:half].astype(int))
        for row, none in zip(rows[:half], absent[:half], strict=True):
            seen[int(none)].update(units(row))
        scores = np.array(
            [
                sum(
                    math.log((seen[1][u] + 1) / (total[1] + 2)) - math.log((seen[0][u] + 1) / (total[0] + 2))
                    for u in units(row)
                )
                for row in rows[half:]
            ]
        )
        yes, no = scores[absent[half:]][:, None], scores[~absent[half:]]
        area = ((yes > no) + 0.5 * (yes == no)).mean()
        assert abs(area - 0.5) < 0.06


def test_the_language_is_small_but_varied():
    rows = [row for _, rows in iterate(ShapesConfig(num_videos=400)) for row in rows]
    text = [row[name] for row in rows for name in ("question", "answer")]
    words = {word for sentence in text for word in re.findall(r"[a-z]+", sentence.replace(EVIDENCE_TOKEN, "").lower())}
    assert len(words) <= 250
    assert len({row["question"] for row in rows}) > 0.7 * len(rows)
    for task in ("tvg", "tal"):
        found = Counter(
            template_of({"question": row["answer"]}) for row in rows if row["task"] == task and row["spans"]
        )
        assert len(found) > 40
        assert found.most_common(1)[0][1] < 0.5 * sum(found.values())


# ---------------------------------------------------------------- rows, files, controls


def test_tasks_and_kinds_come_in_the_shares_asked_for():
    rows = [
        row
        for _, rows in iterate(ShapesConfig(num_videos=200, task_weights={"rar/position": 1, "rar/motion": 1}))
        for row in rows
    ]
    kinds = Counter(kind_of(row) for row in rows)
    assert set(kinds) == {"rar/position", "rar/motion"}
    assert min(kinds.values()) > 100
    rows = [row for _, rows in iterate(ShapesConfig(num_videos=400, rows_per_video=2)) for row in rows]
    tasks = Counter(row["task"] for row in rows)
    for task, weight in TASK_WEIGHTS.items():
        assert abs(tasks[task] / len(rows) - weight) < 0.06
    assert {row["source"].split("/")[0] for row in rows} == {"shapes"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"difficulty": "simple"},
            r"Unknown difficulty 'simple': the shapes world has three levels\. Use one of \['easy'",
        ),
        ({"split": "dev"}, r"Unknown split 'dev': every split has its own random seeds\. Use one of \['train'"),
        ({"seed": -1}, "seed=-1 make no random seed: both must be 0 or more"),
        ({"file_fps": 12}, "file_fps=12 would put events between two frames"),
        ({"num_videos": 0}, "leave nothing to generate"),
        ({"absent_share": 1.5}, "absent_share=1.5 is no share of the questions"),
        ({"task_weights": {"tvq": 1}}, "'tvq': 1, which is no task with a weight of 0 or more"),
        ({"task_weights": {"tvg": -1}}, "'tvg': -1, which is no task with a weight of 0 or more"),
        ({"task_weights": {}}, "no task can be drawn"),
    ],
)
def test_wrong_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**settings)


def test_the_share_of_events_that_do_not_occur_can_be_chosen():
    for share in (0.0, 1.0):
        config = ShapesConfig(num_videos=20, task_weights={"tvg": 1, "tal": 1}, absent_share=share)
        rows = [row for _, rows in iterate(config) for row in rows]
        assert rows
        assert {not row["spans"] for row in rows} == {bool(share)}


def test_streams_of_random_numbers_are_apart():
    draws = [scene_rng("easy", "train", 0, 0, stream).random() for stream in (0, 1)]
    assert draws[0] != draws[1]


def test_blind_controls_swap_videos_of_like_length_or_blacken_them(tmp_path):
    rows = [row for _, rows in iterate(ShapesConfig(num_videos=40)) for row in rows]
    controls = blind_controls(rows, seed=0, folder=tmp_path)
    lengths = {row["video"]: row["duration"] for row in rows}
    gaps = []
    for row, swapped, black in zip(rows, controls["swapped"], controls["black"], strict=True):
        assert {**swapped, "video": row["video"]} == {**black, "video": row["video"]} == row
        assert swapped["video"] != row["video"]
        gaps.append(abs(lengths[swapped["video"]] - row["duration"]))
    assert np.median(gaps) == 0
    assert len({row["video"] for row in controls["swapped"]}) == len(lengths) - 1  # one of the longest is taken twice
    given = [(row, span) for row in controls["swapped"] for span in row["question_spans"]]
    assert given
    assert all(end <= lengths[row["video"]] for row, (_, end) in given)
    frames, times, _ = decode(controls["black"][0]["video"])
    assert frames.max() < 3
    assert len(times) == rows[0]["duration"] * FILE_FPS
    assert "black" not in blind_controls(rows)
    assert blind_controls(rows, seed=1)["swapped"] != controls["swapped"]
    with pytest.raises(ValueError, match="Videos cannot be swapped between rows of 1 video"):
        blind_controls(rows[:1])


def test_the_best_constant_span_is_the_best_of_all_and_poor():
    rows = [row for _, rows in iterate(ShapesConfig(num_videos=150, task_weights={"tvg": 1})) for row in rows]
    start, end, score = best_constant_span(rows)

    def mean_iou(low, high):
        total = []
        for row in rows:
            if row["spans"]:
                (first, last), length = row["spans"][0], row["duration"]
                meet = max(0.0, min(last, high * length) - max(first, low * length))
                total.append(meet / (max(last, high * length) - min(first, low * length)) if meet else 0.0)
        return sum(total) / len(total)

    assert mean_iou(start, end) == pytest.approx(score)
    assert all(mean_iou(low / 10, high / 10) <= score + 1e-9 for low in range(10) for high in range(low + 1, 11))
    assert 0.1 < score < 0.4
    with pytest.raises(ValueError, match="None of 1 rows has exactly one span"):
        best_constant_span([{"spans": [], "duration": 3.0}])


def test_contact_sheets_show_a_scene_or_a_file(tmp_path):
    scene = make_scene("middle", "train", 0)
    rows = make_rows(scene)
    sheet = np.asarray(Image.open(contact_sheet(scene, rows, tmp_path / "scene.png")))
    assert sheet.shape[1] == 12 * 128
    np.testing.assert_array_equal(sheet[:128, :128], render_frames(scene, np.zeros(1))[0])
    actor = scene.events[0].actor
    bars = pixels_of(sheet[None, 160:], scene.objects[actor].colour)[0]
    columns = np.flatnonzero(bars.sum(0) >= 3) / sheet.shape[1] * scene.duration
    assert columns.min() == pytest.approx(min(e.start for e in scene.events if e.actor == actor), abs=0.05)
    video = write_video(scene, tmp_path / "a.mp4")
    of_file = np.asarray(Image.open(contact_sheet(video, rows, tmp_path / "deep" / "file.png", num_frames=6)))
    assert of_file.shape[1] == 6 * 128
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    with pytest.raises(ValueError, match="holds no picture that can be decoded"):
        contact_sheet(tmp_path / "sound.wav", rows, tmp_path / "none.png")


@pytest.mark.parametrize("embed", [True, False])
def test_the_builder_goes_through_datasets(tmp_path, embed):
    builder = ShapesBuilder(
        cache_dir=str(tmp_path / "cache"),
        num_videos={"train": 3, "heldout": 2},
        difficulty="easy",
        size=32,
        embed=embed,
        folder=str(tmp_path / "files"),
    )
    builder.download_and_prepare()
    data = builder.as_dataset().cast_column("video", datasets.Video(decode=False))
    data.save_to_disk(str(tmp_path / "saved"))
    again = datasets.load_from_disk(str(tmp_path / "saved"))
    for split, count in (("train", 3), ("heldout", 2)):
        expected = [row for _, rows in iterate(ShapesConfig("easy", split, count)) for row in rows]
        assert bool(data[split][0]["video"]["bytes"]) == embed
        for row, wanted in zip(again[split], expected, strict=True):
            validate_row(row)
            assert {**row, "video": None} == {**wanted, "video": None}
    decoded = again["heldout"].cast_column("video", datasets.Video())[0]["video"]
    assert decoded.metadata.num_frames == expected[0]["duration"] * FILE_FPS
