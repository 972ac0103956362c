# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The world of moving shapes: what a scene holds, when its events happen, and where its objects are at any time.

A scene is a pure function of (difficulty, split, index, seed). Lengths are fractions of the square canvas, so that a
scene can be drawn at any size; times are seconds on the grid of the file's frames, exact in binary floating point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np


FILE_FPS = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 30, 35),
    "green": (25, 170, 45),
    "blue": (50, 85, 255),
    "yellow": (250, 225, 30),
    "purple": (175, 45, 215),
    "cyan": (40, 220, 225),
}
BASE_SHAPES = ("circle", "square", "triangle", "star")
EXTRA_SHAPES = ("cross", "ring")
# never drawn in train, validation and test; the only objects of the split `heldout`. Every colour once.
HELD_OUT_PAIRS = (
    ("red", "star"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("yellow", "square"),
    ("purple", "circle"),
    ("cyan", "square"),
)

MOVES: dict[str, tuple[int, int]] = {  # direction of the displacement (x to the right, y downwards)
    "move_left": (-1, 0),
    "move_right": (1, 0),
    "move_up": (0, -1),
    "move_down": (0, 1),
}
DIRECTIONS = np.array(list(MOVES.values()), dtype=float)  # (4, 2)
SPLITS = ("train", "validation", "test", "heldout")


@dataclass(frozen=True)
class Difficulty:
    """The named numbers of one difficulty level; pairs are (lowest, highest), both included."""

    code: int  # enters the random seed
    shapes: tuple[str, ...]
    states: tuple[str, ...]  # events that change the look of an object for their span; the four moves are added
    objects: tuple[int, int]
    events: tuple[int, int]
    max_repeats: int  # how often the featured event of a scene may happen
    seconds: tuple[float, float]  # length of the video
    event_seconds: tuple[float, float]  # length of an event
    grid: float  # event boundaries are multiples of this many seconds
    overlap: float  # share of the scenes in which events of different objects may overlap in time
    radius: tuple[float, float]  # canvases
    noise: float  # standard deviation, in levels of 255
    background: float  # amplitude of its gradient and tint, in levels of 255
    shake: float  # amplitude of the camera's shake, in canvases
    distractors: tuple[int, int]  # grey shapes that stand still

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of events of this level."""
        return (*self.states, *MOVES)


DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(
        code=0,
        shapes=BASE_SHAPES,
        states=("appear", "flash"),
        objects=(1, 2),
        events=(1, 2),
        max_repeats=2,
        seconds=(8.0, 10.0),
        event_seconds=(2.0, 4.0),
        grid=0.5,
        overlap=0.0,
        radius=(0.13, 0.15),
        noise=0.0,
        background=0.0,
        shake=0.0,
        distractors=(0, 0),
    ),
    "middle": Difficulty(
        code=1,
        shapes=BASE_SHAPES,
        states=("appear", "flash", "grow"),
        objects=(2, 3),
        events=(2, 4),
        max_repeats=3,
        seconds=(11.0, 14.0),
        event_seconds=(2.0, 5.0),
        grid=0.25,
        overlap=0.5,
        radius=(0.12, 0.14),
        noise=5.0,
        background=12.0,
        shake=0.0,
        distractors=(0, 0),
    ),
    "hard": Difficulty(
        code=2,
        shapes=BASE_SHAPES + EXTRA_SHAPES,
        states=("appear", "flash", "grow", "shrink"),
        objects=(3, 5),
        events=(3, 7),
        max_repeats=3,
        seconds=(14.0, 24.0),
        event_seconds=(2.0, 6.0),
        grid=0.125,
        overlap=0.9,
        radius=(0.10, 0.12),
        noise=10.0,
        background=25.0,
        shake=0.02,
        distractors=(1, 2),
    ),
}

EDGE_SECONDS = 0.5  # nothing happens in the first and the last half second
SAME_OBJECT_GAP = 1.5  # seconds between two events of one object
OTHER_OBJECT_GAP = 0.75  # seconds between events of different objects where they may not overlap
START_GAP = 0.75  # seconds between the starts of any two events, so that their order can be seen
DURATION_GRID = 0.5
MOVE_DISTANCE = (0.38, 0.62)  # canvases
GROW_FACTOR = 1.6
SHRINK_FACTOR = 0.55
BORDER = 0.03  # canvases kept free around the picture
SPACING = (1.1, 0.85)  # distance of two objects in sums of their radii: wished for, and accepted in the last round
PLACEMENT_ROUNDS = 4
PLACEMENT_TRIES = 48  # at once in one round
SCHEDULE_TRIES = 200
FLASH_SECONDS = 0.5  # length of one look: two frames per second see it change at every sample
MOVE_SHARE = 0.5  # share of the scenes whose featured (repeatable) event is a move
BACKGROUND_LEVEL = 40.0
DISTRACTOR_LEVEL = (105, 150)
SHAKE_HERTZ = (0.3, 1.1)


@dataclass(frozen=True)
class ShapeObject:
    """One coloured shape; `start` is the centre before any move, (x, y) in canvases."""

    colour: str
    shape: str
    radius: float
    start: tuple[float, float]


@dataclass(frozen=True)
class Event:
    """Something that object number `actor` does over [start, end] seconds; `shift` is a move's (dx, dy) in canvases."""

    actor: int
    kind: str
    start: float
    end: float
    shift: tuple[float, float] = (0.0, 0.0)

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) in seconds."""
        return (self.start, self.end)


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about one video. `featured` is the (actor, verb) whose count was drawn uniformly."""

    difficulty: str
    split: str
    index: int
    seed: int
    duration: float
    objects: tuple[ShapeObject, ...]
    events: tuple[Event, ...]
    featured: tuple[int, str]
    distractors: tuple[tuple[str, int, float, float, float], ...]  # shape, grey level, radius, x, y
    texture_seed: int
    file_fps: int = FILE_FPS

    @property
    def num_frames(self) -> int:
        """Frames of the file."""
        return round(self.duration * self.file_fps)

    @property
    def times(self) -> np.ndarray:
        """(num_frames,) true times of the file's frames, seconds."""
        return np.arange(self.num_frames) / self.file_fps

    @property
    def name(self) -> str:
        """Name that no other scene has."""
        return f"shapes-{self.difficulty}-{self.split}-{self.seed}-{self.index:06d}"


def verb_of(kind: str) -> str:
    """Return the verb of an event kind: the four moves share the verb `move`, the others are their own."""
    return "move" if kind in MOVES else kind


def pairs_of(difficulty: str, split: str) -> list[tuple[str, str]]:
    """Return the (colour, shape) pairs that may occur at this difficulty in this split."""
    if split == "heldout":
        return list(HELD_OUT_PAIRS)
    shapes = DIFFICULTIES[difficulty].shapes
    return [(colour, shape) for shape in shapes for colour in COLOURS if (colour, shape) not in HELD_OUT_PAIRS]


def scene_rng(difficulty: str, split: str, index: int, seed: int, stream: int = 0) -> np.random.Generator:
    """Return the random numbers of one scene: splits, levels, indices, seeds and streams never share any.

    Args:
        difficulty (`str`): Name of the level.
        split (`str`): Name of the split.
        index (`int`): Number of the scene in its split, from 0, without upper bound.
        seed (`int`): Seed of the whole data set.
        stream (`int`, *optional*, defaults to 0): 0 for the scene, 1 for its rows.

    Returns:
        `np.random.Generator`

    Raises:
        ValueError: If the difficulty or the split is unknown, or a number is negative.
    """
    if difficulty not in DIFFICULTIES:
        raise ValueError(
            f"Unknown difficulty {difficulty!r}: the shapes world has three levels. Use one of {list(DIFFICULTIES)}."
        )
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: every split has its own random seeds. Use one of {list(SPLITS)}.")
    if index < 0 or seed < 0:
        raise ValueError(f"index={index} and seed={seed} make no random seed: both must be 0 or more. Correct them.")
    return np.random.default_rng([seed, SPLITS.index(split), DIFFICULTIES[difficulty].code, index, stream])


def make_scene(difficulty: str = "middle", split: str = "train", index: int = 0, seed: int = 0) -> Scene:
    """Draw one scene.

    Events are symmetric by construction: all directions, places, colours and moments are equally likely, so that the
    text of a question tells nothing about its answer.

    Args:
        difficulty (`str`, *optional*, defaults to `"middle"`): `"easy"`, `"middle"` or `"hard"`.
        split (`str`, *optional*, defaults to `"train"`): `"train"`, `"validation"`, `"test"` or `"heldout"`.
        index (`int`, *optional*, defaults to 0): Number of the scene in its split.
        seed (`int`, *optional*, defaults to 0): Seed of the whole data set.

    Returns:
        `Scene`: Always the same for the same arguments.

    Raises:
        ValueError: If a name is unknown or a number negative.
    """
    rng = scene_rng(difficulty, split, index, seed)
    level = DIFFICULTIES[difficulty]
    pairs = pairs_of(difficulty, split)
    seconds = _draw_grid(rng, *level.seconds, DURATION_GRID)
    chosen = rng.choice(len(pairs), size=rng.integers(level.objects[0], level.objects[1] + 1), replace=False)
    featured = (0, "move" if rng.random() < MOVE_SHARE else str(rng.choice(level.states)))
    repeats = int(rng.integers(1, level.max_repeats + 1))
    while True:
        plan = _plan_events(rng, level, len(chosen), featured[1], repeats)
        timed = _schedule(rng, level, plan, seconds)
        placed = None if timed is None else _place(rng, level, timed, len(chosen))
        if placed is not None:
            break
    radii, starts, events = placed
    objects = tuple(
        ShapeObject(*pairs[pair], radius=float(radius), start=(float(x), float(y)))
        for pair, radius, (x, y) in zip(chosen, radii, starts, strict=True)
    )
    distractors = tuple(
        (
            str(rng.choice(level.shapes)),
            int(rng.integers(*DISTRACTOR_LEVEL)),
            float(rng.uniform(*level.radius)),
            float(rng.uniform(0.1, 0.9)),
            float(rng.uniform(0.1, 0.9)),
        )
        for _ in range(rng.integers(level.distractors[0], level.distractors[1] + 1))
    )
    return Scene(
        difficulty=difficulty,
        split=split,
        index=index,
        seed=seed,
        duration=seconds,
        objects=objects,
        events=tuple(sorted(events, key=lambda event: (event.start, event.end))),
        featured=featured,
        distractors=distractors,
        texture_seed=int(rng.integers(2**31)),
    )


def _draw_grid(rng: np.random.Generator, low: float, high: float, grid: float) -> float:
    """Draw a multiple of `grid` from [low, high]."""
    return float(rng.integers(round(low / grid), round(high / grid) + 1)) * grid


def _plan_events(
    rng: np.random.Generator, level: Difficulty, num_objects: int, verb: str, repeats: int
) -> list[tuple[int, str]]:
    """Decide who does what, as (actor, verb): the featured event of object 0, which repeats, and others.

    An object that appears does nothing else, and no other event shares the featured actor and verb.
    """
    plan = [(0, verb)] * repeats
    total = max(repeats, int(rng.integers(level.events[0], level.events[1] + 1)))
    appearing = {0} if verb == "appear" else set()
    acting = {0} - appearing
    while len(plan) < total:
        if num_objects == 1 and verb == "appear":
            break
        other = verb_of(str(rng.choice(level.kinds)))
        barred = acting if other == "appear" else appearing
        # others act if there are any, so that a question must be read to find its object
        actors = [actor for actor in range(min(1, num_objects - 1), num_objects) if actor not in barred]
        if not actors or (actors == [0] and other == verb):
            continue
        actor = int(rng.choice(actors))
        (appearing if other == "appear" else acting).add(actor)
        plan.append((actor, other))
    return plan


def _schedule(
    rng: np.random.Generator, level: Difficulty, plan: list[tuple[int, str]], seconds: float
) -> list[Event] | None:
    """Give every planned event a span on the grid, or return None where that did not work out."""
    together = rng.random() < level.overlap
    for _ in range(SCHEDULE_TRIES):
        order = [plan[i] for i in rng.permutation(len(plan))]
        if together:
            actors = sorted({actor for actor, _ in plan})
            chains = [[event for event in order if event[0] == actor] for actor in actors]
        else:
            chains = [order]
        spans = [_chain(rng, level, chain, seconds) for chain in chains]
        if any(chain is None for chain in spans):
            together = level.overlap > 0  # too long for one after the other
            if not together:
                return None
            continue
        events = [event for chain in spans for event in chain]
        starts = np.sort([event.start for event in events])
        if np.all(np.diff(starts) >= START_GAP):
            return events
    return None


def _chain(
    rng: np.random.Generator, level: Difficulty, chain: list[tuple[int, str]], seconds: float
) -> list[Event] | None:
    """Put events one after the other with random lengths and random room between them; None if there is no room."""
    grid = level.grid
    gaps = [SAME_OBJECT_GAP if first[0] == second[0] else OTHER_OBJECT_GAP for first, second in pairwise(chain)]
    gap_steps = [round(np.ceil(gap / grid)) for gap in gaps]
    # the last frame of the file comes one frame before its end
    room = int((seconds - 1 / FILE_FPS - 2 * EDGE_SECONDS) / grid) - sum(gap_steps)
    low, high = (round(second / grid) for second in level.event_seconds)
    if room < low * len(chain):
        return None
    while True:  # lengths are drawn alike for all events and kinds
        high_now = min(high, max(low, 2 * room // len(chain) - low))
        lengths = rng.integers(low, high_now + 1, size=len(chain))
        if lengths.sum() <= room:
            break
    slack = np.sort(rng.integers(0, room - lengths.sum() + 1, size=len(chain)))
    begin = round(EDGE_SECONDS / grid) + slack + np.concatenate([[0], np.cumsum(lengths[:-1] + gap_steps)]).astype(int)
    return [
        Event(actor, kind, float(first * grid), float((first + length) * grid))
        for (actor, kind), first, length in zip(chain, begin, lengths, strict=True)
    ]


def _place(
    rng: np.random.Generator, level: Difficulty, events: list[Event], num_objects: int
) -> tuple[np.ndarray, np.ndarray, list[Event]] | None:
    """Find radii, first centres and displacements with which no two objects touch; None if that did not work out.

    Directions are drawn here, together with the places, so that crowding changes none of their symmetry. One object
    after the other gets the first of many random places that is clear of those before it.
    """
    knots = np.unique([0.0, *(time for event in events for time in event.span)])
    times = np.interp(np.arange(4 * len(knots) - 3) / 4, np.arange(len(knots)), knots)  # paths are straight in between
    radii = rng.uniform(*level.radius, size=num_objects)
    sizes = np.repeat(radii[:, None], len(times), 1)  # (O, T)
    for event in events:
        if event.kind == "grow":
            sizes[event.actor, (times >= event.start) & (times <= event.end)] = radii[event.actor] * GROW_FACTOR
    starts, paths, placed = np.empty((num_objects, 2)), np.empty((num_objects, len(times), 2)), []
    for actor in range(num_objects):
        own = [event for event in events if event.actor == actor]
        moves = [event for event in own if event.kind == "move"]
        progress = np.array([(times - move.start) / (move.end - move.start) for move in moves]).clip(0, 1)  # (M, T)
        for spacing in np.linspace(*SPACING, PLACEMENT_ROUNDS):
            ways = rng.integers(len(MOVES), size=(PLACEMENT_TRIES, len(moves)))
            shifts = DIRECTIONS[ways] * rng.uniform(*MOVE_DISTANCE, size=(*ways.shape, 1))  # (A, M, 2)
            offsets = progress.reshape(len(moves), -1).T @ shifts if moves else np.zeros((PLACEMENT_TRIES, 1, 2))
            margin = sizes[actor].max() + BORDER + level.shake
            low, high = margin - offsets.min(1), 1 - margin - offsets.max(1)  # (A, 2)
            begin = low + (high - low) * rng.random(low.shape)
            tried = np.broadcast_to(begin[:, None] + offsets, (PLACEMENT_TRIES, len(times), 2))
            squares = np.square(tried[:, None] - paths[:actor]).sum(-1)  # (A, placed, T)
            clear = squares >= (spacing * (sizes[actor] + sizes[:actor])) ** 2
            fits = np.all(high >= low, axis=1) & np.all(clear, axis=(1, 2))
            if fits.any():
                break
        else:
            return None
        best = int(fits.argmax())
        starts[actor], paths[actor] = begin[best], tried[best]
        placed += [event for event in own if event.kind != "move"]
        placed += [
            replace(move, kind=list(MOVES)[way], shift=(float(dx), float(dy)))
            for move, way, (dx, dy) in zip(moves, ways[best], shifts[best], strict=True)
        ]
    return radii, starts, placed


__all__ = [
    "BASE_SHAPES",
    "COLOURS",
    "DIFFICULTIES",
    "EXTRA_SHAPES",
    "FILE_FPS",
    "HELD_OUT_PAIRS",
    "MOVES",
    "SPLITS",
    "Difficulty",
    "Event",
    "Scene",
    "ShapeObject",
    "make_scene",
    "pairs_of",
    "scene_rng",
    "verb_of",
]
