# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Importers: published annotation files become rows of this package's schema, and every dropped record is counted.

`import_rows("charades_sta", "charades_sta_train.txt", video_root="videos", durations="Charades_v1_train.csv")` gives
an [`ImportResult`] to iterate over. `IMPORTERS` lists the formats.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .import_captions import Wording, caption_records, charades_sta_records, qvhighlights_records, read_durations
from .import_conversations import d2vlm_fpo_records, d2vlm_sft_records, et_instruct_records
from .import_formats import Dropped, ImportFilter, resolve_video
from .schema import EVIDENCE_END_TOKEN, PERTURBATIONS, VIDEO_TOKEN, make_row, validate_row


QUESTION = "When does this happen in the video: '{query}'?"
ANSWER = "The event happens in {evidence}."
DENSE_QUESTIONS = {
    "activitynet_captions": "Describe the events of the video in order, each with its time.",
    "youcook2": "Describe all the cooking steps of the video in order, each with its time.",
    "tacos": "Describe what is done in the video in order, each step with its time.",
}
_FACTOR_OF = {kind: factor for factor, kinds in PERTURBATIONS.items() for kind in kinds}
_TIMES = ("question_spans", "spans", "chosen_spans", "rejected_spans")


class ImportResult:
    """The rows of an annotation file, read as one goes through them, and how many there were.

    Each pass reads the file anew, a piece at a time, so that memory does not grow with the file.

    Attributes:
        read (`int`): Records read in the last pass (a record is what may become one row).
        kept (`int`): Rows given.
        dropped (`Counter`): Reason -> number of records dropped for it; `read == kept + sum(dropped.values())`.
    """

    def __init__(
        self,
        name: str,
        records: Callable[[], Iterator[dict[str, Any] | Dropped]],
        video_root: str | os.PathLike | None,
        filters: ImportFilter,
    ):
        self.name, self.filters = name, filters
        self._records, self._root = records, None if video_root is None else os.fspath(video_root)
        self.read, self.kept, self.dropped = 0, 0, Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.read, self.kept, self.dropped = 0, 0, Counter()
        for record in self._records():
            self.read += 1
            row = record if isinstance(record, Dropped) else self._row(record)
            if isinstance(row, Dropped):
                self.dropped[row.reason] += 1
            else:
                self.kept += 1
                yield row

    def summary(self) -> str:
        """One line for people, after a pass: how many records were read, kept, and dropped for which reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        dropped = sum(self.dropped.values())
        return f"{self.name}: read {self.read}, kept {self.kept}, dropped {dropped}" + (
            f" ({reasons})" if reasons else ""
        )

    def _row(self, record: dict[str, Any]) -> dict[str, Any] | Dropped:
        """Resolves the video, applies the filters, mends the spans and fills in the schema."""
        duration, filters = record.get("duration"), self.filters
        if not record["video"]:
            return Dropped("no video is named")
        path = resolve_video(record["video"], self._root)
        if (filters.require_video or (filters.require_video is None and self._root is not None)) and (
            not os.path.isfile(path)
        ):
            return Dropped("video file is missing")
        if duration is None and self._root is not None and os.path.isfile(path):
            duration = _probe(path)
        if not isinstance(duration, (int, float)):
            return Dropped("duration is unknown")
        if not filters.min_duration <= duration <= filters.max_duration:
            return Dropped("video is shorter or longer than allowed")
        words = record["question"].split() + record["answer"].split()
        if len(words) > filters.max_words:
            return Dropped("question and answer have too many words")
        if any(token in text for token in (VIDEO_TOKEN, EVIDENCE_END_TOKEN) for text in words):
            return Dropped("text holds a reserved token")
        for name in _TIMES:
            if name in record:
                spans = filters.mend(record[name], duration)
                if isinstance(spans, Dropped):
                    return spans
                record[name] = spans
        if "annotations" in record:  # an annotator whose spans cannot be used is left out, not the row
            others = [filters.mend(spans, duration) for spans in record["annotations"]]
            record["annotations"] = [spans for spans in others if not isinstance(spans, Dropped)]
        if "perturbation" in record:
            record["factor"] = _FACTOR_OF[record["perturbation"]]
        row = make_row(preference="rejected" in record, **(record | {"video": path, "duration": float(duration)}))
        validate_row(row, source=self.name)
        return row


def _probe(path: str) -> float | None:
    """Duration of a video file in seconds, from its header; `None` if it has none."""
    import av

    with av.open(path) as container:
        return None if container.duration is None else container.duration / av.time_base


def import_et_instruct(
    path: str | os.PathLike, video_root: str | os.PathLike | None = None, **filters: Any
) -> ImportResult:
    """Imports E.T. Instruct 164K (`vid` JSON): every time in a text is a `<vid>` token.

    Args:
        path (`str` or `PathLike`):
            The JSON file, a list of conversations.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        **filters:
            Fields of [`ImportFilter`].

    Returns:
        `ImportResult`: one row per pair of turns.
    """
    return ImportResult("et_instruct", lambda: et_instruct_records(path), video_root, ImportFilter(**filters))


def import_d2vlm_sft(
    path: str | os.PathLike, video_root: str | os.PathLike | None = None, **filters: Any
) -> ImportResult:
    """Imports the authors' SFT file (`evi` JSON): one `<evi>` per range, the answer after `<evi>` x K and `</evi>`.

    Args:
        path (`str` or `PathLike`):
            The JSON file.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        **filters:
            Fields of [`ImportFilter`].

    Returns:
        `ImportResult`: one row per pair of turns; the grounding part is left out, as the processor makes it.
    """
    return ImportResult("d2vlm_sft", lambda: d2vlm_sft_records(path), video_root, ImportFilter(**filters))


def import_d2vlm_fpo(
    path: str | os.PathLike,
    video_root: str | os.PathLike | None = None,
    kinds: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    **filters: Any,
) -> ImportResult:
    """Imports the authors' preference file: `conversations` and times by side, one "chosen" and any number rejected.

    Args:
        path (`str` or `PathLike`):
            The JSON file, or a `torch.save`d one as far as `torch.load(weights_only=True)` reads it.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        kinds (`Mapping[str, str]`, *optional*):
            Reject key, or its third `_`-separated field -> perturbation. By default that field tells, else the
            difference of the spans.
        tokenizer (*optional*):
            Decodes the token ids of a `torch.save`d file.
        **filters:
            Fields of [`ImportFilter`].

    Returns:
        `ImportResult`: one preference row per rejected side.

    Raises:
        ValueError: If `kinds` names no perturbation, or (while iterating) if the file cannot be read safely.
    """
    kinds = dict(kinds or {})
    for key, kind in kinds.items():
        if kind not in _FACTOR_OF:
            raise ValueError(f"kinds[{key!r}] is {kind!r}, which is no perturbation. Use one of {list(_FACTOR_OF)}.")
    return ImportResult(
        "d2vlm_fpo", lambda: d2vlm_fpo_records(path, kinds, tokenizer), video_root, ImportFilter(**filters)
    )


def import_charades_sta(
    path: str | os.PathLike,
    video_root: str | os.PathLike | None = None,
    durations: Mapping[str, float] | str | os.PathLike | None = None,
    video_name: str = "{id}.mp4",
    question: str = QUESTION,
    answer: str = ANSWER,
    **filters: Any,
) -> ImportResult:
    """Imports Charades-STA: text lines `ID start end##sentence`, some of which end before they start.

    Args:
        path (`str` or `PathLike`):
            The text file.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        durations (mapping or path, *optional*):
            Video id -> seconds, which the file does not tell: a mapping, a JSON file, or the CSV of Charades (`id`,
            `length`). Without it the videos under `video_root` are asked.
        video_name (`str`, *optional*, defaults to `"{id}.mp4"`):
            Name of a video file.
        question (`str`, *optional*):
            Template with `{query}` or `{Query}` (capitalised).
        answer (`str`, *optional*):
            Template with `{evidence}`, and `{query}` or `{Query}` if the answer is to repeat it.
        **filters:
            Fields of [`ImportFilter`]; `reversed_spans="swap"` mends reversed lines.

    Returns:
        `ImportResult`: one "tvg" row per line.

    Raises:
        ValueError: If `durations` is a CSV file without the two columns.
    """
    known, wording = read_durations(durations), Wording(question, answer, video_name)
    return ImportResult(
        "charades_sta", lambda: charades_sta_records(path, wording, known), video_root, ImportFilter(**filters)
    )


def import_qvhighlights(
    path: str | os.PathLike,
    video_root: str | os.PathLike | None = None,
    video_name: str = "{id}.mp4",
    question: str = QUESTION,
    answer: str = ANSWER,
    **filters: Any,
) -> ImportResult:
    """Imports QVHighlights moment retrieval: JSON lines with a query and one or more windows.

    Args:
        path (`str` or `PathLike`):
            The `.jsonl` file.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        video_name (`str`, *optional*, defaults to `"{id}.mp4"`):
            Name of a video file.
        question (`str`, *optional*):
            Template with `{query}` or `{Query}`.
        answer (`str`, *optional*):
            Template with `{evidence}` and possibly `{query}` or `{Query}`.
        **filters:
            Fields of [`ImportFilter`].

    Returns:
        `ImportResult`: one "tvg" row per line.
    """
    wording = Wording(question, answer, video_name)
    return ImportResult(
        "qvhighlights", lambda: qvhighlights_records(path, wording), video_root, ImportFilter(**filters)
    )


def _import_captions(
    name: str,
    path: str | os.PathLike,
    video_root: str | os.PathLike | None = None,
    task: str = "dvc",
    others: Sequence[str | os.PathLike] = (),
    video_name: str = "{id}.mp4",
    question: str | None = None,
    answer: str = ANSWER,
    **filters: Any,
) -> ImportResult:
    if task not in ("dvc", "slc", "tvg"):
        raise ValueError(f"task is {task!r}: captions can be asked for as 'dvc', 'slc' or 'tvg'. Use one of these.")
    wording = Wording(question or (QUESTION if task == "tvg" else DENSE_QUESTIONS[name]), answer, video_name)
    return ImportResult(
        name, lambda: caption_records(path, name, task, wording, others), video_root, ImportFilter(**filters)
    )


def import_activitynet_captions(
    path: str | os.PathLike, video_root: str | os.PathLike | None = None, task: str = "dvc", **options: Any
) -> ImportResult:
    """Imports ActivityNet Captions: per video a duration, spans and sentences.

    Args:
        path (`str` or `PathLike`):
            The JSON file.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        task (`str`, *optional*, defaults to `"dvc"`):
            "dvc" or "slc" for one row per video, "tvg" for one per sentence.
        **options:
            `others` (files of further annotators, e.g. `val_2.json`, whose spans become `annotations`), `video_name`
            (`"{id}.mp4"`), `question` and `answer` (templates with `{query}`, `{Query}`, `{evidence}`), and the fields
            of [`ImportFilter`].

    Returns:
        `ImportResult`: dense captions as `"<evi>, sentence. <evi>, sentence."`, or one row per sentence.

    Raises:
        ValueError: If the task is unknown.
    """
    return _import_captions("activitynet_captions", path, video_root, task, **options)


def import_youcook2(
    path: str | os.PathLike, video_root: str | os.PathLike | None = None, task: str = "dvc", **options: Any
) -> ImportResult:
    """Imports YouCook2, in its own format (`database`) or in that of ActivityNet Captions.

    Args:
        path (`str` or `PathLike`):
            The JSON file.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        task (`str`, *optional*, defaults to `"dvc"`):
            As in [`import_activitynet_captions`].
        **options:
            As in [`import_activitynet_captions`].

    Returns:
        `ImportResult`: dense captions, or one row per sentence.

    Raises:
        ValueError: If the task is unknown.
    """
    return _import_captions("youcook2", path, video_root, task, **options)


def import_tacos(
    path: str | os.PathLike, video_root: str | os.PathLike | None = None, task: str = "tvg", **options: Any
) -> ImportResult:
    """Imports TACoS, whose times are frames: they become seconds by each video's "fps".

    Args:
        path (`str` or `PathLike`):
            The JSON file.
        video_root (`str` or `PathLike`, *optional*):
            Folder of the videos.
        task (`str`, *optional*, defaults to `"tvg"`):
            As in [`import_activitynet_captions`].
        **options:
            As in [`import_activitynet_captions`]; `video_name` defaults to `"{id}"`, as the ids are file names.

    Returns:
        `ImportResult`: one row per sentence, or dense captions.

    Raises:
        ValueError: If the task is unknown.
    """
    return _import_captions("tacos", path, video_root, task, **{"video_name": "{id}", **options})


IMPORTERS: dict[str, Callable[..., ImportResult]] = {
    "activitynet_captions": import_activitynet_captions,
    "charades_sta": import_charades_sta,
    "d2vlm_fpo": import_d2vlm_fpo,
    "d2vlm_sft": import_d2vlm_sft,
    "et_instruct": import_et_instruct,
    "qvhighlights": import_qvhighlights,
    "tacos": import_tacos,
    "youcook2": import_youcook2,
}


def import_rows(name: str, path: str | os.PathLike, **options: Any) -> ImportResult:
    """Imports an annotation file by the name of its format.

    Args:
        name (`str`):
            One of `IMPORTERS`.
        path (`str` or `PathLike`):
            The file.
        **options:
            Arguments of that importer.

    Returns:
        `ImportResult`: rows to iterate over, with `read`, `kept`, `dropped` and `summary()` after a pass.

    Raises:
        ValueError: If there is no such importer.
    """
    if name not in IMPORTERS:
        raise ValueError(f"name is {name!r}, which is no format that can be imported. Use one of {sorted(IMPORTERS)}.")
    return IMPORTERS[name](path, **options)


__all__ = [
    "IMPORTERS",
    "ImportFilter",
    "ImportResult",
    "import_activitynet_captions",
    "import_charades_sta",
    "import_d2vlm_fpo",
    "import_d2vlm_sft",
    "import_et_instruct",
    "import_qvhighlights",
    "import_rows",
    "import_tacos",
    "import_youcook2",
]
