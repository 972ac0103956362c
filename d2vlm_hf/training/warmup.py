# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Warm-up of a model from nothing on the shapes world: what pretraining gives the paper's tower and Q-Former.

Lessons with dense targets from the renderer, each about a larger part of the model:

    patches   the tower:         what lies in this patch?
    frames    + the connector:   how does the object look that the question names?
    letters   the text model alone: under which letter do the words just said stand among the options?
    words     the text model:    the SFT loss, while the frame states say where the object is, what it is doing, whether
                                 that is what the question asks for, and for the how-manieth time

The heads that answer are thrown away; the SFT that follows trains the model itself.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.collators import IGNORE_INDEX, SFTCollator
from ..data.shapes_language import LETTERS
from ..data.shapes_lessons import (
    FIRST_LESSON_SCENE,
    ChoiceTexts,
    LessonBatch,
    ShapesLessons,
    batch_order,
    collate_lessons,
    repeated,
)
from ..data.shapes_tasks import ABSENT_SHARE, GROUNDING_TASKS
from ..model.evidence_d2vlm import evidence_similarity, frame_distance
from ..model.processing_d2vlm import pad_ids
from ..model.sequence_d2vlm import take_columns, token_columns
from .lesson_losses import (
    FRAME_PARTS,
    MOMENT_PARTS,
    PATCH_PARTS,
    STATE_PARTS,
    WORD_PARTS,
    LessonHeads,
    frame_loss,
    order_loss,
    patch_loss,
    state_loss,
)
from .muon import Muon


logger = logging.getLogger(__name__)

LESSONS = ("patches", "frames", "letters", "words")
MOMENT_WEIGHT = 3  # of finding a given moment among the frames: all that is asked about it waits for that
OTHER_TOKENS = 0.1  # weight of all but the letters in their lesson


@dataclass
class WarmupOptions:
    """Steps and sizes of the lessons.

    Args:
        patches, frames, letters, words (`int`): Steps of each lesson.
        batch_size (`int`): Scenes in a step of the first three lessons; 4 random frames of each are shown, or the texts
            of 2 choice questions.
        video_batch_size (`int`): Videos in a step of the last lesson, shown whole.
        questions (`int`): Questions about each video.
        learning_rate (`float`): Of Muon, for matrices.
        adam_learning_rate (`float`): Of AdamW, for all else.
        last_rate (`float`): Share of the learning rates that is left at the end of a lesson.
        task_weights (`dict[str, float]`, *optional*): Shares of the tasks in the last lesson.
        absent_share (`float`): Share of its grounding questions that ask for something that does not occur.
        stages (`str`): What its answers hold, as in `SFTCollator`.
        fps (`float`): Frames per second.
        num_workers (`int`): Processes that render.
        save_steps (`int`): Steps between two states of a lesson that a killed run can go on from.
        uses (`int`): How often each batch of the last lesson is used: what the frozen tower and connector say is kept,
            so that every use but the first costs about half a step.
        choice_weight (`float`): In the last lesson, weight of a loss on the words of the right option and its letter:
            the few tokens that decide are drowned in the plain mean over all tokens.
        decision_weight (`float`): The same for the first token of answers to grounding questions, which says whether
            there is a moment at all.
    """

    patches: int = 1000
    frames: int = 800
    letters: int = 400
    words: int = 2500
    batch_size: int = 32
    video_batch_size: int = 10
    questions: int = 3
    learning_rate: float = 5e-3
    adam_learning_rate: float = 2e-3
    last_rate: float = 0.2
    task_weights: dict[str, float] | None = None
    absent_share: float = ABSENT_SHARE
    stages: str = "both"
    fps: float = 2.0
    num_workers: int = 1
    save_steps: int = 200
    uses: int = 1
    choice_weight: float = 0.0
    decision_weight: float = 0.0


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
        self.collator = SFTCollator(processor, fps=options.fps, stages=options.stages)
        torch.manual_seed(seed)
        self.heads = nn.ModuleDict(
            {
                "patches": LessonHeads(config.vision_config.hidden_size, PATCH_PARTS),
                "frames": LessonHeads(config.text_config.hidden_size, FRAME_PARTS),
                "states": LessonHeads(config.text_config.hidden_size, STATE_PARTS),
                "words": LessonHeads(config.text_config.hidden_size, WORD_PARTS),
                "moments": LessonHeads(config.text_config.hidden_size, MOMENT_PARTS),
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
        """The second lesson's losses: every question, at every frame of its video."""
        patches = self.model.model.encode_patches(self._pixels(batch))
        of_video = torch.arange(len(patches)).split(batch.num_frames.tolist())
        frames = torch.cat([of_video[video] for video in batch.video_index.tolist()])
        asked = torch.arange(len(batch.questions)).repeat_interleave(batch.num_frames[batch.video_index])
        text = self.processor.encode_questions(batch.questions)
        vectors = self.model.model.connector(
            patches[frames], text["qformer_input_ids"][asked], text["qformer_attention_mask"][asked]
        )
        seen = patch_loss(self.heads["patches"](patches), batch)
        return {
            **{f"patch_{name}": value for name, value in seen.items()},
            **frame_loss(self.heads["frames"](vectors), batch, frames, asked),
        }

    def letters(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The third lesson's losses: on the letters above all, with the rest of the answer given."""
        ids, labels = [], []
        for row in rows:
            prompt = self.processor.encode_prompt(row["question"], 1, 0)
            prompt = [token for token in prompt if token != self.model.config.video_token_id]
            response = list(self.processor.encode_response(row["answer"], len(row["spans"]), "both"))
            ids.append(prompt + response)
            labels.append([IGNORE_INDEX] * len(prompt) + response)
        inputs = pad_ids(ids, self.processor.pad_token_id, side="right")
        targets = pad_ids(labels, IGNORE_INDEX, side="right")["input_ids"][:, 1:]
        tokenizer = self.processor.tokenizer
        opening = torch.tensor([index for token, index in tokenizer.get_vocab().items() if token.endswith("(")])
        named = torch.isin(targets, torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS))))
        named &= torch.isin(inputs["input_ids"][:, :-1], opening)  # words may begin with these letters, too
        others = (targets != IGNORE_INDEX) & ~named
        states = self.model.model.language_model(**inputs).last_hidden_state[:, :-1]
        logits = self.model.lm_head(states[named]).float()
        others_loss = F.cross_entropy(self.model.lm_head(states[others]).float(), targets[others])
        return {
            "letter": F.cross_entropy(logits, targets[named]),
            "others": OTHER_TOKENS * others_loss,
            "letter_accuracy": (logits.argmax(-1) == targets[named]).float().mean().detach(),
        }

    def words(self, batch: LessonBatch) -> dict[str, torch.Tensor]:
        """The last lesson's losses: those of SFT, and what the frame states should know when words ask them for it.

        What goes on is asked of `m_t`, which later layers read and visual capture pools, and there, too, which frames a
        given moment means; the number of an event among those asked for, one layer before the evidence heads.
        """
        core, inputs = self.model.model, self._encoded(batch)
        states: dict[str, torch.Tensor] = {}  # entering the layer that `m_t` is read at, and the one before the last

        def keep(name: str):
            def hook(module, args, kwargs):
                states.setdefault(name, args[0] if args else kwargs["hidden_states"])  # prompts run first

            return hook

        layers = core.language_model.layers
        hooks = [
            layer.register_forward_pre_hook(keep(name), with_kwargs=True)
            for name, layer in (("early", layers[self.model.config.evidence_layer]), ("late", layers[-2]))
        ]
        try:
            outputs = self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        mask, config = outputs.frame_mask, self.model.config
        prompt = inputs["input_ids"][:, : inputs["prompt_length"]]
        columns = token_columns(prompt == config.video_token_id, mask.shape[1])
        known = self.heads["words"](take_columns(states["late"], columns))
        losses = {
            "lm": outputs.lm_loss,
            "grounding": config.grounding_weight * outputs.grounding_loss,
            "consistency": config.consistency_weight * outputs.consistency_loss,
            **state_loss(self.heads["states"](outputs.frame_states), batch, mask),
            "order": 3 * order_loss(known["order"], batch, mask),
            **self._deciding(batch.rows, inputs["labels"], outputs.token_logps),
        }
        given = prompt == config.evidence_token_id
        (rows,) = torch.where(given.any(1))
        if len(rows):  # a moment given in the question
            head, place = self.heads["moments"], given[rows].float().argmax(1)
            query = head(states["early"][rows, place])["query"]
            key = head(take_columns(states["early"], columns)[rows])["key"]
            logits = evidence_similarity(query[:, None], key)[:, 0]
            inside = frame_distance(inputs["evidence_spans"][rows, 0], mask.shape[1]) == 0
            missed = F.binary_cross_entropy_with_logits(logits[mask[rows]], inside[mask[rows]].float())
            losses["moment"] = MOMENT_WEIGHT * missed
        return losses

    def _encoded(self, batch: LessonBatch) -> dict:
        """The model's inputs for the rows of a batch, encoded by the frozen tower and connector at its first use."""
        if batch.inputs is not None:
            return batch.inputs
        inputs = self.collator(batch.rows)
        names = ("pixel_values_videos", "num_frames", "qformer_input_ids", "qformer_attention_mask", "video_index")
        with torch.no_grad():
            video = self.model.get_video_features(**{name: inputs.pop(name) for name in names})
        inputs["mm_encoder_outputs"] = {"video": video}
        if self.options.uses > 1:
            batch.inputs = inputs
        return inputs

    def _deciding(self, rows: list[dict], labels: torch.Tensor, logps: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses on the tokens that decide: the words of a choice, and whether there is a moment at all."""
        said = (
            torch.isin(labels, self._option_tokens(rows))
            & torch.tensor([len(row["options"]) > 0 for row in rows])[:, None]
        )
        grounds = torch.tensor([row["task"] in GROUNDING_TASKS for row in rows])
        first = (labels != IGNORE_INDEX).int().argmax(1, keepdim=True)  # (rows, 1)
        parts = {
            "choice": (self.options.choice_weight, logps[said]),
            "decision": (self.options.decision_weight, logps.gather(1, first)[grounds]),
        }
        return {name: -weight * values.mean() for name, (weight, values) in parts.items() if weight and len(values)}

    def _option_tokens(self, rows: list[dict]) -> torch.Tensor:
        """Tokens of the options of all rows as answers may spell them, and of their letters."""
        options = {option for row in rows for option in row["options"]}
        texts = [
            *LETTERS,
            *(option[:1].upper() + option[1:] for option in options),
            *(f" {option}" for option in options),
        ]
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return torch.tensor(sorted({token for text in ids for token in text}))

    def run(self, output_dir: str | None = None) -> dict[str, float]:
        """All lessons that are not done yet; a killed run goes on from what it kept last."""
        results, start = {}, FIRST_LESSON_SCENE
        for lesson in LESSONS:
            steps = getattr(self.options, lesson)
            kept = Path(output_dir) / f"warmup-{lesson}.safetensors" if output_dir else None
            if kept and kept.is_file():
                nn.ModuleDict({"model": self.model, "heads": self.heads}).load_state_dict(load_file(kept), strict=False)
                self.model.tie_weights()
            elif steps:
                results |= self._lesson(lesson, steps, start, kept)
            start += steps * self.options.batch_size
        return results

    def _lesson(self, lesson: str, steps: int, start: int, kept: Path | None) -> dict[str, float]:
        """One lesson, from its beginning or from where it was when it was killed."""
        state = _LessonState(self, lesson, steps, kept)
        done = state.resume()
        recent, started = defaultdict(list), time.time()
        self.model.train()
        bar = tqdm(self._batches(lesson, steps, start, done), desc=f"warm-up: {lesson}", initial=done, total=steps)
        for step, batch in enumerate(bar, done + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                losses = getattr(self, lesson)(batch)
            sum(value for value in losses.values() if value.requires_grad).backward()
            state.update()
            for name, value in losses.items():
                recent[name].append(value.detach())
            if step % 100 == 0 or step == steps:
                means = {name: float(torch.stack(values).mean()) for name, values in recent.items()}
                text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
                logger.warning("warm-up %s, step %d, %.0f s: %s", lesson, step, time.time() - started, text)
                recent.clear()
            if step % self.options.save_steps == 0 and step < steps:
                state.save(step)
        state.finish()
        return {f"warmup/{lesson}/{name}": value for name, value in means.items()}

    def _batches(self, lesson: str, steps: int, start: int, done: int) -> Iterator:
        options, whole = self.options, lesson == "words"
        size = options.video_batch_size if whole else options.batch_size
        order = batch_order(steps, options.uses if whole else 1)[done:]
        if lesson == "letters":
            data = ChoiceTexts(steps * size, start=start, seed=self.seed)
        else:
            data = ShapesLessons(
                steps * size, self.model.config.vision_config.image_size, options.fps, None if whole else 4,
                1 if lesson == "patches" else options.questions, seed=self.seed, start=start,
                task_weights=options.task_weights if whole else None,
                **({"difficulties": ("middle",), "absent_share": options.absent_share} if whole else {}),
            )  # fmt: skip
        loader = DataLoader(
            data,
            batch_sampler=[range(number * size, (number + 1) * size) for number in dict.fromkeys(order)],
            collate_fn=_join if lesson == "letters" else collate_lessons,
            num_workers=options.num_workers,
            generator=torch.Generator(),  # it draws a seed; from the global generator a resumed run would draw another
        )
        return repeated(loader, order)


def _join(items: list[list[dict]]) -> list[dict]:
    return [row for item in items for row in item]


class _LessonState:
    """What one lesson trains, with which optimizers, and what of it is kept on disk."""

    def __init__(self, warmup: Warmup, lesson: str, steps: int, kept: Path | None):
        model, options = warmup.model, warmup.options
        core = model.model
        self.model, self.kept = model, kept
        self.both = nn.ModuleDict({"model": model, "heads": warmup.heads})
        # a text model that knows nothing yet would spoil what the connector says: where things are, most of all
        for part in (core.vision_tower, core.connector):
            part.requires_grad_(lesson != "words")
        parts = {
            "patches": [core.vision_tower],
            "frames": [core.vision_tower, core.connector],
            "letters": [core.language_model, model.lm_head],
            "words": [model],
        }[lesson]
        matrices, others = [], list(warmup.heads.parameters())
        trained = {id(value): (name, value) for part in parts for name, value in part.named_parameters("part")}
        for name, parameter in trained.values():  # tied ones once
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (matrices if inner else others).append(parameter)
        self.parameters = [*matrices, *others]
        adam = torch.optim.AdamW(others, lr=options.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        self.optimizers = [Muon(matrices, lr=options.learning_rate), adam]
        warm = min(100, steps // 4 + 1)

        def rate(step: int) -> float:
            return min((step + 1) / warm, 1.0) * (1 - (1 - options.last_rate) * step / steps)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in self.optimizers]

    def update(self) -> None:
        """One step of both optimizers."""
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()

    @property
    def _partial(self) -> Path:
        return self.kept.with_suffix(".partial")

    def save(self, step: int) -> None:
        """Keep everything that a killed run needs to go on from here."""
        if self.kept is None:
            return
        state = {
            "step": step,
            "weights": self.both.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
            "random": torch.get_rng_state(),
        }
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self._partial.with_suffix(".new"))
        self._partial.with_suffix(".new").replace(self._partial)  # a kill while saving leaves the older one

    def resume(self) -> int:
        """Take up what `save` kept; returns the steps that were done."""
        if self.kept is None or not self._partial.is_file():
            return 0
        state = torch.load(self._partial, weights_only=True)
        self.both.load_state_dict(state["weights"])
        for parts, states in ((self.optimizers, state["optimizers"]), (self.schedules, state["schedules"])):
            for part, values in zip(parts, states, strict=True):
                part.load_state_dict(values)
        torch.set_rng_state(state["random"])
        return state["step"]

    def finish(self) -> None:
        """Keep the weights after the lesson."""
        self.model.requires_grad_(True)
        if self.kept is not None:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            weights = {name: value.contiguous().clone() for name, value in self.both.state_dict().items()}
            save_file(weights, self.kept)
            self._partial.unlink(missing_ok=True)


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


__all__ = ["Warmup", "WarmupOptions", "warm_up"]
