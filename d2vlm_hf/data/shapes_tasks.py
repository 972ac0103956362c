# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene of the shapes world, with the one right answer and its exact evidence.

Every function takes a scene and random numbers and returns an [`Asking`], or None where the scene has no such
question. What is true is drawn before and apart from how it is said; where the scene favours one content of the right
option over another, questions are thinned out until all contents are equally likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from . import shapes_language as language
from .shapes_world import (
    COLOURS,
    DIFFICULTIES,
    FILE_FPS,
    MOVE_SHARE,
    MOVES,
    Event,
    Scene,
    pairs_of,
    verb_of,
)


ABSENT_SHARE = 0.1
MAX_EVIDENCE = 3
NUM_OPTIONS = 4
TARGET_GAP = 0.5  # seconds between two spans that one question asks for
CLEAR_GAP = 0.5  # seconds before and after a given moment in which nothing else may fit the question
POSITION_MARGIN = 0.1  # canvases by which one axis must outweigh the other for "left" or "top" to be true
MOMENT_SECONDS = (2.0, 4.0)  # length of a given moment at which something stands still
MOMENT_TRIES = 20
# which of colour and shape a grounding question names, and how often
SUBJECT_FORMS = {(True, True): 0.7, (True, False): 0.12, (False, True): 0.12, (False, False): 0.06}
DIRECTION_SHARE = 0.75  # share of the moves whose direction is named
COUNT_WEIGHTS = {1: 1.0, 2: 2.0, 3: 2.0}  # how many moments a tal question has, where there is a choice


@dataclass(frozen=True)
class Query:
    """What is looked for: a verb or event kind, done by an object of a colour and a shape (None: any)."""

    colour: str | None
    shape: str | None
    verb: str

    @property
    def subject(self) -> str:
        """The object in words."""
        return language.subject(self.colour, self.shape)

    def fits(self, scene: Scene, event: Event) -> bool:
        """Whether an event is what is looked for."""
        thing = scene.objects[event.actor]
        fits = self.verb in (event.kind, verb_of(event.kind))
        return fits and self.colour in (None, thing.colour) and self.shape in (None, thing.shape)

    def find(self, scene: Scene) -> list[Event]:
        """Return all events that are looked for, in the order of time."""
        return [event for event in scene.events if self.fits(scene, event)]


class Asking(NamedTuple):
    """The columns of a row, and what it is about: one scene yields no two rows of a kind about the same."""

    columns: dict[str, Any]
    about: Any


THINNED = Asking({}, None)  # the row is given up: another question in its place would be asked of some answers only


def ask_tvg(scene: Scene, rng: np.random.Generator, absent_share: float = ABSENT_SHARE) -> Asking | None:
    """When does it happen? One moment, or none in a share of the rows."""
    queries = _queries(scene, rng)
    queries = [query for query in queries if len(query.find(scene)) == 1]
    return _grounding(scene, rng, queries, "tvg", absent_share)


def ask_tal(scene: Scene, rng: np.random.Generator, absent_share: float = ABSENT_SHARE) -> Asking | None:
    """When does it happen, every time? One to three moments, or none in a share of the rows."""
    queries = [query for query in _queries(scene, rng) if _askable(query.find(scene))]
    if not queries:
        return None
    counts = sorted({len(query.find(scene)) for query in queries})
    weights = np.array([COUNT_WEIGHTS[count] for count in counts])
    count = rng.choice(counts, p=weights / weights.sum())
    return _grounding(scene, rng, [query for query in queries if len(query.find(scene)) == count], "tal", absent_share)


def ask_dvc(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """What happens? All events in the order of their starts, a clause and a span for each."""
    clauses = [
        language.clause(_name(scene, event.actor), event.kind, int(rng.integers(len(language.VERBS[event.kind]))))
        for event in scene.events
    ]
    columns = {
        "question": language.fill(rng, language.QUESTIONS["dvc"]),
        "answer": language.dense_caption(rng, clauses),
        "spans": _spans(scene.events),
        "captions": clauses,
    }
    return Asking(columns, about=None)


def _queries(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """Return a way to ask for every event, each in a form drawn for it."""
    queries = []
    forms = list(SUBJECT_FORMS)
    for event in rng.permutation(np.array(scene.events, dtype=object)):
        thing = scene.objects[event.actor]
        named = rng.random() < DIRECTION_SHARE
        with_colour, with_shape = forms[rng.choice(len(forms), p=list(SUBJECT_FORMS.values()))]
        if not with_colour and not with_shape and not named:
            with_colour = with_shape = True  # "a shape moves" fits nearly every scene
        verb = event.kind if named else verb_of(event.kind)
        queries.append(Query(thing.colour if with_colour else None, thing.shape if with_shape else None, verb))
    return queries


def _askable(events: Sequence[Event]) -> bool:
    """Whether these can be the moments of one answer: few enough, and apart from each other."""
    apart = all(second.start - first.end >= TARGET_GAP for first, second in pairwise(events))
    return 1 <= len(events) <= MAX_EVIDENCE and apart


def _grounding(
    scene: Scene, rng: np.random.Generator, queries: list[Query], task: str, absent_share: float
) -> Asking | None:
    """Ask for one of the queries, or in a share of the cases for something like it that does not occur."""
    if not queries:
        return None
    query = queries[0]
    about = tuple(event.span for event in query.find(scene))  # an absent event takes the place of a present one
    if rng.random() < absent_share:
        query = _absent(scene, rng, query)
        if query is None:
            return None
    found = query.find(scene)
    values = {"evidence": language.enumerate_evidence(len(found))} if found else {}
    templates = language.ANSWERS["found" if found else "absent"]
    columns = {
        "question": language.fill(rng, language.QUESTIONS[task], query.verb, query.subject),
        "answer": language.fill(rng, templates, query.verb, query.subject, **values),
        "spans": _spans(found),
    }
    return Asking(columns, about)


def _absent(scene: Scene, rng: np.random.Generator, query: Query) -> Query | None:
    """Change the object or the verb of a query so that nothing fits, in the same form of words."""
    level = DIFFICULTIES[scene.difficulty]
    others = list(MOVES) if query.verb in MOVES else [*level.states, "move"]
    verbs = [replace(query, verb=verb) for verb in others]
    subjects = [
        replace(query, colour=query.colour and colour, shape=query.shape and shape)
        for colour, shape in pairs_of(scene.difficulty, scene.split)
    ]
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    existing = [other for other in subjects if (other.colour, other.shape) in present]
    ways = [[other for other in way if not other.find(scene)] for way in (existing, subjects, verbs)]
    ways = [way for way in ways if way]
    if not ways:
        return None
    way = ways[rng.integers(len(ways))]
    return way[rng.integers(len(way))]


def _name(scene: Scene, actor: int) -> str:
    thing = scene.objects[actor]
    return language.subject(thing.colour, thing.shape)


def _spans(events: Sequence[Event]) -> list[list[float]]:
    return [[event.start, event.end] for event in events]


def _choice(
    rng: np.random.Generator,
    kind: str,
    right: str,
    wrong: Sequence[str],
    found: Sequence[Event] = (),
    moment: tuple[float, float] | None = None,
    verb: str = "move",
    name: str = "",
) -> Asking:
    """Make the columns of a multiple-choice row, the right option at a random letter."""
    options = [right, *wrong]
    options = [options[place] for place in rng.permutation(len(options))]
    place = options.index(right)
    values = {"letter": language.LETTERS[place], "option": right, "Option": language.capital(right)}
    # an answer about a given moment rests on that moment: it is grounded before it is given, as every other answer is
    spans = _spans(found) if moment is None else [list(moment)]
    if spans:
        values["evidence"] = language.enumerate_evidence(len(spans))
    question = language.fill(rng, language.QUESTIONS[kind], verb, name)
    columns = {
        "question": language.with_options(question, options),
        "question_spans": [] if moment is None else [list(moment)],
        "answer": language.fill(rng, language.ANSWERS["gvq" if spans else "choice"], **values),
        "spans": spans,
        "options": options,
        "correct_option": place,
    }
    # a count of none has no time of its own, so a scene is asked for one count only
    return Asking(columns, about=None if kind == "gvq/count" else (moment, *(event.span for event in found)))


def _others(rng: np.random.Generator, right: str, pool: Sequence[str], count: int = NUM_OPTIONS - 1) -> list[str]:
    pool = [option for option in pool if option != right]
    return [pool[place] for place in rng.permutation(len(pool))[:count]]


def _keeps_shape(scene: Scene, actor: int) -> bool:
    """Thin out questions whose answer is a frequent shape: held-out pairs make some shapes rarer than others.

    The coin belongs to the object and falls the same way every time, so that asking again does not undo it.
    """
    frequency = Counter(shape for _, shape in pairs_of(scene.difficulty, scene.split))
    coin = np.random.default_rng([scene.texture_seed, actor]).random()
    return bool(coin < min(frequency.values()) / frequency[scene.objects[actor].shape])


def _attribute(scene: Scene, attribute: str, actor: int) -> tuple[str, Sequence[str]]:
    """Return an object's colour or shape, and all colours or shapes of the level."""
    thing = scene.objects[actor]
    if attribute == "colour":
        return thing.colour, list(COLOURS)
    return thing.shape, DIFFICULTIES[scene.difficulty].shapes


def _verbs(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Event]]:
    """Return every event with a verb drawn for it, in random order."""
    events = [scene.events[place] for place in rng.permutation(len(scene.events))]
    return [(event.kind if rng.random() < DIRECTION_SHARE else verb_of(event.kind), event) for event in events]


def ask_whole_attribute(scene: Scene, rng: np.random.Generator, attribute: str) -> Asking | None:
    """What colour or shape has the one object that does this?"""
    for verb, event in _verbs(scene, rng):
        found = Query(None, None, verb).find(scene)
        if {other.actor for other in found} == {event.actor} and _askable(found):
            right, pool = _attribute(scene, attribute, event.actor)
            if attribute == "shape" and not _keeps_shape(scene, event.actor):
                return THINNED
            return _choice(rng, f"gvq/{attribute}", right, _others(rng, right, pool), found, verb=verb)
    return None


def ask_whole_motion(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """Which way does an object move that moves once?"""
    moves = Counter(event.actor for event in scene.events if event.kind in MOVES)
    single = [event for event in scene.events if event.kind in MOVES and moves[event.actor] == 1]
    if not single:
        return None
    event = single[rng.integers(len(single))]
    right = language.DIRECTIONS[event.kind]
    wrong = _others(rng, right, list(language.DIRECTIONS.values()))
    return _choice(rng, "gvq/motion", right, wrong, [event], name=_name(scene, event.actor))


def ask_order(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """Which of two to four events comes first?

    They are all of one object or all of different ones: an object with many events begins earlier than others, so a
    mixed choice would favour the object named most often.
    """
    times = Counter((event.actor, event.kind) for event in scene.events)
    single = [event for event in scene.events if times[event.actor, event.kind] == 1]
    of_actor = [[event for event in single if event.actor == actor] for actor in range(len(scene.objects))]
    groups = [events for events in of_actor if len(events) > 1]
    acting = [events for events in of_actor if events]
    if len(acting) > 1:
        groups.append([events[rng.integers(len(events))] for events in acting])
    if not groups:
        return None
    group = groups[rng.integers(len(groups))]
    group = [group[place] for place in rng.permutation(len(group))[:NUM_OPTIONS]]
    group.sort(key=lambda event: event.start)
    clauses = [language.clause(_name(scene, event.actor), event.kind) for event in group]
    return _choice(rng, "gvq/order", clauses[0], clauses[1:], group[:1])


def ask_count(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """How many times does an object do something? The counts from 0 are equally likely by construction."""
    level = DIFFICULTIES[scene.difficulty]
    actor, verb = scene.featured
    if rng.random() < 1 / (level.max_repeats + 1):
        verb = "move" if rng.random() < MOVE_SHARE else str(rng.choice(level.states))
        doing = {event.actor for event in scene.events if verb_of(event.kind) == verb}
        idle = [other for other in range(len(scene.objects)) if other not in doing]
        if not idle:
            return None
        actor = int(rng.choice(idle))
    found = [event for event in scene.events if event.actor == actor and verb_of(event.kind) == verb]
    options = language.COUNTS[: level.max_repeats + 1]
    right = options[len(found)]
    return _choice(rng, "gvq/count", right, _others(rng, right, options), found, verb=verb, name=_name(scene, actor))


def _at_moment(scene: Scene, rng: np.random.Generator) -> tuple[str, Event] | None:
    """Draw an event, and a verb that nothing else fits around its time."""
    for verb, event in _verbs(scene, rng):
        near = [
            other
            for other in Query(None, None, verb).find(scene)
            if other.start < event.end + CLEAR_GAP and event.start - CLEAR_GAP < other.end
        ]
        if near == [event]:
            return verb, event
    return None


def ask_moment_attribute(scene: Scene, rng: np.random.Generator, attribute: str) -> Asking | None:
    """What colour or shape has the object that does this at the given moment?"""
    chosen = _at_moment(scene, rng)
    if chosen is None:
        return None
    verb, event = chosen
    right, pool = _attribute(scene, attribute, event.actor)
    if attribute == "shape" and not _keeps_shape(scene, event.actor):
        return THINNED
    return _choice(rng, f"rar/{attribute}", right, _others(rng, right, pool), moment=event.span, verb=verb)


def ask_moment_object(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """Which object does this at the given moment? The scene's other objects are among the options."""
    chosen = _at_moment(scene, rng)
    if chosen is None:
        return None
    verb, event = chosen
    right = _name(scene, event.actor)
    names = [_name(scene, actor) for actor in range(len(scene.objects))]
    pool = [language.subject(*pair) for pair in pairs_of(scene.difficulty, scene.split)]
    wrong = _others(rng, right, names)
    wrong += _others(rng, right, [name for name in pool if name not in names], NUM_OPTIONS - 1 - len(wrong))
    return _choice(rng, "rar/object", right, wrong, moment=event.span, verb=verb)


def ask_moment_motion(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """Which way does an object move at the given moment?"""
    moves = [event for event in scene.events if event.kind in MOVES]
    if not moves:
        return None
    event = moves[rng.integers(len(moves))]
    right = language.DIRECTIONS[event.kind]
    wrong = _others(rng, right, list(language.DIRECTIONS.values()))
    return _choice(rng, "rar/motion", right, wrong, moment=event.span, name=_name(scene, event.actor))


def ask_position(scene: Scene, rng: np.random.Generator) -> Asking | None:
    """In which part of the picture is an object at the given moment, at which it is there and stands still?"""
    grid = DIFFICULTIES[scene.difficulty].grid
    last = scene.duration - 1 / FILE_FPS
    for _ in range(MOMENT_TRIES):
        actor = int(rng.integers(len(scene.objects)))
        length = rng.uniform(*MOMENT_SECONDS) // grid * grid
        start = rng.uniform(0, last - length) // grid * grid
        events = [event for event in scene.events if event.actor == actor]
        hides = [event for event in events if event.kind == "appear"]
        moment = (float(start), float(start + length))
        if hides:
            event = hides[rng.integers(len(hides))]
            moment = event.span
        place = _standing_place(scene, actor, moment)
        if place is None:
            continue
        x, y = place[0] - 0.5, place[1] - 0.5
        if abs(abs(x) - abs(y)) < POSITION_MARGIN:
            continue
        right = language.POSITIONS[part_of_picture(np.array(place))]
        wrong = _others(rng, right, language.POSITIONS)
        return _choice(rng, "rar/position", right, wrong, moment=moment, name=_name(scene, actor))
    return None


def part_of_picture(centre: np.ndarray) -> np.ndarray:
    """The side of the canvas that each centre lies towards, as an index of `POSITIONS`: `(..., 2)` -> `(...)`."""
    x, y = np.moveaxis(centre - 0.5, -1, 0)
    towards = {"left": -x, "right": x, "top": -y, "bottom": y}
    return np.stack([towards[name] for name in language.POSITIONS], -1).argmax(-1)


def _standing_place(scene: Scene, actor: int, moment: tuple[float, float]) -> tuple[float, float] | None:
    """Return where an object's centre is if it does not move during the moment, else None."""
    x, y = scene.objects[actor].start
    for event in scene.events:
        if event.actor != actor or event.kind not in MOVES or event.start >= moment[1]:
            continue
        if event.end > moment[0]:
            return None
        x, y = x + event.shift[0], y + event.shift[1]
    return x, y


GROUNDING_TASKS = ("tvg", "tal")  # whose askers take an `absent_share`
ASKERS: dict[str, Callable[..., Asking | None]] = {
    "tvg": ask_tvg,
    "tal": ask_tal,
    "dvc": ask_dvc,
    "gvq/colour": lambda scene, rng: ask_whole_attribute(scene, rng, "colour"),
    "gvq/shape": lambda scene, rng: ask_whole_attribute(scene, rng, "shape"),
    "gvq/motion": ask_whole_motion,
    "gvq/order": ask_order,
    "gvq/count": ask_count,
    "rar/colour": lambda scene, rng: ask_moment_attribute(scene, rng, "colour"),
    "rar/shape": lambda scene, rng: ask_moment_attribute(scene, rng, "shape"),
    "rar/object": ask_moment_object,
    "rar/motion": ask_moment_motion,
    "rar/position": ask_position,
}

__all__ = ["ABSENT_SHARE", "ASKERS", "GROUNDING_TASKS", "MAX_EVIDENCE", "THINNED", "Asking", "Query"]
