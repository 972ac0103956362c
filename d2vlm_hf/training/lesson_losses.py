# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Losses of the lessons in `warmup.py`: predictions of small heads against what the renderer knows.

Shapes: N frames, Q questions, T frames of one video, K objects at most.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.shapes_language import POSITIONS
from ..data.shapes_lessons import COLOUR_NAMES, EVENT_KINDS, SHAPE_NAMES, LessonBatch


LOOKS = len(COLOUR_NAMES) + 1  # the colours, and the white of a flash
PATCH_PARTS = {"look": LOOKS + 1, "shape": len(SHAPE_NAMES) + 1, "dark_big": 2, "centre": 2}
WORDS = len(COLOUR_NAMES) + len(SHAPE_NAMES) + len(EVENT_KINDS)
PAIRS = LOOKS * len(SHAPE_NAMES)
COLOURS = len(COLOUR_NAMES)
FRAME_PARTS = {
    "count": 3, "centre": 2, "dark_big": 2, "look": LOOKS, "shape": len(SHAPE_NAMES), "words": WORDS, "pairs": PAIRS,
    "places": 2 * COLOURS,
}  # fmt: skip
STATE_PARTS = {
    "active": 1, "doing": len(EVENT_KINDS), "asked": len(EVENT_KINDS), "colour": COLOURS, "shape": len(SHAPE_NAMES),
    "deeds": COLOURS * len(EVENT_KINDS), "deeds_of_shapes": len(SHAPE_NAMES) * len(EVENT_KINDS), "shifts": 2 * COLOURS,
    "part": len(POSITIONS),
}  # fmt: skip
SHIFT_SCALE = 5.0  # a move goes about a tenth of a canvas from one frame to the next
MAX_ORDER = 6  # events told apart by their order
WORD_PARTS = {"order": MAX_ORDER}
MOMENT_PARTS = {"query": 64, "key": 64}
OBJECT_REACH = (0.16, 0.24)  # canvases from a centre to the patches that show a normal and a big object
OTHERS_WEIGHT = 0.2  # of objects that the question does not name


class LessonHeads(nn.Module):
    """LayerNorm and one linear map, its output split by name."""

    def __init__(self, width: int, parts: dict[str, int]):
        super().__init__()
        self.parts = parts
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, sum(parts.values()))

    def forward(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        values = self.out(self.norm(states)).float().split(list(self.parts.values()), dim=-1)
        return dict(zip(self.parts, values, strict=True))


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values[n, index[n, ...]]` along the objects: `(N, K, ...)`, `(N, P)` -> `(N, P, ...)`."""
    return values[torch.arange(len(values))[:, None], index]


def patch_loss(heads: dict[str, torch.Tensor], batch: LessonBatch) -> dict[str, torch.Tensor]:
    """What lies in each patch of each frame: nothing, or the look and place of the nearest object."""
    side = int(heads["look"].shape[1] ** 0.5)
    middle = (torch.arange(side) + 0.5) / side
    places = torch.stack(torch.meshgrid(middle, middle, indexing="ij")[::-1], -1).reshape(-1, 2)  # (P, 2) as x, y
    distance = (batch.centre[:, None] - places[None, :, None]).norm(dim=-1)  # (N, P, K)
    reach = torch.where(batch.big, OBJECT_REACH[1], OBJECT_REACH[0])[:, None]
    distance = torch.where(batch.present[:, None] & (distance < reach), distance, torch.inf)
    nearest, index = distance.min(-1)
    covered = nearest < torch.inf  # (N, P)
    look = torch.where(covered, _take(batch.look, index) + 1, 0)
    shape = torch.where(covered, _take(batch.shape, index) + 1, 0)
    state = torch.stack([_take(batch.dark, index), _take(batch.big, index)], -1).float()
    return {
        "look": F.cross_entropy(heads["look"].flatten(0, 1), look.flatten()),
        "shape": 2 * F.cross_entropy(heads["shape"].flatten(0, 1), shape.flatten()),
        "state": F.binary_cross_entropy_with_logits(heads["dark_big"][covered], state[covered]),
        "centre": 4 * (heads["centre"] - _take(batch.centre, index)).abs()[covered].mean(),
        "shape_accuracy": (heads["shape"].argmax(-1) == shape)[covered].float().mean().detach(),
    }


def by_kind(
    values: torch.Tensor, kind: torch.Tensor, kinds: int, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What holds for the only wanted object of each colour, or of each shape.

    Args:
        values (`torch.Tensor` of shape `(..., K, D)`): Of K objects.
        kind (`torch.LongTensor` of shape `(..., K)`): Their colours or shapes.
        kinds (`int`): How many of these there are.
        wanted (`torch.BoolTensor` of shape `(..., K)`): Objects that count.

    Returns:
        `(..., kinds, D)`, and a mask of shape `(..., kinds)`: True where there is exactly one.
    """
    members = (F.one_hot(kind, kinds) * wanted[..., None]).to(values.dtype)  # (..., K, kinds)
    return members.mT @ values, members.sum(-2) == 1


def frame_loss(
    heads: dict[str, torch.Tensor], batch: LessonBatch, frames: torch.Tensor, questions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How many objects of those that the question names are there, where each is, and how the only one of them looks.

    Args:
        heads: Predictions for N pairs of a question and a frame.
        batch (`LessonBatch`): The truth.
        frames, questions (`torch.LongTensor` of shape `(N,)`): The frame and the question of each pair.
    """
    matched = batch.matched[questions]
    present = batch.present[frames]
    seen = matched & present  # (N, K)
    count = seen.sum(1).clamp(max=2)
    (single,) = torch.where(count == 1)
    one = seen[single].float().argmax(1)  # the object
    look, shape, centre = (getattr(batch, name)[frames[single], one] for name in ("look", "shape", "centre"))
    state = torch.stack([batch.dark[frames[single], one], batch.big[frames[single], one]], -1).float()
    pair = batch.look[frames] * len(SHAPE_NAMES) + batch.shape[frames]  # (N, K)
    weight = torch.where(matched, 1.0, OTHERS_WEIGHT) * present
    there = torch.zeros_like(heads["pairs"]).scatter_add_(1, pair, weight)
    pairs = F.binary_cross_entropy_with_logits(heads["pairs"], (there > 0).float(), reduction="none")
    places, alone = by_kind(batch.centre[frames], batch.colour[frames], COLOURS, seen)
    misplaced = (heads["places"].unflatten(-1, (COLOURS, 2)) - places).abs().sum(-1)
    return {
        "places": 4 * misplaced[alone].mean(),
        "count": F.cross_entropy(heads["count"], count),
        "centre": 4 * (heads["centre"][single] - centre).abs().sum(-1).mean(),
        "state": F.binary_cross_entropy_with_logits(heads["dark_big"][single], state),
        "look": F.cross_entropy(heads["look"][single], look),
        "shape": F.cross_entropy(heads["shape"][single], shape),
        "words": 4 * F.binary_cross_entropy_with_logits(heads["words"], batch.words[questions].float()),
        "pairs": (pairs * torch.where(there > 0, there, 1.0)).sum(1).mean(),
        "count_accuracy": (heads["count"].argmax(1) == count).float().mean().detach(),
    }


def per_question(batch: LessonBatch, values: torch.Tensor) -> torch.Tensor:
    """What is known of each frame, for each question about its video: `(N, ...)` -> `(Q, T, ...)`, padded."""
    per_video = values.split(batch.num_frames.tolist())
    return pad_sequence([per_video[video] for video in batch.video_index.tolist()], batch_first=True)


def frame_shifts(batch: LessonBatch) -> torch.Tensor:
    """How far each object goes from the frame before to the frame after each one, times `SHIFT_SCALE`: `(N, K, 2)`."""
    last = batch.num_frames.cumsum(0) - 1
    video = torch.arange(len(last)).repeat_interleave(batch.num_frames)
    here = torch.arange(len(video))
    after = torch.minimum(here + 1, last[video])
    before = torch.maximum(here - 1, (last + 1 - batch.num_frames)[video])
    return SHIFT_SCALE * (batch.centre[after] - batch.centre[before])


def matched_events(batch: LessonBatch) -> torch.Tensor:
    """Which events of the objects that a question names go on in each frame: `(Q, T, K, kinds)`."""
    return per_question(batch, batch.doing) & batch.matched[:, None, :, None]


def asked_events(batch: LessonBatch) -> torch.Tensor:
    """Those of them that are of a kind the question names: `(Q, T, K, kinds)`."""
    return matched_events(batch) & batch.asked[:, None, None, :]


def state_loss(heads: dict[str, torch.Tensor], batch: LessonBatch, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the named object does and where, in each frame, whether that is asked for, and who does what is asked for.

    Args:
        heads: Predictions, `(Q, T, ...)`.
        batch (`LessonBatch`): The truth.
        mask (`torch.BoolTensor` of shape `(Q, T)`): True on real frames.
    """
    doing = matched_events(batch)
    asked = asked_events(batch)
    actors = asked.any(-1)  # (Q, T, K)
    alone = mask & (actors.sum(-1) == 1)
    one = actors.float().argmax(-1, keepdim=True)
    colour, shape, present = (per_question(batch, getattr(batch, name)) for name in ("colour", "shape", "present"))
    active = asked.flatten(2).any(-1)
    real = batch.matched[:, None] & mask[..., None]
    seen = real & present
    part = (per_question(batch, batch.part) * seen).sum(-1)  # (Q, T), of the only one
    deeds, _ = by_kind(doing.float(), colour, COLOURS, real)
    of_shapes, _ = by_kind(doing.float(), shape, len(SHAPE_NAMES), real)
    shifts, single = by_kind(per_question(batch, frame_shifts(batch)), colour, COLOURS, seen)
    wrong = (heads["shifts"].unflatten(-1, (COLOURS, 2)) - shifts).abs().sum(-1)

    def entropy(name: str, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(heads[name][mask], target[mask].float())

    def choice(name: str, target: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        total = F.cross_entropy(heads[name][where], target[where], reduction="sum")
        return total / where.sum().clamp(min=1)  # a few videos may hold no such frame

    found = (heads["active"][..., 0] > 0)[mask]
    return {
        "active": 3 * entropy("active", active[..., None]),
        "doing": 3 * entropy("doing", doing.any(2)),
        "asked": 3 * entropy("asked", asked.any(2)),
        "deeds": 12 * entropy("deeds", deeds.flatten(2) > 0),
        "deeds_of_shapes": 12 * entropy("deeds_of_shapes", of_shapes.flatten(2) > 0),
        "shifts": 2 * wrong[single].sum() / single.sum().clamp(min=1),
        "part": 2 * choice("part", part, seen.sum(-1) == 1),
        "colour": choice("colour", colour.gather(2, one)[..., 0], alone),
        "shape": choice("shape", shape.gather(2, one)[..., 0], alone),
        "active_iou": ((found & active[mask]).sum() / (found | active[mask]).sum().clamp(min=1)).detach(),
    }


def order_loss(logits: torch.Tensor, batch: LessonBatch, mask: torch.Tensor) -> torch.Tensor:
    """The how-manieth of the asked events goes on in each frame, in the order of their starts.

    Args:
        logits (`torch.Tensor` of shape `(Q, T, MAX_ORDER)`): Predictions.
        batch (`LessonBatch`): The truth.
        mask (`torch.BoolTensor` of shape `(Q, T)`): True on real frames.
    """
    asked = asked_events(batch)  # (Q, T, K, E)
    begins = asked & ~F.pad(asked, (0, 0, 0, 0, 1, 0))[:, :-1]
    # ordinal of the latest start of each object and kind: starts before it, plus those at its own frame that come first
    flat = begins.flatten(2)  # (Q, T, K * E)
    number = flat.flatten(1).long().cumsum(1).view_as(flat)
    latest = torch.where(flat, number, 0).cummax(1).values
    current = torch.where(asked.flatten(2), latest, 0)  # (Q, T, K * E), 0 where nothing goes on
    target = (current[..., None] == torch.arange(1, MAX_ORDER + 1)).any(2)  # (Q, T, MAX_ORDER)
    return F.binary_cross_entropy_with_logits(logits[mask], target[mask].float())


__all__ = [
    "FRAME_PARTS",
    "MOMENT_PARTS",
    "PATCH_PARTS",
    "STATE_PARTS",
    "WORD_PARTS",
    "LessonHeads",
    "asked_events",
    "frame_loss",
    "matched_events",
    "order_loss",
    "patch_loss",
    "state_loss",
]
