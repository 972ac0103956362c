# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Perturbations: the named factor differs and the other does not, over thousands of rows; clauses; what is impossible.

The property tests look at the rejected side with their own eyes (`preference_rows.statements`, plain-Python IoU), not
with the package's clause splitter.
"""

import re
from collections import Counter

import numpy as np
import pytest
from preference_rows import EVIDENCE, ONE_CLAUSE, random_row, statements

from d2vlm_hf.data import clauses as clause_module
from d2vlm_hf.data.clauses import (
    canonical,
    content_words,
    extend_list,
    insert_clause,
    join_clauses,
    remove_event,
    split_clauses,
    text_factor,
    without_evidence,
)
from d2vlm_hf.data.perturb import (
    FACTOR_OF,
    KINDS,
    Impossible,
    PerturbConfig,
    add,
    as_seconds,
    drop,
    merge,
    multiple_choice,
    perturb,
    repeat,
    shift,
    tamper,
)
from d2vlm_hf.data.rewriting import TransformersRewriter, rewriting_fault
from d2vlm_hf.data.schema import EVIDENCE_TOKEN, make_row, validate_row
from d2vlm_hf.data.shapes import ShapesConfig, iterate
from d2vlm_hf.data.vocabulary import Vocabulary, video_name


RANDOM_ROWS, SHAPES_VIDEOS = 2000, 120
CONFIG = PerturbConfig()


def make(answer, spans, **columns):
    columns = {"duration": 60.0, "task": "dvc", "question": "What happens?"} | columns
    return make_row(id="r", video="v.mp4", answer=answer, spans=spans, **columns)


def text_of(row):
    return row["rejected"][0]["content"]


# Slow oracles in plain Python.
def oracle_iou(a, b):
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return float(tuple(a) == tuple(b)) if union == 0 else shared / union


def oracle_agreement(spans, truth):
    """How well two sets of spans match: mean of every span's best IoU, from either side."""
    best = [max(oracle_iou(a, b) for b in truth) for a in spans]
    best += [max(oracle_iou(a, b) for a in spans) for b in truth]
    return sum(best) / len(best)


def all_true(row):
    return [span for spans in [row["spans"], *row["annotations"]] for span in spans]


def plain_words(text):
    return re.findall(r"[a-z]+", text.lower().replace(EVIDENCE, " "))


# --- clauses ---------------------------------------------------------------------------------------------------------

SPLIT = {
    "The event happens in <evi>.": [("The event happens in <evi>", 1)],
    "A man opens the door at <evi> and again at <evi>.": [("A man opens the door at <evi> and again at <evi>", 2)],
    "A man enters at <evi>, then he sits at <evi>, <evi> and <evi>.": [
        ("A man enters at <evi>", 1),
        ("he sits at <evi>, <evi> and <evi>", 3),
    ],
    "<evi>, cut the ends, then peel. <evi>, mix salt and oil. He smiles. <evi>, chop.": [
        ("<evi>, cut the ends, then peel", 1),
        ("<evi>, mix salt and oil. He smiles", 1),
        ("<evi>, chop", 1),
    ],
    "1. <evi>: a man walks.\n2. <evi>: he sits.": [("<evi>: a man walks", 1), ("<evi>: he sits", 1)],
    "(B) red <evi>": [("(B) red <evi>", 1)],
    "(B) red. The relevant event happens in <evi>.": [("(B) red", 0), ("The relevant event happens in <evi>", 1)],
    "At <evi> a man walks and at <evi> he sits.": [("At <evi> a man walks", 1), ("at <evi> he sits", 1)],
    "First, a dog barks (<evi>). Finally, it sleeps (<evi>).": [
        ("a dog barks (<evi>)", 1),
        ("it sleeps (<evi>)", 1),
    ],
    "A man walks from <evi> to <evi>.": [("A man walks from <evi> to <evi>", 2)],
    "Mr. Li waves at <evi>, 3.5 m away. It is late.": [("Mr. Li waves at <evi>, 3.5 m away", 1), ("It is late", 0)],
    "the man jumps at <evi>. he runs at <evi>.": [("the man jumps at <evi>", 1), ("he runs at <evi>", 1)],
    "a cat at <evi>; a dog at <evi>": [("a cat at <evi>", 1), ("a dog at <evi>", 1)],
    "<evi> <evi>": [("<evi> <evi>", 2)],
    "This does not happen.": [("This does not happen", 0)],
    "": [],
}


@pytest.mark.parametrize("answer", SPLIT)
def test_answers_split_into_clauses_and_join_again(answer):
    found = split_clauses(answer)
    assert [(clause.body, len(clause.events)) for clause in found] == SPLIT[answer]
    assert join_clauses(found) == answer
    assert [event for clause in found for event in clause.events] == list(range(answer.count(EVIDENCE)))


def test_any_text_joins_again(rng):
    pieces = [
        "<evi>",
        " and ",
        ", ",
        ". ",
        "\n",
        "2. ",
        "at ",
        "A man ",
        "he",
        "; ",
        "(",
        ")",
        "  ",
        "then ",
        "!",
        "’s ",
    ]
    for _ in range(2000):
        text = "".join(rng.choice(pieces, size=rng.integers(0, 14)))
        found = split_clauses(text)
        assert join_clauses(found) == text
        assert sum(len(clause.events) for clause in found) == text.count(EVIDENCE)


def test_evidence_token_is_that_of_the_schema():
    assert clause_module.EVIDENCE == EVIDENCE_TOKEN == EVIDENCE


@pytest.mark.parametrize(
    ("answer", "event", "left"),
    [
        ("A dog barks at <evi>, then a cat runs at <evi>.", 0, "A cat runs at <evi>."),
        ("A dog barks at <evi>, then a cat runs at <evi>.", 1, "A dog barks at <evi>."),
        ("First, a dog barks at <evi>. Then a cat runs at <evi>.", 0, "First, a cat runs at <evi>."),
        ("A dog barks at <evi>, <evi>, and <evi>.", 1, "A dog barks at <evi> and <evi>."),
        ("A dog barks at <evi> and <evi>.", 0, "A dog barks at <evi>."),
        (
            "1. <evi>: a dog barks.\n2. <evi>: it runs.\n3. <evi>: it sits.",
            1,
            "1. <evi>: a dog barks.\n2. <evi>: it sits.",
        ),
        ("<evi>, mix. He smiles. <evi>, chop.", 0, "<evi>, chop."),
        ("A man walks from <evi> to <evi>.", 0, None),
        ("Between <evi> and <evi> it rains.", 0, None),
    ],
)
def test_an_event_is_taken_out_of_an_answer(answer, event, left):
    result = remove_event(split_clauses(answer), event)
    assert (result and join_clauses(result)) == left


@pytest.mark.parametrize(
    ("answer", "at", "result"),
    [
        ("A dog barks at <evi>. It runs at <evi>.", 0, "Rain falls at <evi>. A dog barks at <evi>. It runs at <evi>."),
        ("A dog barks at <evi>, then it runs at <evi>.", 1,
         "A dog barks at <evi>, rain falls at <evi>, then it runs at <evi>."),
        ("A dog barks at <evi>", 1, "A dog barks at <evi>. Rain falls at <evi>."),
        ("First, a dog barks at <evi>. Then it runs at <evi>.", 2,
         "First, a dog barks at <evi>. Then it runs at <evi>. Then rain falls at <evi>."),
        ("- a dog barks at <evi>\n- it runs at <evi>", 1,
         "- a dog barks at <evi>\n- rain falls at <evi>\n- it runs at <evi>"),
    ],
)  # fmt: skip
def test_a_clause_is_put_into_an_answer(answer, at, result):
    assert join_clauses(insert_clause(split_clauses(answer), at, "rain falls at <evi>", 9)) == result


def test_a_list_of_evidence_grows():
    grown = extend_list(split_clauses("A dog barks at <evi> and again at <evi>."), 0, 1, 7)
    assert join_clauses(grown) == "A dog barks at <evi>, <evi> and again at <evi>."
    assert grown[0].events == (0, 7, 1)


def test_text_factor_does_not_see_lists_places_or_ties():
    one = text_factor("A dog barks at <evi>, then a cat runs at <evi> and <evi>. That is all.", [1, 2])
    assert one == ["a cat runs at <evi>", "a cat runs at <evi>", "that is all"]
    assert text_factor("A cat runs at <evi>, and <evi>. That is all.") == one
    assert canonical("At <evi>, <evi> and <evi>  it rains") == "at <evi> it rains"


def test_words_of_a_clause_without_its_evidence():
    assert without_evidence("The event happens in <evi>") == "The event happens"
    assert without_evidence("At <evi> and <evi>, a dog barks") == "a dog barks"
    assert without_evidence("a dog barks (<evi>)") == "a dog barks"
    assert without_evidence("<evi> and <evi>") == ""
    assert (
        content_words("The dogs barked, closing <evi>")
        == content_words("a dog barking to close")
        == {"dog", "bark", "clos"}
    )


# --- properties ------------------------------------------------------------------------------------------------------


def check_shift(row, made, style):
    assert text_of(made) == row["answer"]
    changed = [k for k, (a, b) in enumerate(zip(row["spans"], made["rejected_spans"], strict=True)) if a != b]
    assert len(changed) == 1
    old, new = row["spans"][changed[0]], made["rejected_spans"][changed[0]]
    low, high = CONFIG.shift_iou
    assert low <= oracle_iou(old, new) <= high
    assert max(oracle_iou(new, span) for span in all_true(row)) <= high
    assert abs(new[0] - old[0]) >= CONFIG.tolerance
    assert new[1] - new[0] == pytest.approx(old[1] - old[0], abs=0.011)
    assert re.search(r"span \d+ shifted [\d.]+-[\d.]+ s -> [\d.]+-[\d.]+ s \(IoU 0\.[0-3]\d\)", made["edit"])


def without_one(longer, shorter):
    """Index of the item that is missing in the shorter list."""
    return [k for k in range(len(longer)) if longer[:k] + longer[k + 1 :] == shorter]


def check_drop(row, made, style):
    places = without_one(row["spans"], made["rejected_spans"])
    assert places
    said, left = statements(row["answer"]), statements(text_of(made))
    if style in ONE_CLAUSE:
        assert left == said
        assert set(plain_words(text_of(made))) <= set(plain_words(row["answer"]))
    else:
        assert set(without_one(said, left)) & set(places)


def check_merge(row, made, style):
    old, new = row["spans"], made["rejected_spans"]
    (hull,) = [span for span in new if span not in old] or [None]
    assert hull is not None
    kept = new.index(hull)
    pairs = []
    for lost in range(len(old)):
        rest = old[:lost] + old[lost + 1 :]
        if rest[:kept] + rest[kept + 1 :] == new[:kept] + new[kept + 1 :]:
            both = [old[lost], rest[kept]]
            if hull == [min(s for s, _ in both), max(e for _, e in both)]:
                pairs.append((lost, both))
    assert pairs
    for _, both in pairs:
        assert max(oracle_iou(hull, span) for span in both) <= CONFIG.merge_iou[1]
    said, left = statements(row["answer"]), statements(text_of(made))
    if style in ONE_CLAUSE:
        assert left == said
    else:
        assert any(said[:lost] + said[lost + 1 :] == left for lost, _ in pairs)


def check_add(row, made, style):
    old, new = row["spans"], made["rejected_spans"]
    places = without_one(new, old)
    assert places
    for s, e in all_true(row):
        (a, b) = new[places[0]]
        assert max(0, min(b, e) - max(a, s)) <= CONFIG.add_overlap * min(b - a, e - s) + 1e-9
    said, left = statements(row["answer"]), statements(text_of(made))
    if not old:  # what denied the event gives way
        assert said[0] not in left
    elif style in ONE_CLAUSE or (len(said) == 1 and row["task"] != "dvc"):
        assert left == said
    else:
        assert set(without_one(left, said)) & set(places)


def check_tamper(row, made, style):
    assert made["rejected_spans"] == row["spans"]
    assert plain_words(text_of(made)) != plain_words(row["answer"])
    assert statements(text_of(made)) != statements(row["answer"])


def check_repeat(row, made, style):
    assert made["rejected_spans"] == row["spans"]
    old, new = plain_words(row["answer"]), iter(plain_words(text_of(made)))
    assert all(word in new for word in old)  # `in` moves the iterator: the old words are there, in order
    assert len(plain_words(text_of(made))) > len(old)
    assert set(plain_words(text_of(made))) == set(old)


CHECKS = {
    "shift": check_shift,
    "drop": check_drop,
    "merge": check_merge,
    "add": check_add,
    "tamper": check_tamper,
    "repeat": check_repeat,
}


@pytest.fixture(scope="module")
def random_rows():
    rng = np.random.default_rng(11)
    return [random_row(rng, index) for index in range(RANDOM_ROWS)]


@pytest.fixture(scope="module")
def vocabulary(random_rows):
    return Vocabulary.from_rows(row for row, _ in random_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_factor_differs_and_the_other_does_not(kind, random_rows, vocabulary):
    made_by_style, reasons = Counter(), Counter()
    for seed, (row, style) in enumerate(random_rows):
        made = perturb(row, kind, seed, vocabulary)
        if isinstance(made, Impossible):
            assert not made
            reasons[made.reason] += 1
            continue
        made_by_style[style] += 1
        validate_row(made)
        assert (made["factor"], made["perturbation"], made["seed"]) == (FACTOR_OF[kind], kind, seed)
        assert made["chosen"] == [{"role": "assistant", "content": row["answer"]}]
        assert made["prompt"] == [{"role": "user", "content": row["question"]}]
        assert made["chosen_spans"] == row["spans"]
        assert text_of(made).count(EVIDENCE) == len(made["rejected_spans"])
        assert text_of(made).strip()
        for start, end in made["rejected_spans"]:
            assert 0 <= start <= end <= row["duration"]
        if FACTOR_OF[kind] == "grounding" and row["spans"]:
            for truth in [row["spans"], *row["annotations"]]:
                best = oracle_agreement(row["spans"], truth)
                score = oracle_agreement(made["rejected_spans"], truth)
                assert score < best or (truth is not row["spans"] and score <= 0.3)
        CHECKS[kind](row, made, style)
    assert sum(made_by_style.values()) + sum(reasons.values()) == RANDOM_ROWS
    assert sum(made_by_style.values()) > RANDOM_ROWS * 0.45, reasons
    assert min(made_by_style.values()) > 40
    assert len(made_by_style) == 10


@pytest.mark.parametrize("difficulty", ["middle", "hard"])
def test_the_named_factor_differs_on_the_shapes_world(difficulty):
    config = ShapesConfig(difficulty=difficulty, num_videos=SHAPES_VIDEOS)
    rows = [row for _, found in iterate(config) for row in found]
    vocabulary, made = Vocabulary.from_rows(rows), Counter()
    for seed, row in enumerate(rows):
        for kind in KINDS:
            result = perturb(row, kind, seed, vocabulary)
            if not result:
                continue
            made[kind] += 1
            validate_row(result)
            if FACTOR_OF[kind] == "text":
                assert result["rejected_spans"] == row["spans"]
                assert plain_words(text_of(result)) != plain_words(row["answer"])
            elif kind == "shift":
                check_shift(row, result, "")
            else:
                assert len(result["rejected_spans"]) - len(row["spans"]) == (1 if kind == "add" else -1)
                assert set(plain_words(text_of(result))) <= set(plain_words(row["answer"])) or kind == "add"
    assert min(made[kind] for kind in KINDS) > SHAPES_VIDEOS / 2
    # "flashes" and "blinks" are one thing there, so that a swap of the two would be as good as the truth
    assert "blinks" not in vocabulary.alternatives("flashes")
    assert "turns" not in vocabulary.alternatives("becomes")
    assert {"right", "up"} <= set(vocabulary.alternatives("left"))
    assert {"square", "star"} <= set(vocabulary.alternatives("circle"))


def test_the_seed_decides(random_rows, vocabulary):
    rows = [row for row, _ in random_rows[:80]]
    first = [perturb(row, kind, 3, vocabulary) for row in rows for kind in KINDS]
    again = [perturb(row, kind, 3, vocabulary) for row in rows for kind in KINDS]
    other = [perturb(row, kind, 4, vocabulary) for row in rows for kind in KINDS]
    assert first == again
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 240


def test_strength_follows_the_band(random_rows):
    band = PerturbConfig(shift_iou=(0.15, 0.5), tolerance=0.1)
    found = []
    for seed, (row, _) in enumerate(random_rows[:300]):
        made = shift(row, seed, config=band)
        if made:
            (iou,) = [oracle_iou(a, b) for a, b in zip(row["spans"], made["rejected_spans"], strict=True) if a != b]
            found.append(iou)
    assert len(found) > 150
    assert 0.15 <= min(found) < 0.2 < 0.4 < max(found) <= 0.5


# --- single cases ----------------------------------------------------------------------------------------------------

TWO = "A red circle jumps at <evi>. A blue square waits at <evi>."


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("shift", make("Nothing happens.", []), "the answer has no event"),
        ("shift", make("It rains at <evi>.", [[0, 58]]), "no room to shift a span to"),
        ("shift", make("It rains at <evi>.", [[10, 50]], annotations=[[[0, 60]]]), "no room to shift a span to"),
        ("drop", make("It rains at <evi>.", [[0, 5]]), "there is only one event to drop"),
        ("drop", make("Nothing happens.", []), "the answer has no event"),
        ("drop", make("A man walks from <evi> to <evi>.", [[0, 5], [7, 9]]), "the events share one clause"),
        (
            "drop",
            make("It rains at <evi>. Yes, it rains at <evi>.", [[0, 5], [0, 5]]),
            "the rejected spans would be as good as the chosen ones",
        ),
        ("merge", make("It rains at <evi>.", [[0, 5]]), "there is only one event to merge"),
        ("merge", make(TWO, [[0, 20], [5, 15]]), "the merged span would lie outside its IoU band"),
        ("merge", make(TWO, [[0, 20], [21, 21.5]]), "the merged span would lie outside its IoU band"),
        ("merge", make("A man walks from <evi> to <evi>.", [[0, 5], [7, 9]]), "the events share one clause"),
        ("add", make(TWO, [[0, 20], [25, 30]]), "no clause of another event fits"),
        ("add", make("It rains at <evi>.", [[0, 60]], task="tvg"), "no room for another span"),
        ("add", make("He is tired.", [], task="rvq"), "the answer has no event"),
        ("add", make("It walks from <evi> to <evi>.", [[0, 5], [7, 9]], task="tal"), "the events share one clause"),
        ("tamper", make("The event happens in <evi>.", [[0, 5]]), "nothing in the answer can be tampered with"),
        ("tamper", make("The red circle never moves.", [], task="tvg"), "the answer has no event"),
        ("repeat", make("<evi>, <evi>", [[0, 5], [7, 9]]), "the answer has no words to repeat"),
    ],
)
def test_what_is_impossible_says_why(kind, row, reason):
    assert perturb(row, kind) == Impossible(reason)


def test_no_annotator_may_agree_with_the_rejected_side():
    # The second annotator saw one event only: an answer that drops the other is as good for them.
    row = make(TWO, [[0, 10], [30, 40]], annotations=[[[30, 40]]])
    for seed in range(20):
        assert drop(row, seed)["rejected_spans"] == [[0, 10]]
    # The second annotator puts the event where a shift would like to go.
    row = make("It rains at <evi>.", [[0, 20]], annotations=[[[20, 40]]])
    for seed in range(50):
        (moved,) = shift(row, seed)["rejected_spans"]
        assert oracle_iou(moved, [20, 40]) <= 0.3


def test_shift_stays_off_other_events_and_moves_at_least_the_tolerance():
    row = make(TWO, [[0, 2], [4, 6]], duration=10.0)
    for seed in range(100):
        made = shift(row, seed, config=PerturbConfig(tolerance=1.5))
        (k,) = [k for k in (0, 1) if made["rejected_spans"][k] != row["spans"][k]]
        assert abs(made["rejected_spans"][k][0] - row["spans"][k][0]) >= 1.5
        assert oracle_iou(made["rejected_spans"][k], row["spans"][1 - k]) <= 0.3
    point = shift(make("It rains at <evi>.", [[5, 5]]), 1)
    assert abs(point["rejected_spans"][0][0] - 5) >= 1.0


def test_merge_covers_both_events_and_loses_one_clause():
    made = merge(make(TWO, [[0, 10], [20, 30]]), 0)
    assert made["rejected_spans"] == [[0, 30]]
    assert text_of(made) in ("A red circle jumps at <evi>.", "A blue square waits at <evi>.")
    assert made["edit"] == "spans 1 and 2 merged 0.0-10.0 s + 20.0-30.0 s -> 0.0-30.0 s (IoU 0.33 and 0.33)"


def test_add_extends_a_list_and_keeps_the_order():
    row = make("The dog barks at <evi> and <evi>.", [[10, 15], [40, 45]], task="tal")
    for seed in range(20):
        made = add(row, seed)
        assert text_of(made) == "The dog barks at <evi>, <evi> and <evi>."
        assert made["rejected_spans"] == sorted(made["rejected_spans"])


def test_add_claims_the_event_that_does_not_occur():
    others = [
        make("The red star blinks at <evi>.", [[0, 4]], task="tvg"),
        make("It rains at <evi>.", [[0, 5]], task="tvg"),
    ]
    others = [{**row, "video": f"other-{k}.mp4"} for k, row in enumerate(others)]
    row = make("This does not happen in the video.", [], task="tvg", question="When does the red star blink?")
    made = add(row, 0, vocabulary=Vocabulary.from_rows(others))
    assert text_of(made) == "The red star blinks at <evi>."
    assert len(made["rejected_spans"]) == 1
    assert made["factor"] == "grounding"


def test_tamper_names_another_option():
    options = ["red", "blue", "green"]
    for answer, others in [
        ("(B) blue, at <evi>.", {"(A) red, at <evi>.", "(C) green, at <evi>."}),
        ("(B) blue. It happens at <evi>.", {"(A) red. It happens at <evi>.", "(C) green. It happens at <evi>."}),
        ("Blue at <evi>. Best option: (B).", {"Red at <evi>. Best option: (A).", "Green at <evi>. Best option: (C)."}),
        ("At <evi>: blue, so option (B).", {"At <evi>: red, so option (A).", "At <evi>: green, so option (C)."}),
        ("B. It happens at <evi>.", {"A. It happens at <evi>.", "C. It happens at <evi>."}),
        ("It is blue at <evi>.", {"It is red at <evi>.", "It is green at <evi>."}),
    ]:
        row = make(answer, [[0, 5]], task="gvq", options=options, correct_option=1)
        made = [tamper(row, seed) for seed in range(20)]
        assert {text_of(m) for m in made} == others
        assert {m["edit"] for m in made} == {"option 'blue' -> 'red'", "option 'blue' -> 'green'"}
    no_event = tamper(make("(B) blue.", [], task="gvq", options=options, correct_option=1), 0)
    assert text_of(no_event) in ("(A) red.", "(C) green.")


def test_tamper_exchanges_words_only_of_events_apart_in_time():
    apart, together = (make(TWO, spans) for spans in ([[0, 5], [20, 25]], [[0, 5], [0, 5.5]]))
    texts = {text_of(tamper(apart, seed)) for seed in range(40)}
    assert "A blue square waits at <evi>. A red circle jumps at <evi>." in texts
    texts = {text_of(tamper(together, seed)) for seed in range(40)}
    assert "A blue square waits at <evi>. A red circle jumps at <evi>." not in texts


def test_tamper_swaps_attributes_with_their_article():
    row = make("A red bag falls at <evi>.", [[0, 5]])
    texts = {text_of(tamper(row, seed)) for seed in range(200)}
    assert {"An orange bag falls at <evi>.", "A blue bag falls at <evi>."} <= texts
    known = [make("A blue bag falls at <evi>.", [[9, 12]])]  # only what the data set says
    texts = {text_of(tamper(row, seed, vocabulary=Vocabulary.from_rows(known))) for seed in range(50)}
    assert texts == {"A blue bag falls at <evi>."}
    same_words = [make("It shows up at <evi>. A star moves down at <evi>.", [[9, 12], [20, 22]])]
    row = make("It shows up at <evi>.", [[0, 5]])
    assert not tamper(row, 0, vocabulary=Vocabulary.from_rows(same_words))  # "shows down" is no English


def test_tamper_borrows_words_of_another_video():
    other = {**make("A dog digs a deep hole in the garden at <evi>.", [[0, 5]]), "video": "other.mp4"}
    row = make("Someone washes the dishes near a window at <evi> and <evi>.", [[10, 15], [30, 35]])
    vocabulary = Vocabulary.from_rows([other])
    assert not tamper(row, 0, vocabulary=vocabulary)  # in a world of few words the two might be one event
    vocabulary = Vocabulary(vocabulary.entries, known=[str(number) for number in range(300)])
    made = tamper(row, 0, vocabulary=vocabulary)
    assert text_of(made) == "A dog digs a deep hole in the garden at <evi> and <evi>."
    assert not tamper(row, 0, vocabulary=Vocabulary.from_rows([{**other, "video": row["video"]}]))


def test_repeat_loops_a_clause_or_stutters():
    texts = {text_of(repeat(make("It rains at <evi>.", [[0, 5]]), seed)) for seed in range(60)}
    assert "It rains at <evi>. It rains. It rains." in texts
    assert "It rains It rains It rains at <evi>." in texts
    assert all(text.count(EVIDENCE) == 1 for text in texts)
    made = repeat(make("It rains at <evi>.", [[0, 5]]), 0, config=PerturbConfig(repeats=(7, 7)))
    assert "7 times" in made["edit"]


def test_vocabulary_learns_exclusive_words_and_spares_synonyms():
    def told(answer, k, span=(0, 5)):
        return {**make(answer, [list(span)], task="tvg"), "video": f"{k}.mp4"}

    rows = []
    for k in range(30):
        rows += [told("The lamp glows at <evi>.", k), told("The lamp flickers at <evi>.", k, (20, 25))]
        rows += [told("The fan spins at <evi>.", k, (30, 35)), told("The fan rotates at <evi>.", k, (30, 35))]
        rows += [told("The fan spins at <evi>.", k, (50, 55))]  # apart from the rotation: but one event said both
    learnt = Vocabulary.from_rows(rows)
    assert learnt.alternatives("glows") == ("flickers",)
    assert learnt.alternatives("spins") == ()
    options = [make("(A) oak <evi>", [[0, 5]], options=["oak", "elm", "fir tree"], correct_option=0)] * 2
    assert Vocabulary.from_rows(options).alternatives("oak") == ("elm",)
    assert Vocabulary().alternatives("gray") == tuple(w for w in Vocabulary().alternatives("grey"))
    assert Vocabulary().contradicts("a red dog", "a blue dog")
    assert not Vocabulary().contradicts("a red dog", "the dog is red")


def test_vocabulary_is_bounded_and_even():
    rows = ({**make(f"Thing {k} moves at <evi>.", [[0, 5]], task="tvg"), "video": f"{k}.mp4"} for k in range(3000))
    entries = Vocabulary.from_rows(rows, limit=300).entries["tvg"]
    numbers = [int(entry.body.split()[1]) for entry in entries]
    assert len(numbers) == len(set(numbers)) == 300
    assert 1200 < np.mean(numbers) < 1800
    assert video_name({"path": "a.mp4", "bytes": None}) == "a.mp4"
    assert video_name(None) == video_name({"bytes": b"x"}) == ""


def test_bad_arguments_say_what_to_do():
    row = make("It rains at <evi>.", [[0, 5]])
    with pytest.raises(ValueError, match="kind is 'swap', which is no perturbation"):
        perturb(row, "swap")
    with pytest.raises(ValueError, match="there are 1 spans and 2 '<evi>'"):
        perturb({**row, "answer": "It rains at <evi> and <evi>."}, "shift")
    with pytest.raises(ValueError, match="a band of IoU runs from 0 to below 1"):
        PerturbConfig(shift_iou=(0.5, 0.3))
    with pytest.raises(ValueError, match=r"add_overlap is 1\.0: it is a share of a span"):
        PerturbConfig(add_overlap=1.0)
    with pytest.raises(ValueError, match="a distance in seconds cannot be negative"):
        PerturbConfig(tolerance=-1)
    with pytest.raises(ValueError, match="something must be repeated"):
        PerturbConfig(repeats=(0, 2))
    with pytest.raises(ValueError, match="at least one span must be tried"):
        PerturbConfig(candidates=0)


# --- rewriting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewritten", "fault"),
    [
        ("A green dog runs at <evi>.", None),
        ("", "the rewriting is empty"),
        ("A green dog runs at <evi> </evi>.", "the rewriting holds a token that only the processor may write"),
        ("A green dog runs.", "the rewriting does not keep the <evi> tokens"),
        ("A green dog runs at <evi> and <evi>.", "the rewriting does not keep the <evi> tokens"),
        ("<evi>, a green dog runs.", "the rewriting moves the <evi> tokens"),
        ("Dog <evi>", "the rewriting is much shorter or longer than the answer"),
        ("A red dog runs at <evi>!", "the rewriting changes no key information"),
        ("The red dogs run at <evi>.", "the rewriting changes no key information"),
    ],
)
def test_a_rewriting_is_checked(rewritten, fault):
    row = make("A red dog runs at <evi>.", [[0, 5]])
    assert rewriting_fault(row["answer"], rewritten) == fault
    made = tamper(row, 5, rewriter=lambda answer, question, seed: rewritten)
    if fault:
        assert made == Impossible(fault)
    else:
        assert text_of(made) == rewritten
        assert made["rejected_spans"] == row["spans"]
        assert made["edit"] == "rewritten by a text-generation model"


def tiny_language_model(folder):
    """A causal language model and a word-level tokenizer, saved in a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        word: k for k, word in enumerate(["<unk>", "<s>", "</s>", "a", "red", "dog", "runs", "at", "<evi>", "."])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_transformers_model_rewrites(tmp_path):
    import pickle

    tiny_language_model(tmp_path)
    rewriter = TransformersRewriter(str(tmp_path), max_new_tokens=6)
    row = make("a red dog runs at <evi> .", [[0, 5]])
    written = rewriter(row["answer"], row["question"], 0)
    assert isinstance(written, str)
    assert written == pickle.loads(pickle.dumps(rewriter))(row["answer"], row["question"], 0)
    made = tamper(row, 0, rewriter=rewriter)  # an untrained model: nothing that could be used, and nothing faked
    assert made == Impossible(rewriting_fault(row["answer"], written))
    sampled = TransformersRewriter(str(tmp_path), max_new_tokens=6, do_sample=True)
    assert sampled(row["answer"], "q", 1) == sampled(row["answer"], "q", 1)


def test_a_chat_model_gets_a_chat():
    class Chat:
        class tokenizer:
            chat_template = "{{ messages }}"

        def __call__(self, prompt, **kwargs):
            assert kwargs == {"return_full_text": False, "do_sample": False, "max_new_tokens": 256}
            assert prompt[0]["content"].endswith("Answer: A red dog runs at <evi>.\nRewritten answer:")
            return [{"generated_text": [{"role": "assistant", "content": " A red cat runs at <evi>.\nDone."}]}]

    made = tamper(make("A red dog runs at <evi>.", [[0, 5]]), 0, rewriter=TransformersRewriter(Chat()))
    assert text_of(made) == "A red cat runs at <evi>."
    with pytest.raises(ValueError, match=r"has no \{answer\}: the model would not see it"):
        TransformersRewriter(Chat(), prompt="Rewrite {question}")


# --- multiple choice -------------------------------------------------------------------------------------------------


def test_multiple_choice_of_an_answer_and_its_perturbations():
    row = make(TWO, [[0, 10], [20, 30]])
    rejected = [shift(row, 0), drop(row, 0), tamper(row, 0), drop(row, 0)]
    choice = multiple_choice(row, rejected, seed=2)
    validate_row(choice)
    right = "A red circle jumps at 0.0s - 10.0s. A blue square waits at 20.0s - 30.0s."
    assert len(choice["options"]) == 4  # the same one twice counts once
    assert choice["options"][choice["correct_option"]] == right
    letter = "ABCD"[choice["correct_option"]]
    assert f"\n({letter}) {right}" in choice["question"]
    assert choice["answer"] == f"Best option: ({letter}) {TWO}"
    assert choice["spans"] == row["spans"]
    positions = {multiple_choice(row, rejected, seed)["correct_option"] for seed in range(40)}
    assert positions == {0, 1, 2, 3}
    assert as_seconds("It rains.", []) == "It rains."
    assert multiple_choice(row, []) == Impossible("there is no wrong option")
    assert multiple_choice({**row, "options": ["a", "b"]}, rejected) == Impossible("the row has options already")
    many = [shift(row, seed) for seed in range(40)]
    assert multiple_choice(row, many) == Impossible("there are more options than letters")
