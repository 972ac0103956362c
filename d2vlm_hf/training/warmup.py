# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Warm-up of a model from nothing on the shapes world: what pretraining gives the paper's tower and Q-Former.

Four lessons with dense targets from the renderer, each about a larger part of the model:

    patches   the tower:                      what lies in this patch?
    frames    + the connector:                how does the object look that the question names?
    states    + the text model's frame block: what is it doing now, and is that what the question asks for?
    words     the whole model:                the SFT loss, while the frame states go on answering the third lesson

Without the last one the first steps of SFT, whose gradients come from text that is still random, undo the third. The
heads that answer are thrown away; the SFT that follows trains the model itself.
"""

import logging
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.collators import SFTCollator
from ..data.shapes_lessons import COLOUR_NAMES, EVENT_KINDS, SHAPE_NAMES, LessonBatch, ShapesLessons, collate_lessons


logger = logging.getLogger(__name__)

LESSONS = ("patches", "frames", "states", "words")
LOOKS = len(COLOUR_NAMES) + 1  # the colours, and the white of a flash
PATCH_PARTS = {"look": LOOKS + 1, "shape": len(SHAPE_NAMES) + 1, "dark_big": 2, "centre": 2}
WORDS = len(COLOUR_NAMES) + len(SHAPE_NAMES) + len(EVENT_KINDS)
PAIRS = LOOKS * len(SHAPE_NAMES)
FRAME_PARTS = {
    "count": 3, "centre": 2, "dark_big": 2, "look": LOOKS, "shape": len(SHAPE_NAMES), "words": WORDS, "pairs": PAIRS,
}  # fmt: skip
STATE_PARTS = {
    "active": 1, "doing": len(EVENT_KINDS), "asked": len(EVENT_KINDS), "colour": len(COLOUR_NAMES),
    "shape": len(SHAPE_NAMES),
}  # fmt: skip
MAX_ORDER = 6  # events told apart by their order
OBJECT_REACH = (0.16, 0.24)  # canvases from a centre to the patches that show a normal and a big object
OTHERS_WEIGHT = 0.2  # of objects that the question does not name


@dataclass
class WarmupOptions:
    """Steps and sizes of the lessons.

    Args:
        patches, frames, states, words (`int`): Steps of each lesson.
        batch_size (`int`): Videos in a step of the first two lessons; 4 random frames of each are shown.
        video_batch_size (`int`): Videos in a step of the last two lessons, shown whole.
        questions (`int`): Questions about each video.
        learning_rate (`float`): Of the first lesson; half of it is used for the others.
        task_weights (`dict[str, float]`, *optional*): Shares of the tasks in the last lesson.
        fps (`float`): Frames per second.
        num_workers (`int`): Processes that render.
    """

    patches: int = 1000
    frames: int = 800
    states: int = 1200
    words: int = 2500
    batch_size: int = 32
    video_batch_size: int = 10
    questions: int = 3
    learning_rate: float = 2e-3
    task_weights: dict[str, float] | None = None
    fps: float = 2.0
    num_workers: int = 1


class _Heads(nn.Module):
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


def frame_loss(heads: dict[str, torch.Tensor], batch: LessonBatch, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """How many objects of those that the question names are there, and how the only one of them looks.

    Args:
        heads: Predictions for Q pairs of a question and a frame.
        batch (`LessonBatch`): The truth.
        frames (`torch.LongTensor` of shape `(Q,)`): The frame of each pair.
    """
    present = batch.present[frames]
    seen = batch.matched & present  # (Q, K)
    count = seen.sum(1).clamp(max=2)
    (single,) = torch.where(count == 1)
    one = seen[single].float().argmax(1)  # the object
    look, shape, centre = (getattr(batch, name)[frames[single], one] for name in ("look", "shape", "centre"))
    state = torch.stack([batch.dark[frames[single], one], batch.big[frames[single], one]], -1).float()
    pair = batch.look[frames] * len(SHAPE_NAMES) + batch.shape[frames]  # (Q, K)
    weight = torch.where(batch.matched, 1.0, OTHERS_WEIGHT) * present
    there = torch.zeros_like(heads["pairs"]).scatter_add_(1, pair, weight)
    pairs = F.binary_cross_entropy_with_logits(heads["pairs"], (there > 0).float(), reduction="none")
    return {
        "count": F.cross_entropy(heads["count"], count),
        "centre": 4 * (heads["centre"][single] - centre).abs().sum(-1).mean(),
        "state": F.binary_cross_entropy_with_logits(heads["dark_big"][single], state),
        "look": F.cross_entropy(heads["look"][single], look),
        "shape": F.cross_entropy(heads["shape"][single], shape),
        "words": 4 * F.binary_cross_entropy_with_logits(heads["words"], batch.words.float()),
        "pairs": 0.3 * (pairs * torch.where(there > 0, there, 1.0)).sum(1).mean(),
        "count_accuracy": (heads["count"].argmax(1) == count).float().mean().detach(),
    }


def matched_events(batch: LessonBatch) -> torch.Tensor:
    """Which events of the objects that a question names go on in each frame: `(Q, T, K, kinds)`."""
    per_video = batch.doing.split(batch.num_frames.tolist())
    doing = pad_sequence([per_video[video] for video in batch.video_index.tolist()], batch_first=True)
    return doing & batch.matched[:, None, :, None]


def asked_events(batch: LessonBatch) -> torch.Tensor:
    """Those of them that are of a kind the question names: `(Q, T, K, kinds)`."""
    return matched_events(batch) & batch.asked[:, None, None, :]


def state_loss(heads: dict[str, torch.Tensor], batch: LessonBatch, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the named object is doing in each frame, whether the question asks for it, and who does what is asked for.

    Args:
        heads: Predictions, `(Q, T, ...)`.
        batch (`LessonBatch`): The truth.
        mask (`torch.BoolTensor` of shape `(Q, T)`): True on real frames.
    """
    doing = matched_events(batch)
    asked = asked_events(batch)
    actors = asked.any(-1)  # (Q, T, K)
    alone = mask & (actors.sum(-1) == 1)
    first = batch.num_frames.cumsum(0) - batch.num_frames  # an object's own colour and shape never change
    one = actors.float().argmax(-1)[alone]
    video = batch.video_index[:, None].expand_as(mask)[alone]
    active = asked.flatten(2).any(-1)

    def entropy(name: str, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(heads[name][mask], target[mask].float())

    found = (heads["active"][..., 0] > 0)[mask]
    return {
        "active": 3 * entropy("active", active[..., None]),
        "doing": 3 * entropy("doing", doing.any(2)),
        "asked": 3 * entropy("asked", asked.any(2)),
        "colour": 0.3 * F.cross_entropy(heads["colour"][alone], batch.colour[first[video], one]),
        "shape": 0.3 * F.cross_entropy(heads["shape"][alone], batch.shape[first[video], one]),
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


class Warmup:
    """Runs the lessons on a model; `run` returns the last values of each.

    Args:
        model (`D2VLMForConditionalGeneration`), processor (`D2VLMProcessor`): Changed in place.
        options (`WarmupOptions`): Steps and sizes.
        seed (`int`): Seed of the scenes and of the heads.
        bf16 (`bool`): Compute in bfloat16.
    """

    def __init__(self, model, processor, options: WarmupOptions, seed: int = 0, bf16: bool = False):
        config = model.config
        self.model, self.processor, self.options, self.seed, self.bf16 = model, processor, options, seed, bf16
        self.collator = SFTCollator(processor, fps=options.fps)
        torch.manual_seed(seed)
        self.heads = nn.ModuleDict(
            {
                "patches": _Heads(config.vision_config.hidden_size, PATCH_PARTS),
                "frames": _Heads(config.text_config.hidden_size, FRAME_PARTS),
                "states": _Heads(config.text_config.hidden_size, STATE_PARTS),
                "words": _Heads(config.text_config.hidden_size, {"order": MAX_ORDER}),
            }
        )

    def _pixels(self, batch: LessonBatch) -> torch.Tensor:
        video = self.processor.video_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (video.image_mean, video.image_std))
        return (batch.pixels.float() / 255 - mean) / std

    def patches(self, batch: LessonBatch) -> dict[str, torch.Tensor]:
        """The first lesson's losses."""
        return patch_loss(self.heads["patches"](self.model.model.encode_patches(self._pixels(batch))), batch)

    def frames(self, batch: LessonBatch) -> dict[str, torch.Tensor]:
        """The second lesson's losses: one random frame for each question."""
        patches = self.model.model.encode_patches(self._pixels(batch))
        count, first = batch.num_frames, batch.num_frames.cumsum(0) - batch.num_frames
        offset = (torch.rand(len(batch.questions)) * count[batch.video_index]).long()
        chosen = first[batch.video_index] + offset
        text = self.processor.encode_questions(batch.questions)
        vectors = self.model.model.connector(patches[chosen], text["qformer_input_ids"], text["qformer_attention_mask"])
        seen = patch_loss(self.heads["patches"](patches), batch)
        return {
            **{f"patch_{name}": value for name, value in seen.items()},
            **frame_loss(self.heads["frames"](vectors), batch, chosen),
        }

    def states(self, batch: LessonBatch) -> dict[str, torch.Tensor]:
        """The third lesson's losses: whole videos through the text model's frame block."""
        core = self.model.model
        text = self.processor.encode_questions(batch.questions)
        features = core.get_video_features(
            self._pixels(batch), batch.num_frames, **text, video_index=batch.video_index
        ).pooler_output
        lengths = batch.num_frames[batch.video_index]
        embeds = pad_sequence(list(features), batch_first=True) * core.embedding_scale  # (Q, T, H)
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        positions = torch.arange(embeds.shape[1]).expand(len(lengths), -1)
        outputs = core._run_text_model(embeds, mask.long(), positions, None, mask)
        return state_loss(self.heads["states"](outputs.hidden_states[-2]), batch, mask)

    def words(self, batch: LessonBatch) -> dict[str, torch.Tensor]:
        """The last lesson's losses: those of SFT, and of the third lesson on the same frame states."""
        states = []
        hook = self.model.frame_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        try:
            outputs = self.model(**self.collator(batch.rows))
        finally:
            hook.remove()
        seen = state_loss(self.heads["states"](states[0]), batch, outputs.frame_mask)
        order = order_loss(self.heads["words"](states[0])["order"], batch, outputs.frame_mask)
        config = self.model.config
        return {
            "lm": outputs.lm_loss,
            "grounding": config.grounding_weight * outputs.grounding_loss,
            "consistency": config.consistency_weight * outputs.consistency_loss,
            "order": 3 * order,
            **seen,
        }

    def run(self, output_dir: str | None = None) -> dict[str, float]:
        """All lessons that are not done yet; weights are kept after each, so that a killed run goes on after it."""
        options, results, start = self.options, {}, 0
        for lesson in LESSONS:
            steps = getattr(options, lesson)
            kept = Path(output_dir) / f"warmup-{lesson}.safetensors" if output_dir else None
            if kept and kept.is_file():
                both = nn.ModuleDict({"model": self.model, "heads": self.heads})
                both.load_state_dict(load_file(kept), strict=False)
                self.model.tie_weights()
            elif steps:
                results |= self._lesson(lesson, steps, start)
                if kept:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    both = nn.ModuleDict({"model": self.model, "heads": self.heads})
                    save_file({name: value.contiguous().clone() for name, value in both.state_dict().items()}, kept)
            start += steps * options.batch_size
        return results

    def _lesson(self, lesson: str, steps: int, start: int) -> dict[str, float]:
        options, whole = self.options, lesson in ("states", "words")
        size = options.video_batch_size if whole else options.batch_size
        data = ShapesLessons(
            steps * size, self.model.config.vision_config.image_size, options.fps, None if whole else 4,
            1 if lesson == "patches" else options.questions, seed=self.seed, start=1_000_000 + start,
            task_weights=options.task_weights if lesson == "words" else None,
            **({"difficulties": ("middle",)} if lesson == "words" else {}),
        )  # fmt: skip
        loader = DataLoader(data, size, num_workers=options.num_workers, collate_fn=collate_lessons)
        core = self.model.model
        tower = [] if whole else [core.vision_tower]
        core.vision_tower.requires_grad_(not whole)
        parts = {"patches": [], "frames": [core.connector], "states": [core.connector, core.language_model]}
        trained = [*tower, *parts.get(lesson, [self.model]), self.heads]
        parameters = [p for part in trained for p in part.parameters() if p.requires_grad]
        rate = options.learning_rate if lesson == "patches" else options.learning_rate / 2
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
        warm = min(100, steps // 4 + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, 1.0) * (1 - 0.8 * step / steps)
        )
        recent, started = defaultdict(list), time.time()
        self.model.train()
        bar = tqdm(loader, desc=f"warm-up: {lesson}")
        for step, batch in enumerate(bar, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                losses = getattr(self, lesson)(batch)
            loss = sum(value for name, value in losses.items() if value.requires_grad)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
            optimizer.step()
            schedule.step()
            for name, value in losses.items():
                recent[name].append(value.detach())
            if step % 100 == 0 or step == steps:
                means = {name: float(torch.stack(values).mean()) for name, values in recent.items()}
                text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
                logger.warning("warm-up %s, step %d, %.0f s: %s", lesson, step, time.time() - started, text)
                recent.clear()
        core.vision_tower.requires_grad_(True)
        return {f"warmup/{lesson}/{name}": value for name, value in means.items()}


def warm_up(model, processor, options: dict, output_dir: str | None = None, seed: int = 0, bf16: bool = False) -> dict:
    """Give a model from nothing its first lessons; see the module.

    Args:
        model (`D2VLMForConditionalGeneration`), processor (`D2VLMProcessor`): Changed in place.
        options (`dict`): Fields of [`WarmupOptions`].
        output_dir (`str`, *optional*): Where the weights after each lesson are kept.
        seed (`int`), bf16 (`bool`): As in [`Warmup`].

    Returns:
        `dict[str, float]`: The last values of each lesson that was given now.

    Raises:
        ValueError: If an option is unknown, or the model has no Q-Former.
    """
    known = {field.name for field in fields(WarmupOptions)}
    if unknown := set(options) - known:
        raise ValueError(f"warmup has unknown options {sorted(unknown)}. Use some of {sorted(known)}.")
    if not model.model.connector.uses_text:
        raise ValueError(
            f"warmup needs a connector that reads the question, not {model.config.connector_type!r}: the lessons ask "
            "about what it names. Use connector_type 'qformer', or leave warmup out."
        )
    return Warmup(model, processor, WarmupOptions(**options), seed, bf16).run(output_dir)


__all__ = ["Warmup", "WarmupOptions", "frame_loss", "patch_loss", "state_loss", "warm_up"]
