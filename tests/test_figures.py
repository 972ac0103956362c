# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The timeline picture: what stands in it, where, and in which colour; and that its text keeps inside its lines."""

import builtins
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread

from d2vlm_hf.figure_text import font_of, measure, wrap
from d2vlm_hf.figures import PALETTE, timeline


def make_result(spans, duration=10.0, frames=20, peak=0.9):
    """A result as the pipeline gives it: `spans` found, each named in the answer."""
    times = np.arange(frames) * duration / frames
    evidence, references, answer = [], [], "It happens"
    for k, (start, end) in enumerate(spans):
        evidence.append({"start": start, "end": end, "score": 0.9 - 0.1 * k})
        stamp = f"{start:.1f}s - {end:.1f}s"
        answer += " at "
        place = {"char_start": len(answer), "char_end": len(answer) + len(stamp), "evidence": k}
        references.append(evidence[-1] | place)
        answer += stamp
    curves = [(peak * ((times >= start) & (times <= end))).tolist() for start, end in spans]
    return {
        "answer": answer + ".",
        "evidence": evidence,
        "references": references,
        "fps": frames / duration,
        "duration": duration,
        "times": times.tolist(),
        "curves": curves,
    }


def make_frames(count, height=12, width=16):
    """Frames that show their own number as their brightness."""
    return np.repeat(np.arange(count, dtype=np.uint8), height * width * 3).reshape(count, height, width, 3)


def axes_of(figure, gid):
    return next((axes for axes in figure.axes if axes.get_gid() == gid), None)


def bars(figure, lane="found"):
    patches = axes_of(figure, lane).patches
    return sorted((p for p in patches if str(p.get_gid()).startswith("bar-")), key=lambda p: p.get_gid())


def texts(figure):
    return [text.get_text() for text in figure.texts]


def marked(figure):
    """Colour of each coloured patch of text, legend first."""
    return [to_hex(p.get_facecolor()) for p in figure.artists if str(p.get_gid()).startswith("reference-")]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_every_event_has_a_bar_a_curve_and_its_colour_in_the_answer(count):
    spans = [(1.5 * k, 1.5 * k + 1.0) for k in range(count)]
    result = make_result(spans)
    figure = timeline(result, make_frames(20), question="When does it happen?")
    found = bars(figure)
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in found] == spans
    colours = [colour.lower() for colour in PALETTE[:count]]
    assert [to_hex(bar.get_facecolor()) for bar in found] == colours
    curves = [line for line in axes_of(figure, "curves").lines if str(line.get_gid()).startswith("curve-")]
    assert [to_hex(line.get_color()) for line in curves] == colours
    for line, curve in zip(curves, result["curves"], strict=True):
        assert line.get_xydata().tolist() == np.column_stack([result["times"], curve]).tolist()
    assert marked(figure) == colours * 2, "the legend, then the answer"
    for k, (start, end) in enumerate(spans):
        assert f"{start:.1f}s - {end:.1f}s" in texts(figure)
        assert f"{k + 1}: {start:.1f}s - {end:.1f}s, score {0.9 - 0.1 * k:.2f}" in texts(figure)
    assert "When does it happen?" in texts(figure)


def test_no_event_is_said_and_leaves_no_empty_curves():
    result = make_result([]) | {"answer": "The circle does not appear."}
    figure = timeline(result, make_frames(20), truth=[])
    assert bars(figure) == []
    assert axes_of(figure, "curves") is None
    assert axes_of(figure, "times").get_xlim() == (0.0, 10.0)
    assert {"no moment of the video was found", "no event annotated", "The circle does not appear."} <= set(
        texts(figure)
    )


def test_annotated_moments_are_grey_bars_on_the_same_axis():
    figure = timeline(make_result([(1.0, 4.0)]), truth=[(1.5, 4.5), (8.0, 12.0)])
    grey = bars(figure, "annotated")
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in grey] == [(1.5, 4.5), (8.0, 12.0)]
    assert {to_hex(bar.get_facecolor()) for bar in grey} == {"#9a9a9a"}
    ends = {axes.get_xlim() for axes in figure.axes}
    assert ends == {(0.0, 12.0)}, "all share the times, the latest end included"
    assert bars(timeline(make_result([(1.0, 4.0)]))) != []
    assert axes_of(timeline(make_result([(1.0, 4.0)])), "annotated") is None


def test_overlapping_spans_lie_below_each_other():
    figure = timeline(make_result([(0.0, 5.0), (4.0, 8.0), (5.0, 6.0), (9.0, 10.0)]))
    lanes = [round(bar.get_y() / 0.24) for bar in bars(figure)]
    assert lanes == [0, 1, 0, 0]


def test_a_hundred_moments_leave_a_picture_of_a_page():
    figure = timeline(make_result([(0.0, 9.0 + k / 100) for k in range(100)]))
    assert figure.get_figheight() < 10
    assert len(bars(figure)) == 100
    assert len(axes_of(figure, "found").texts) == 0
    assert "and 76 more" in texts(figure)


def test_numbers_of_short_bars_stand_beside_them_and_inside_the_picture():
    figure = timeline(make_result([(2.0, 2.0), (9.95, 10.0), (4.0, 8.0)], duration=10.0))
    axes = axes_of(figure, "found")
    assert {t.get_text(): t.get_ha() for t in axes.texts} == {"1": "left", "2": "right", "3": "center"}
    assert all(0 <= t.get_position()[0] <= 10 for t in axes.texts)
    assert bars(figure)[0].get_width() > 0, "an instant can be seen too"


@pytest.mark.parametrize(("count", "shown"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (14, [1, 3, 5, 7, 9, 11, 13])])
def test_strip_shows_as_many_frames_as_fit_with_their_times(count, shown):
    times = np.arange(count) * 10.0 / count
    figure = timeline(make_result([(1.0, 2.0)]), make_frames(count, 72, 96), times)
    images = axes_of(figure, "strip").images
    assert [int(image.get_array()[0, 0, 0]) for image in images] == shown
    assert [text for text in texts(figure) if text in {f"{time:.1f}s" for time in times}] == [
        f"{times[number]:.1f}s" for number in shown
    ]


def test_strip_of_a_long_video_spans_all_of_it():
    frames, times = make_frames(250, 72, 96), np.arange(250) * 2.0
    result = make_result([(30.0, 200.0)], duration=500.0, frames=250)
    strip = axes_of(timeline(result, frames, times), "strip")
    seconds = [2.0 * int(image.get_array()[0, 0, 0]) for image in strip.images]
    assert len(seconds) == 7
    # each is on screen in the middle of its seventh
    assert np.abs(np.array(seconds) - (np.arange(7) + 0.5) * 500 / 7).max() <= 2.0


def test_frames_may_be_tensors_with_channels_first_and_take_their_times_from_the_result():
    result = make_result([(1.0, 2.0)], frames=5)
    frames = torch.from_numpy(make_frames(5)).permute(0, 3, 1, 2)
    strip = axes_of(timeline(result, frames), "strip")
    assert [image.get_array().shape for image in strip.images] == [(12, 16, 3)] * 5
    for image in strip.images:
        left, right, bottom, top = image.get_extent()
        assert (right - left) / (top - bottom) == pytest.approx(16 / 12), "not distorted"


def test_results_without_curves_are_drawn_without():
    result = make_result([(1.0, 2.0)])
    del result["curves"], result["times"]
    figure = timeline(result)
    assert axes_of(figure, "curves") is None
    assert len(bars(figure)) == 1


def test_a_reference_to_nothing_that_is_shown_is_grey():
    result = make_result([(1.0, 2.0)])
    result["references"][0]["evidence"] = None
    assert marked(timeline(result)) == [PALETTE[0].lower(), "#9a9a9a"]


def test_low_curves_still_show_where_the_model_looks():
    low = axes_of(timeline(make_result([(1.0, 2.0)], peak=0.05)), "curves")
    high = axes_of(timeline(make_result([(1.0, 2.0)], peak=0.9)), "curves")
    assert low.get_ylim()[1] == pytest.approx(1.05 * 1.15 * 0.05)
    assert [label.get_text() for label in low.get_yticklabels()] == ["0", "0.05"]
    assert high.get_ylim()[1] == pytest.approx(1.05)


def test_a_long_answer_makes_the_picture_higher_and_stays_inside():
    short, result = make_result([(1.0, 2.0)]), make_result([(1.0, 2.0)])
    result["answer"] += " It costs $5 and $6 to say so." * 20 + " " + "x" * 300
    figure = timeline(result)
    assert figure.get_figheight() > timeline(short).get_figheight() + 1
    assert figure.get_figwidth() == 10
    page = figure.bbox
    for text in figure.texts:
        with matplotlib.rc_context({"text.hinting": "none"}):  # as the figure itself draws it
            box = text.get_window_extent()
        assert box.x0 >= page.x0, text.get_text()
        assert box.x1 <= page.x1, text.get_text()
        assert box.y0 >= page.y0, text.get_text()
        assert box.y1 <= page.y1, text.get_text()
    assert any("$5 and $6" in text for text in texts(figure)), "no formula"


def test_width_is_kept_and_an_empty_answer_said():
    figure = timeline(make_result([(1.0, 2.0)]) | {"answer": " ", "references": []}, make_frames(20), width=5.0)
    assert figure.get_figwidth() == 5
    assert "(the answer is empty)" in texts(figure)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_file_is_written(tmp_path, suffix):
    path = tmp_path / f"timeline{suffix}"
    timeline(make_result([(1.0, 2.0)]), make_frames(20), path=path)
    assert path.stat().st_size > 2000


def test_png_is_the_same_for_the_same_input_whatever_the_style(tmp_path):
    result, files = make_result([(1.0, 2.0), (3.0, 7.5)]), []
    for number in range(2):
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"} if number else {}):
            files.append(tmp_path / f"{number}.png")
            timeline(result, make_frames(20), question="When?", path=files[-1])
            assert matplotlib.rcParams["font.size"] == (30 if number else 10), "nobody else's style is changed"
    assert files[0].read_bytes() == files[1].read_bytes()
    height, width, _ = imread(files[0]).shape
    assert width == 1200
    assert height > 400


# ---- text ------------------------------------------------------------------------------------------------------------


def test_words_are_wrapped_and_no_character_is_lost():
    font = font_of(10)
    words = "a quick brown fox jumps over the lazy dog " * 10
    lines = wrap([(words, None)], 2.0, font)
    assert " ".join(run.text for line in lines for run in line) == words.strip()
    assert all(len(line) == 1 for line in lines), "neighbours are one run, with the font's own spacing"
    assert all(line[-1].x + line[-1].width <= 2.0 for line in lines)
    greedy = [measure(f"{a[0].text} {b[0].text.split()[0]}", font) for a, b in pairwise(lines)]
    assert min(greedy) > 2.0, "the next word would not have fitted"


def test_coloured_pieces_stay_whole_and_punctuation_stays_with_them():
    lines = wrap([("It is seen at ", None), ("12.0s - 15.0s", 0), (".", None)], 1.2, font_of(10))
    runs = [[(run.text, run.event) for run in line] for line in lines]
    assert runs == [[("It is seen at", None)], [("12.0s - 15.0s", 0), (".", None)]]
    assert lines[1][1].x == pytest.approx(lines[1][0].width)


def test_a_word_wider_than_the_line_is_cut():
    lines = wrap([("see " + "W" * 50, None)], 1.0, font_of(10))
    assert "".join(run.text for line in lines for run in line).replace(" ", "") == "see" + "W" * 50
    assert all(line[-1].x + line[-1].width <= 1.01 for line in lines)


@pytest.mark.parametrize(("text", "lines"), [("", [""]), ("one\ntwo", ["one", "two"]), ("a\n\n\nb\n", ["a", "b"])])
def test_line_breaks_are_kept(text, lines):
    wrapped = wrap([(text, None)], 5.0, font_of(10))
    assert ["".join(run.text for run in line) for line in wrapped] == lines


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"answer": None}, {}, r"not \['answer'\], so it cannot be drawn"),
        ({"duration": 0.0}, {}, "duration=0.0 of the result is no length of a video"),
        ({"curves": [[0.5] * 3]}, {}, r"curves of lengths \[3\] for 1 pieces of evidence and 20 times"),
        ({"curves": []}, {}, r"curves of lengths \[\] for 1 pieces of evidence"),
        (
            {},
            {"frames": np.zeros((4, 5, 5)), "times": range(4)},
            r"shape \(4, 5, 5\) and dtype float64, so it is no list of colour",
        ),
        ({}, {"frames": make_frames(3)}, r"3 frames came with times of shape \(20,\): each frame needs one"),
        ({}, {"width": 1.0}, "width=1.0 leaves no room for text"),
        ({}, {"path": "timeline.docx"}, "timeline.docx has no ending that says its format"),
        ({}, {"path": "gone/timeline.png"}, "cannot be written to gone/timeline.png"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path, monkeypatch, changes, options, message):
    monkeypatch.chdir(tmp_path)
    result = {key: value for key, value in (make_result([(1.0, 2.0)]) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        timeline(result, **options)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def failing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(ImportError, match=r"matplotlib draws the timeline and is not installed.*d2vlm-hf\[eval\]"):
        timeline(make_result([(1.0, 2.0)]))
