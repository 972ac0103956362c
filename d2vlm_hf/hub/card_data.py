# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What cards tell, as data. A fact that is not known is None or empty, and the card leaves it out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import TextWrapper
from typing import Any, Literal

from huggingface_hub import EvalResult, EvalResultEntry

from .records import RunRecord


PIPELINE_TAG = "video-text-to-text"
WIDTH = 100  # characters of a line of an example
# column -> (type, meaning) of the rows of this package
COLUMNS = {
    "id": ("string", "unique id"),
    "video": ("video", "the file, embedded"),
    "duration": ("float", "length of the video"),
    "task": ("string", "name of the task, as in E.T. Bench where it is one of its tasks"),
    "source": ("string", "where the row comes from"),
    "question": ("string", "the question, with one `<evi>` for each moment that is given"),
    "question_spans": ("list of spans", "the moments that the question gives"),
    "answer": ("string", "the answer, with one `<evi>` for each moment that it refers to"),
    "spans": ("list of spans", "the moments that the answer refers to"),
    "options": ("list of strings", "choices, if there are any"),
    "correct_option": ("int", "index of the right choice, or -1"),
    "captions": ("list of strings", "one caption for each span, if there are any"),
    "annotations": ("list of lists of spans", "spans by further annotators"),
}
PREFERENCE_COLUMNS = {
    "prompt": ("list of messages", "the conversation up to the answer; `role` and `content` are plain strings"),
    "chosen": ("list of messages", "the good answer"),
    "rejected": ("list of messages", "the answer in which one factor is broken"),
    "chosen_spans": ("list of spans", "the moments of the good answer"),
    "rejected_spans": ("list of spans", "the moments of the other"),
    "factor": ("string", "which factor is broken: `grounding` or `text`"),
    "perturbation": ("string", "how"),
    "edit": ("string", "what was changed, and by how much"),
    "seed": ("int", "seed that gives this row again"),
}


@dataclass(frozen=True)
class Result:
    """One measured number.

    Args:
        task (`str`): What was asked of the model, such as "Temporal grounding".
        metric (`str`): Name of the metric, such as "mIoU".
        value (`float`): The measured value.
        dataset (`str`): Hub id of the data set, or its name if it is not on the Hub.
        dataset_name (`str`, *optional*): Name for people.
        split (`str`, *optional*): Split that was measured.
        interval (`tuple[float, float]`, *optional*): 95 % interval of the value.
        blind (`Mapping[str, float]`): The same metric of each blind control, by name.
        protocol (`str`, *optional*): "clean", "etbench" or "d2vlm".
        settings (`str`, *optional*): Frames per second, prompt, decoding.
        dataset_revision (`str`, *optional*): Commit of the data set.
        digits (`int`): Digits shown after the point.
    """

    task: str
    metric: str
    value: float
    dataset: str
    dataset_name: str | None = None
    split: str | None = None
    interval: tuple[float, float] | None = None
    blind: Mapping[str, float] = field(default_factory=dict)
    protocol: str | None = None
    settings: str | None = None
    dataset_revision: str | None = None
    digits: int = 1

    @property
    def notes(self) -> str | None:
        """Protocol, settings and interval in one line, or None."""
        low_high = self.interval and "95 % interval {} to {}".format(*(f"{x:.{self.digits}f}" for x in self.interval))
        parts = [self.protocol and f"protocol {self.protocol}", self.settings, low_high]
        return "; ".join(part for part in parts if part) or None

    def to_eval_result(self) -> EvalResult:
        """Return the entry of `model-index` in the card's metadata."""
        return EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=self.dataset,
            dataset_name=self.dataset_name or self.dataset,
            dataset_split=self.split,
            dataset_revision=self.dataset_revision,
            metric_type=slug(self.metric),
            metric_name=f"{self.metric} ({self.task})",  # `model-index` keeps one task name for each data set
            metric_value=round(self.value, 6),
            metric_args={"protocol": self.protocol} if self.protocol else None,
        )

    def to_entry(self, date: str | None = None, source_url: str | None = None) -> EvalResultEntry:
        """Return the entry of `.eval_results/*.yaml`, whose `task_id` names task and metric."""
        return EvalResultEntry(
            dataset_id=self.dataset,
            task_id=f"{slug(self.task)}_{slug(self.metric)}",
            value=round(self.value, 6),
            dataset_revision=self.dataset_revision,
            date=date,
            source_url=source_url,
            notes=self.notes,
        )


@dataclass(frozen=True)
class ModelCardInfo:
    """What the card of a trained model tells.

    Args:
        repo_id (`str`): Where the model will be, "owner/name".
        license (`str`, *optional*): Licence id of the Hub, such as "apache-2.0"; None if none was chosen yet.
        title (`str`, *optional*): Name of the model, by default that of the repository.
        summary (`str`, *optional*): One sentence on what it does.
        license_name (`str`, *optional*): Name of the licence where `license` is "other".
        license_link (`str`, *optional*): Where its text is.
        base_model (`str | Sequence[str]`, *optional*): Hub id; a folder of this machine is left out.
        datasets (`Sequence[str]`): Hub ids of the training data; folders of this machine are left out.
        language (`Sequence[str]`): Language codes.
        tags (`Sequence[str]`): Tags beside those that every card has.
        facts (`Mapping[str, str]`): Size, backbone, frame rate and the like, by name.
        example_video (`str`, *optional*): File in the repository that the quick start grounds.
        example_question (`str`): Question of the quick start.
        example_output (`Mapping`, *optional*): What the quick start gives.
        results (`Sequence[Result]`): What was measured.
        results_note (`str`, *optional*): How: seeds, spread, hardware.
        runs (`Sequence[RunRecord]`): The runs that made the model, in order.
        loss_picture (`str`, *optional*): Picture of the loss curves, as a path in the repository.
        timeline_picture (`str`, *optional*): Picture of a grounded video, as a path in the repository.
        intended_use (`Sequence[str]`): What it is good for.
        limits (`Sequence[str]`): What it is not good for, beside what holds for every such model.
        data (`str`, *optional*): What it was trained on, in a few sentences.
        adapter (`bool`): Whether the repository holds a PEFT adapter of `base_model`, not a whole model.
    """

    repo_id: str
    license: str | None
    title: str | None = None
    summary: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | Sequence[str] | None = None
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    example_video: str | None = None
    example_question: str = "When does the man open the door?"
    example_output: Mapping[str, Any] | None = None
    results: Sequence[Result] = ()
    results_note: str | None = None
    runs: Sequence[RunRecord] = ()
    loss_picture: str | None = None
    timeline_picture: str | None = None
    intended_use: Sequence[str] = ()
    limits: Sequence[str] = ()
    data: str | None = None
    adapter: bool = False


@dataclass(frozen=True)
class ConvertedCardInfo:
    """What the card of a converted checkpoint tells.

    Args:
        repo_id (`str`): Where the converted checkpoint will be.
        source (`str`): Whose weights they are, as the first sentence names them.
        source_url (`str`, *optional*): Where they come from.
        source_revision (`str`, *optional*): Commit of the source.
        base_model (`str`, *optional*): Hub id that the converted weights derive from.
        title (`str`, *optional*): Name of the model.
        license_name (`str`, *optional*): Name of the licence of the weights.
        license_link (`str`, *optional*): Where its text is.
        run (`RunRecord`, *optional*): The conversion.
        notes (`Sequence[str]`): What the conversion had to decide.
        figures (`bool`): Whether the paper's figures are shown: only beside the weights that they were measured on.
        example_question (`str`): Question of the quick start.
        license (`str`): Always "other": the weights keep the licences of their origin.
    """

    repo_id: str
    source: str
    source_url: str | None = None
    source_revision: str | None = None
    base_model: str | None = None
    title: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    run: RunRecord | None = None
    notes: Sequence[str] = ()
    figures: bool = True
    example_question: str = "When does the man open the door?"
    license: Literal["other"] = "other"


@dataclass(frozen=True)
class Example:
    """One row, as a data set card shows it.

    Args:
        title (`str`): What it is an example of.
        lines (`Sequence[tuple[str, str]]`): Name and value of what is shown.
    """

    title: str
    lines: Sequence[tuple[str, str]]

    @property
    def text(self) -> str:
        """The lines with their names in one column, wrapped."""
        width = max((len(name) for name, _ in self.lines), default=0)
        wrap = TextWrapper(WIDTH, subsequent_indent=" " * (width + 2), break_long_words=False, break_on_hyphens=False)
        lines = [f"{name:<{width}}  {' '.join(value.split())}" for name, value in self.lines]
        # it is shown in a fenced block
        return "\n".join(part for line in lines for part in wrap.wrap(line)).replace("`" * 3, "")


@dataclass(frozen=True)
class DatasetCardInfo:
    """What the card of a data set tells; [`DatasetCardInfo.from_rows`] takes counts and examples from the data.

    Args:
        repo_id (`str`): Where the data set will be, "owner/name".
        license (`str`, *optional*): Licence id of the Hub; None where it is not known.
        title (`str`, *optional*): Name of the data set, by default that of the repository.
        summary (`str`, *optional*): One or two sentences on what it is.
        license_name (`str`, *optional*): Name of the licence where `license` is "other".
        license_link (`str`, *optional*): Where its text is.
        language (`Sequence[str]`): Language codes.
        tags (`Sequence[str]`): Tags beside those that every card has.
        splits (`Mapping[str, int]`): Rows of each split.
        tasks (`Mapping[str, int]`): Rows of each task.
        kinds (`Mapping[tuple[str, str], int]`): Rows of each (factor, perturbation); empty without preferences.
        examples (`Sequence[Example]`): One for each kind of perturbation, or for each task.
        source (`str`, *optional*): How the data was made, in a few sentences.
        run (`RunRecord`, *optional*): The run that made it.
        limits (`Sequence[str]`): What it is not good for.
    """

    repo_id: str
    license: str | None
    title: str | None = None
    summary: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    splits: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[tuple[str, str], int] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    source: str | None = None
    run: RunRecord | None = None
    limits: Sequence[str] = ()

    @classmethod
    def from_rows(
        cls, repo_id: str, splits: Mapping[str, Iterable[Mapping[str, Any]]], **facts: Any
    ) -> "DatasetCardInfo":
        """Count the rows and take the first of each kind that has an event as its example, or else the first.

        Args:
            repo_id (`str`): Where the data set will be.
            splits (`Mapping[str, Iterable[Mapping]]`): Rows of each split, read once; the video is not looked at.
            **facts: Further fields of this class: `license` and what else is known.

        Returns:
            `DatasetCardInfo`: With `splits`, `tasks`, `kinds` and `examples`.
        """
        counts: dict[str, int] = {}
        tasks: dict[str, int] = {}
        kinds: dict[tuple[str, str], int] = {}
        examples: dict[tuple[str, ...], tuple[bool, Example]] = {}
        for split, rows in splits.items():
            counts[split] = 0
            for row in rows:
                counts[split] += 1
                task, kind = row["task"], (row.get("factor") or "", row.get("perturbation") or "")
                tasks[task] = tasks.get(task, 0) + 1
                if kind[1]:
                    kinds[kind] = kinds.get(kind, 0) + 1
                key = kind if kind[1] else (task,)
                eventful = bool(row["spans"])
                if key not in examples or eventful > examples[key][0]:
                    examples[key] = (eventful, _example(row, kind))
        return cls(
            repo_id=repo_id,
            splits=counts,
            tasks=dict(sorted(tasks.items())),
            kinds=dict(sorted(kinds.items())),
            examples=[examples[key][1] for key in sorted(examples)],
            **facts,
        )


def _example(row: Mapping[str, Any], kind: tuple[str, str]) -> Example:
    """Show a row: question and answer, or both answers and what was done to one of them."""
    if not kind[1]:
        given = [("options", " / ".join(row["options"]))] if row.get("options") else []
        lines = [("question", row["question"]), *given, ("answer", row["answer"]), ("spans", show_spans(row["spans"]))]
        return Example(row["task"], lines)
    lines = [
        ("prompt", _content(row["prompt"])),
        ("chosen", _content(row["chosen"])),
        ("", show_spans(row["chosen_spans"])),
        ("rejected", _content(row["rejected"])),
        ("", show_spans(row["rejected_spans"])),
        ("edit", row["edit"]),
    ]
    return Example(f"{kind[0]}: {kind[1]}", lines)


def _content(messages: Sequence[Mapping[str, str]]) -> str:
    return " ".join(message["content"] for message in messages)


def show_spans(spans: Iterable[Sequence[float]]) -> str:
    """Return spans for people.

    Args:
        spans (`Iterable[Sequence[float]]`): (start, end) in seconds.

    Returns:
        `str`: Such as "1.5 s - 4.0 s, 7.0 s - 9.5 s", or "no event".
    """
    return ", ".join(f"{start:.1f} s - {end:.1f} s" for start, end in spans) or "no event"


def slug(text: str) -> str:
    """Return a name of lower-case words joined by `_`, for ids.

    Args:
        text (`str`): Any name, such as "R1@0.5".

    Returns:
        `str`: Such as "r1_0_5".
    """
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


__all__ = [
    "COLUMNS",
    "PIPELINE_TAG",
    "PREFERENCE_COLUMNS",
    "ConvertedCardInfo",
    "DatasetCardInfo",
    "Example",
    "ModelCardInfo",
    "Result",
    "show_spans",
    "slug",
]
