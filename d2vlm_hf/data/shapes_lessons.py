# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""First lessons in seeing: what the renderer knows about every frame, as dense targets.

The paper starts from a tower and a Q-Former that have seen millions of pictures. A model from nothing learns from
answers alone far too slowly, so it is first told what is in each patch, what the object that a question names looks
like, and what it is doing (`training/warmup.py`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from .shapes import make_rows, make_scene, object_states, render_frames
from .shapes_language import VERBS
from .shapes_tasks import ABSENT_SHARE, part_of_picture
from .shapes_world import BASE_SHAPES, COLOURS, EXTRA_SHAPES, MOVES, Scene, verb_of


COLOUR_NAMES, SHAPE_NAMES = (*COLOURS,), (*BASE_SHAPES, *EXTRA_SHAPES)
WHITE_LOOK = len(COLOUR_NAMES)  # a flashing object is white at times: a seventh colour
EVENT_KINDS = (*(kind for kind in VERBS if verb_of(kind) == kind and kind != "move"), *MOVES)
MAX_OBJECTS = 5
CHOICES = {"gvq": 0.55, "rar": 0.45}
ECHO_LAG = 100  # new batches between two uses of one
FIRST_LESSON_SCENE = 1_000_000  # supervised rows use none of the scenes from here on

_SUBJECT = re.compile(rf"\b(?:({'|'.join(COLOUR_NAMES)}) )?({'|'.join(SHAPE_NAMES)}|shape)\b")
_VERBS = {
    kind: re.compile(rf"\b(?:{'|'.join(word for form in forms for word in form)})\b") for kind, forms in VERBS.items()
}


def named_subjects(text: str) -> set[tuple[str | None, str | None]]:
    """The (colour, shape) pairs that a text names; None stands for any."""
    return {(colour or None, None if shape == "shape" else shape) for colour, shape in _SUBJECT.findall(text)}


def named_kinds(text: str) -> set[str]:
    """The kinds of events that a text names; `move` without a direction names all four moves."""
    kinds = {kind for kind, pattern in _VERBS.items() if pattern.search(text)}
    directed = kinds & set(MOVES)
    return (kinds - {"move"}) | (set(MOVES) if "move" in kinds and not directed else set())


@dataclass
class LessonBatch:
    """Frames of several videos, questions about them, and what is true; N frames, Q questions, K objects at most.

    Attributes:
        pixels (`torch.Tensor` of shape `(N, 3, size, size)`): uint8.
        num_frames (`torch.LongTensor` of shape `(videos,)`): Frames of each video.
        present, dark, big (`torch.BoolTensor` of shape `(N, K)`): Whether an object can be seen, is dark, is big.
        look (`torch.LongTensor` of shape `(N, K)`): Its colour as it looks now.
        colour, shape (`torch.LongTensor` of shape `(N, K)`): Its own colour and shape.
        centre (`torch.Tensor` of shape `(N, K, 2)`): Where it is, in canvases.
        part (`torch.LongTensor` of shape `(N, K)`): The part of the picture that is in, an index of `POSITIONS`.
        doing (`torch.BoolTensor` of shape `(N, K, kinds)`): Which events of it go on.
        questions (`list[str]`), video_index (`torch.LongTensor` of shape `(Q,)`): Questions and their videos.
        matched (`torch.BoolTensor` of shape `(Q, K)`): Objects that fit a subject of the question.
        asked (`torch.BoolTensor` of shape `(Q, kinds)`): Kinds of events that the question names, all if it names none.
        words (`torch.BoolTensor` of shape `(Q, colours + shapes + kinds)`): What the question mentions.
        rows (`list[dict]`): The questions as rows of the schema, with answers and videos.
        inputs (`dict`, *optional*): The rows as the model's inputs, once they were encoded.
    """

    pixels: torch.Tensor
    num_frames: torch.Tensor
    present: torch.Tensor
    dark: torch.Tensor
    big: torch.Tensor
    look: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    centre: torch.Tensor
    part: torch.Tensor
    doing: torch.Tensor
    questions: list[str]
    video_index: torch.Tensor
    matched: torch.Tensor
    asked: torch.Tensor
    words: torch.Tensor
    rows: list[dict]
    inputs: dict | None = None


def frame_labels(scene: Scene, times: np.ndarray) -> dict[str, np.ndarray]:
    """What is to be seen of every object at every time: the per-frame fields of a [`LessonBatch`], T frames.

    Args:
        scene (`Scene`): The scene.
        times (`np.ndarray` of shape `(T,)`): Seconds.
    """
    states, count = object_states(scene, times), len(scene.objects)
    labels = {name: np.zeros((len(times), MAX_OBJECTS), bool) for name in ("present", "dark", "big")}
    labels |= {name: np.zeros((len(times), MAX_OBJECTS), np.int64) for name in ("look", "colour", "shape")}
    labels["centre"] = np.zeros((len(times), MAX_OBJECTS, 2), np.float32)
    labels["doing"] = np.zeros((len(times), MAX_OBJECTS, len(EVENT_KINDS)), bool)
    labels["present"][:, :count] = states["visible"].T
    labels["dark"][:, :count] = states["flash"].T == 2
    labels["centre"][:, :count] = states["centre"].swapaxes(0, 1)
    labels["part"] = part_of_picture(labels["centre"])
    for actor, thing in enumerate(scene.objects):
        colour = COLOUR_NAMES.index(thing.colour)
        labels["colour"][:, actor], labels["shape"][:, actor] = colour, SHAPE_NAMES.index(thing.shape)
        labels["look"][:, actor] = np.where(states["flash"][actor] == 1, WHITE_LOOK, colour)
        labels["big"][:, actor] = states["radius"][actor] > 1.2 * thing.radius
    for event in scene.events:
        inside = (times >= event.start) & (times <= event.end)
        labels["doing"][inside, event.actor, EVENT_KINDS.index(event.kind)] = True
    return labels


def question_labels(scene: Scene, question: str) -> dict[str, np.ndarray]:
    """What a question is about: `matched`, `asked` and `words` of a [`LessonBatch`], for one question."""
    subjects, kinds = named_subjects(question), named_kinds(question)
    matched = np.zeros(MAX_OBJECTS, bool)
    for actor, thing in enumerate(scene.objects):
        matched[actor] = not subjects or any(
            colour in (None, thing.colour) and shape in (None, thing.shape) for colour, shape in subjects
        )
    colours, shapes = {colour for colour, _ in subjects}, {shape for _, shape in subjects}
    named = np.array([kind in kinds for kind in EVENT_KINDS])
    words = np.array([*(name in colours for name in COLOUR_NAMES), *(name in shapes for name in SHAPE_NAMES), *named])
    return {"matched": matched, "asked": named if kinds else np.ones(len(EVENT_KINDS), bool), "words": words}


class ShapesLessons(Dataset):
    """Frames of train scenes with all that is known about them, and questions; every item is another scene.

    Args:
        length (`int`): Number of scenes.
        size (`int`): Height and width of the frames, pixels.
        fps (`float`): Frames per second.
        frames (`int`, *optional*): So many random frames of each scene; default: all.
        questions (`int`): Questions about each scene, at most.
        difficulties (`Sequence[str]`): Levels to take scenes from, in turn.
        task_weights (`Mapping[str, float]`, *optional*): As in `ShapesConfig`.
        start (`int`): First scene.
        seed (`int`): Seed of the scenes.
        absent_share (`float`): As in `make_rows`.
    """

    def __init__(
        self,
        length: int,
        size: int,
        fps: float,
        frames: int | None = None,
        questions: int = 4,
        difficulties: Sequence[str] = ("easy", "middle", "middle", "middle"),
        task_weights: Mapping[str, float] | None = None,
        start: int = FIRST_LESSON_SCENE,
        seed: int = 0,
        absent_share: float = ABSENT_SHARE,
    ):
        self.absent_share = absent_share
        self.length, self.size, self.fps, self.frames, self.questions = length, size, fps, frames, questions
        self.difficulties, self.task_weights = tuple(difficulties), task_weights
        self.start, self.seed = start, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        scene = make_scene(self.difficulties[index % len(self.difficulties)], "train", self.start + index, self.seed)
        times = np.arange(0, scene.duration, 1 / self.fps)
        if self.frames is not None:
            rng = np.random.default_rng([self.seed, self.start + index])
            times = np.sort(rng.choice(times, self.frames, replace=False))
        rows = make_rows(scene, self.questions, self.task_weights, "rendered", self.absent_share)
        rows = rows or make_rows(scene, 1, {"dvc": 1.0}, "rendered")
        frames = render_frames(scene, times, self.size)
        about = [question_labels(scene, row["question"]) for row in rows]
        video = {"frames": frames, "timestamps": times}
        return {
            "pixels": frames,
            **frame_labels(scene, times),
            "rows": [{**row, "video": video} for row in rows],
            **{name: np.stack([labels[name] for labels in about]) for name in about[0]},
        }


class ChoiceTexts(Dataset):
    """Options and the answers to them as text, without the video: finding the letter of what has been said.

    Every item holds the rows of another train scene, their questions cut down to the options.

    Args:
        length (`int`): Number of scenes.
        rows (`int`): Rows of each scene, at most.
        start (`int`): First scene.
        seed (`int`): Seed of the scenes.
    """

    def __init__(self, length: int, rows: int = 2, start: int = FIRST_LESSON_SCENE, seed: int = 0):
        self.length, self.rows, self.start, self.seed = length, rows, start, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[dict]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rows = make_rows(make_scene("middle", "train", self.start + index, self.seed), self.rows, CHOICES, "none")
        return [{**row, "question": row["question"][row["question"].index("Options:") :]} for row in rows]


def collate_lessons(items: Sequence[dict]) -> LessonBatch:
    """Pack the frames and questions of several scenes."""
    names = [name for name in items[0] if name not in ("pixels", "rows")]
    joined = {name: torch.from_numpy(np.concatenate([item[name] for item in items])) for name in names}
    return LessonBatch(
        pixels=torch.from_numpy(np.concatenate([item["pixels"] for item in items])).permute(0, 3, 1, 2),
        num_frames=torch.tensor([len(item["pixels"]) for item in items]),
        questions=[row["question"] for item in items for row in item["rows"]],
        video_index=torch.tensor([place for place, item in enumerate(items) for _ in item["rows"]]),
        rows=[row for item in items for row in item["rows"]],
        **joined,
    )


def batch_order(steps: int, uses: int) -> list[int]:
    """The number of the batch that each step shows: new ones, and between them those of `ECHO_LAG` new ones before."""
    order: list[int] = []
    new = 0
    while len(order) < steps:
        echoes = [new - use * ECHO_LAG for use in range(1, uses)]
        order += [new, *(number for number in echoes if number >= 0)]
        new += 1
    return order[:steps]


def repeated(batches: Iterable, order: list[int]) -> Iterator:
    """Batches in that order, each loaded once and kept for as long as it will be used again."""
    loaded, left, kept = iter(batches), Counter(order), {}
    for number in order:
        if number not in kept:
            kept[number] = next(loaded)
        left[number] -= 1
        yield kept[number] if left[number] else kept.pop(number)


__all__ = [
    "COLOUR_NAMES",
    "EVENT_KINDS",
    "FIRST_LESSON_SCENE",
    "SHAPE_NAMES",
    "ChoiceTexts",
    "LessonBatch",
    "ShapesLessons",
    "batch_order",
    "collate_lessons",
    "repeated",
]
