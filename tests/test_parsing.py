# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Reading of predictions under each protocol, against what the published scripts read, and rule by rule."""

import time

import pytest
from evaluation_helpers import golden, mismatches

from d2vlm_hf.evaluation.parsing import (
    answer_windows,
    dashed_windows,
    option_letter,
    parse_structured,
    parse_text,
    prediction_text,
)


SAMPLES = [entry for group in ("samples", "crashing") for entry in golden("etbench.json")[group]]
PARSES = [(entry, reader) for entry in SAMPLES for reader in entry["parse"]]


def as_floats(windows):
    return None if windows is None else [[float(start), float(end)] for start, end in windows]


def as_lists(windows):
    return [list(window) for window in windows] or None


def read_as(reader, task, text):
    """What we read, in the shape in which the golden values say what a published reader returned."""
    protocol = "etbench_whole" if reader == "etchat_parse" else "d2vlm"
    if task in ("dvc", "slc"):
        parsed = parse_text(task, text, protocol)
        parts = [as_lists(parsed.windows), list(parsed.captions) or None, as_lists(parsed.evidence)]
        return parsed, parts[: 2 if protocol == "etbench_whole" else 3]
    if reader.startswith("tvg_format_old"):
        parsed = parse_text("vhd", text, protocol)
        return parsed, as_lists(parsed.windows if "answer" in reader else parsed.evidence)
    parsed = parse_text("tvg", text, protocol)
    windows = [as_lists(parsed.windows), as_lists(parsed.evidence)]
    return parsed, windows if protocol == "d2vlm" else windows[0]


def wanted_of(reader, task, value):
    if task in ("dvc", "slc"):
        parts = [as_floats(value[0]), value[1], as_floats(value[2]) or None if len(value) > 2 else None]
        return parts[: 2 if reader == "etchat_parse" else 3]
    return [as_floats(part) for part in value] if reader == "tvg_format(answer,evidence)" else as_floats(value)


def test_every_golden_parse_is_met():
    faults, compared = [], 0
    for entry, reader in PARSES:
        task, text, value = entry["sample"]["task"], entry["sample"]["a"], entry["parse"][reader]
        if task in ("rar", "eca", "rvq"):
            assert value is None
            continue
        parsed, found = read_as(reader, task, text)
        compared += 1
        if isinstance(value, dict):  # the published reader raises
            faults += [] if "crash of the published script" in (parsed.reason or "") else [entry["case"]]
        elif task in ("dvc", "slc") and value[0] is None:
            faults += [] if parsed.reason else [entry["case"]]
        else:
            faults += mismatches(wanted_of(reader, task, value), found, f"{entry['case']}/{reader}")
    assert not faults, "\n".join(faults)
    assert compared == 102


@pytest.mark.parametrize(
    ("text", "windows"),
    [
        ("from 10 - 12 and 14.5-16", [(10, 12), (14.5, 16)]),
        ("-3 - 5", [(3, 5)]),
        ("5-10-15", [(5, 10)]),
        ("00:10 - 00:25", [(0, 10)]),
        ("10 – 12", []),  # an en dash is no hyphen
        ("20 - 10", [(10, 20)]),
        ("from 9.5 to 20.5 s", [(9.5, 20.5)]),
        ("12s to 15s", []),
        ("it starts at 3! it ends at 00:00:07", [(0, 3)]),
        ("it starts at 3.5s and ends at 7", []),  # one sentence, one number
        ("my friend came at 4\nit happens at 9\nthe end is 11", [(4, 9)]),  # an odd last number is dropped
        ("a man at 4\na dog at 9", []),
        ("", []),
    ],
)
def test_windows_of_an_answer(text, windows):
    assert answer_windows(text) == windows


def test_dots_after_a_number():
    assert dashed_windows("10 - 12.") == [(10, 12)]
    assert answer_windows("10... - 12...", cut_dots=True) == [(10, 12)]
    assert answer_windows("10 to 12...", cut_dots=True) == [(10, 12)]
    for text in ("10 - 12...", "1..5 - 3"):
        with pytest.raises(ValueError, match="could not convert string to float"):
            answer_windows(text)


def test_long_runs_of_digits_cost_no_time():
    start = time.perf_counter()
    assert answer_windows("9" * 50_000) == []
    assert parse_text("dvc", "</evi>" + "1." * 20_000, "d2vlm").reason
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("protocol", "text", "windows", "evidence", "reason"),
    [
        ("d2vlm", "1 - 2 </EVI> 3 - 4 </evi> 5 - 6", ((5, 6),), ((1, 2),), None),
        ("d2vlm", "9 - 2 </evi>5 - 6", ((5, 6),), ((9, 2),), None),  # evidence stays as written
        ("d2vlm", "1 to 2 </evi>5 - 6", ((5, 6),), (), None),  # evidence knows only the hyphen
        ("d2vlm", "5 - 6", (), (), "no </evi>"),
        ("d2vlm", "1 - 2 </evi>never", (), ((1, 2),), "no window in the answer"),
        ("etbench", "1 - 2 </evi>5 - 6, 7 - 8", ((5, 6), (7, 8)), (), None),
        ("etbench", "5 - 6", ((5, 6),), (), None),
        ("etbench_whole", "1 - 2 </evi>5 - 6", ((1, 2), (5, 6)), (), None),
    ],
)
def test_windows_of_a_prediction(protocol, text, windows, evidence, reason):
    parsed = parse_text("tvg", text, protocol)
    assert (parsed.windows, parsed.evidence, parsed.reason) == (windows, evidence, reason)


def test_a_crash_of_the_published_script_is_a_reason():
    parsed = parse_text("tal", "</evi>3 - 4..5", "d2vlm")
    assert parsed.reason.startswith("crash of the published script: could not convert")
    assert parse_text("gvq", "</evi>(A) 3 - 4..5", "d2vlm").window_reason.startswith("crash of the published script")


@pytest.mark.parametrize(
    ("protocol", "text", "windows", "reason"),
    [
        ("d2vlm", "1 - 2 </evi>at 12.5 s", (), "no window in the answer"),
        ("d2vlm", "1 - 2 </EVI>4 - 6", (), "no </evi>"),  # case matters here
        ("d2vlm", "x</evi>y</evi>4 - 6", ((4, 6),), None),
        ("etbench", "1 - 2 </evi>at 12.5 s", ((12.5, 12.5),), None),
        ("etbench", "</evi>soon", (), "no number in the answer"),
    ],
)
def test_a_highlight(protocol, text, windows, reason):
    parsed = parse_text("vhd", text, protocol)
    assert (parsed.windows, parsed.reason) == (windows, reason)


@pytest.mark.parametrize(
    ("protocol", "text", "options", "lettered"),
    [
        ("d2vlm", "1 - 2</evi>(B) a dog", (1,), True),
        ("d2vlm", "</evi>b", (1,), True),
        ("d2vlm", "</evi>Best option: (C), a cat", (2,), True),
        ("d2vlm", "</evi> Best option: (C), a cat", (), False),  # a leading space defeats the prefix
        ("d2vlm", "</evi>  ( D) x", (3,), True),
        ("d2vlm", "</evi>A man sits", (0,), True),
        ("d2vlm", "</evi>(F) x", (), True),
        ("d2vlm", "</evi>dog (B)", (), False),
        ("d2vlm", "b, without delimiter", (1,), True),
        ("etbench", "</evi>the answer is (B)", (1,), True),  # brackets count anywhere
        ("etbench", "</evi>A (B)", (1, 0), True),
        ("etbench", "</evi>the answer is (b)", (), False),
        ("etbench", "3.0 s, I think", (), True),  # the form of a letter, though none
    ],
)
def test_the_letter_of_a_choice(protocol, text, options, lettered):
    parsed = parse_text("rar", text, protocol)
    assert (parsed.options, parsed.lettered) == (options, lettered)


def test_a_choice_without_answer_fails():
    assert parse_text("rar", "1 - 2 </evi>  ( ", "d2vlm").reason == "no answer"
    assert parse_text("rvq", "</evi>E.", "d2vlm", option_count=5).options == (4,)
    assert parse_text("rvq", "</evi>E.", "d2vlm", option_count=4).options == ()


def test_a_choice_with_a_window():
    parsed = parse_text("gvq", "7 - 8 </evi>(B) a dog, at 5 - 6.", "d2vlm")
    assert (parsed.options, parsed.windows, parsed.evidence, parsed.window_reason) == ((1,), ((5, 6),), ((7, 8),), None)
    assert parse_text("gvq", "(B) at 5 - 6", "d2vlm").window_reason == "no </evi>"
    assert parse_text("gvq", "</evi>the (B)", "etbench").options == ()  # brackets do not count for gvq


@pytest.mark.parametrize(
    ("text", "windows", "captions"),
    [
        ("</evi>1 - 2 seconds, Cut it. 4 - 3 seconds, Fry it..", ((1, 2), (3, 4)), ("cut it.", "fry it")),
        ("</evi>1 - 2, cut\n3 - 4, fry it", ((1, 2),), ("fry it",)),  # "cut" is too short, and its window is taken
        (
            "</evi>Start time: 1s\nEnd time: 2s\n* cut the bread\nstarting time: 3\nending time: 5\n* fry the egg",
            ((1, 2), (3, 5)),
            ("cut the bread", "fry the egg"),
        ),
        ("</evi>Cut it at 1:10 please\nFry it at 3", ((50, 90),), ("</evi>Cut it at 1:10 please",)),
        ("</evi>Between 30 and 45 he cuts", ((30, 45),), ("</evi>Between 30 and 45 he cuts.",)),
        ("</evi>Something. At 50 he cuts", ((30, 70),), ("At 50 he cuts.",)),
        ("</evi>At 15 he cuts it", ((15, 55),), ("</evi>At 15 he cuts it.",)),
    ],
)
def test_timed_captions(text, windows, captions):
    parsed = parse_text("dvc", text, "d2vlm")
    assert (parsed.windows, parsed.captions, parsed.reason) == (windows, captions, None)


def test_captions_that_cannot_be_read():
    assert parse_text("dvc", "1 - 2, cut the bread", "d2vlm").reason == "no </evi>"
    assert parse_text("slc", "</evi>nothing happens", "d2vlm").reason == "no timed caption in the answer"
    assert "start time x, end time y" in parse_text("slc", "</evi>start time 3, end time 9 chop", "d2vlm").reason
    assert parse_text("dvc", "9 - 3 </evi>1 - 2 cut the bread</evi>7 - 8 no more", "d2vlm").evidence == ((9, 3),)
    # dots inside numbers: the piece is passed over
    assert parse_text("dvc", "</evi>at 1..5 or 2..5 he cuts\nat 60 he eats", "etbench").windows == ((40, 80),)


def test_unknown_protocols_and_tasks():
    with pytest.raises(ValueError, match="under which no text is read; use one of"):
        parse_text("tvg", "1 - 2", "clean")
    with pytest.raises(ValueError, match="for which no reading is defined; use one of"):
        parse_text("vqa", "1 - 2", "d2vlm")


EVIDENCE = [{"start": 5.0, "end": 6.0, "score": 0.4}, {"start": 1.0, "end": 2.0, "score": 0.9}]


def test_a_structured_prediction():
    references = [{"start": 1.0, "end": 2.0, "char_start": 0, "char_end": 11}]
    parsed = parse_structured({"answer": "(B) yes", "evidence": EVIDENCE, "references": references}, ["no", "yes"])
    assert parsed.evidence == ((1.0, 2.0), (5.0, 6.0))  # the surest first, whatever the order
    assert parsed.scores == (0.9, 0.4)
    assert (parsed.windows, parsed.options, parsed.references, parsed.reason) == (((1.0, 2.0),), (1,), True, None)
    assert parse_structured({"answer": "x", "evidence": EVIDENCE[::-1]}) == parse_structured(
        {"answer": "x", "evidence": EVIDENCE}
    )
    assert parse_structured({"answer": "", "evidence": EVIDENCE, "captions": ["b", "a"]}).captions == ("a", "b")
    assert parse_structured({"answer": "(A)", "option": 1}, ["no", "yes"]).options == (1,)
    assert parse_structured({"answer": "", "evidence": [{"start": 1, "end": 2, "score": None}]}).scores == (1.0,)
    assert parse_structured(None).reason == "no prediction"


def test_malformed_structured_predictions():
    with pytest.raises(ValueError, match="the protocol 'clean' reads no text"):
        parse_structured("1 - 2 </evi>1 - 2")
    with pytest.raises(ValueError, match="which is not a list of spans; pass"):
        parse_structured({"answer": "", "evidence": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="entries for 2 evidence spans; pass one per span"):
        parse_structured({"answer": "", "evidence": EVIDENCE, "captions": ["a"]})
    with pytest.raises(ValueError, match="it ends before it starts"):
        parse_structured({"answer": "", "evidence": [{"start": 3.0, "end": 2.0}]})


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("(B) a dog", 1),
        ("b", 1),
        ("C.", 2),
        ("The best answer is (C)", 2),
        ("Answer: B", 1),
        ("Best option: (B) a dog.", 1),
        ("A man enters", None),  # an article, not a letter
        ("It is a dog (B)", 1),
        ("A dog at 2.0 s - 3.5 s. Best option: (B).", 1),
        ("A dog, so option (B).", 1),
        ("A dog.", 1),
        ("(E) x", None),
        ("", None),
        ("a bird", None),
    ],
)
def test_the_option_of_a_clean_answer(answer, option):
    assert option_letter(answer, ["a cat", "a dog", "a cow"]) == option


def test_two_equal_options_name_none():
    assert option_letter("a cat", ["a cat", "A cat."]) is None


def test_a_structured_prediction_as_text():
    assert prediction_text({"answer": "Yes.", "evidence": EVIDENCE}) == "5.00 - 6.00 1.00 - 2.00 </evi>Yes."
    references = [
        {"start": 5.0, "end": 6.0, "char_start": 3, "char_end": 14},
        {"start": 1.125, "end": 2.0, "char_start": 19, "char_end": 30},
    ]
    spoken = {"answer": "At 5.0s - 6.0s and 1.1s - 2.0s.", "evidence": [], "references": references}
    assert prediction_text(spoken) == "</evi>At 5.00 - 6.00 and 1.12 - 2.00."
    assert parse_text("tvg", prediction_text(spoken), "d2vlm").windows == ((5.0, 6.0), (1.12, 2.0))
    assert prediction_text({"answer": "No.", "evidence": []}) == "</evi>No."
    assert prediction_text({"text": "1 - 2 </evi>x", "answer": "y"}) == "1 - 2 </evi>x"
    assert prediction_text("as it is") == "as it is"
    assert prediction_text(None) is None
