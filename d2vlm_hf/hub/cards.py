# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Cards of models and data sets, rendered from dataclasses of facts by the templates next to this file."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CardData,
    DatasetCard,
    DatasetCardData,
    ModelCard,
    ModelCardData,
    RepoCard,
    eval_result_entries_to_yaml,
)
from huggingface_hub.utils import yaml_dump

from .card_data import (
    COLUMNS,
    PIPELINE_TAG,
    PREFERENCE_COLUMNS,
    ConvertedCardInfo,
    DatasetCardInfo,
    Example,
    ModelCardInfo,
    Result,
)
from .records import CurveLog, RunRecord, collect_run_record, plot_curves


TEMPLATES = Path(__file__).parent / "templates"
PAPER_URL = "https://arxiv.org/abs/2512.24097"
TAGS = ("temporal-grounding", "video-grounding", "d2vlm")
SUMMARY = (
    "A video-language model that answers a question about a video and shows the moments that support its answer, "
    "in seconds."
)
DATASET_SUMMARY = "Questions about videos, answers that refer to moments, and those moments in seconds."
PREFERENCE_SUMMARY = (
    "Questions about videos with two answers each, of which one is broken in exactly one factor: where the events are "
    "(grounding), or what the text says. For factorized preference optimization."
)
MODEL_LIMITS = (
    "A moment begins and ends at a frame that was looked at, so it is no finer than the sampling of the video.",
    "A score is the mean of frame scores between 0 and 1; it ranks moments and is no calibrated probability.",
    "Answers and moments can be wrong; look at the video before anything depends on them.",
)
CODE_LICENCE = "The code files beside them come from `d2vlm_hf` and are under apache-2.0."
READ_LICENCES = "Before passing them on, read the licences of their source, its language model and its vision tower."
CITATION = """@inproceedings{zeng2025factorized,
  title     = {Factorized Learning for Temporally Grounded Video-Language Models},
  author    = {Zeng, Wenzheng and Gao, Difei and Shou, Mike Zheng and Ng, Hwee Tou},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025},
  note      = {arXiv:2512.24097}
}"""
# (benchmark, metric, value) of D2VLM-3.8B as the paper reports them; never measured here, so never an EvalResult
PUBLISHED_FIGURES = (
    ("E.T. Bench", "grounding F1", "42.3"),
    ("E.T. Bench", "dense captioning F1", "37.5"),
    ("E.T. Bench", "dense captioning similarity", "21.8"),
    ("E.T. Bench", "referring", "25.3"),
    ("E.T. Bench", "complex", "18.1"),
    ("Charades-STA", "R1@0.5", "50.3"),
    ("Charades-STA", "R1@0.7", "26.0"),
    ("YouCook2", "F1", "26.4"),
    ("YouCook2", "CIDEr", "10.6"),
    ("YouCook2", "SODA_c", "3.2"),
)


def render_model_card(info: ModelCardInfo) -> ModelCard:
    """Render the card of a trained model.

    Args:
        info (`ModelCardInfo`): The facts.

    Returns:
        `ModelCard`: With metadata that the Hub's search and its results widget read.
    """
    title = info.title or info.repo_id.split("/")[-1]
    bases = [info.base_model] if isinstance(info.base_model, str) else info.base_model
    datasets = _hub_ids(info.datasets)
    stages = [run.stage.lower() for run in info.runs if re.fullmatch(r"[\w-]+", run.stage)]
    data = ModelCardData(
        language=list(info.language) or None,
        license=info.license,
        license_name=info.license_name,
        license_link=info.license_link,
        library_name="peft" if info.adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=_hub_ids(bases or ()) or None,
        datasets=datasets or None,
        tags=list(dict.fromkeys([*TAGS, *stages, *info.tags])),
        model_name=title if info.results else None,
        eval_results=[result.to_eval_result() for result in info.results] or None,
    )
    blind = list(dict.fromkeys(name for result in info.results for name in result.blind))
    results, shared = _results_table(info.results, blind)
    return _render(
        ModelCard,
        data,
        "model_card.md.j2",
        title=title,
        summary=info.summary or SUMMARY,
        notices=[notice for run in info.runs if (notice := _preference_notice(run))],
        facts=_cells(info.facts.items()),
        quick_start=_model_quick_start(
            info.repo_id, info.example_video, info.example_question, bases[0] if info.adapter and bases else None
        ),
        example_output=info.example_output and json.dumps(info.example_output, indent=2, ensure_ascii=False),
        results=results,
        shared=shared,
        blind=blind,
        results_note=info.results_note,
        runs=list(info.runs),
        loss_picture=info.loss_picture,
        timeline_picture=info.timeline_picture,
        intended_use=list(info.intended_use),
        limits=[*info.limits, *MODEL_LIMITS],
        data=info.data,
        datasets=datasets,
        licence=_licence("The weights are under", info) + " " + CODE_LICENCE,
    )


def render_converted_card(info: ConvertedCardInfo) -> ModelCard:
    """Render the card of a checkpoint that was converted: licence "other", no measured results.

    Args:
        info (`ConvertedCardInfo`): The facts.

    Returns:
        `ModelCard`: With the published figures in a table that says whose they are, and without a `model-index`.
    """
    data = ModelCardData(
        license=info.license,
        license_name=info.license_name,
        license_link=info.license_link,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        base_model=_hub_ids([info.base_model] if info.base_model else ()) or None,
        tags=[*TAGS, "converted"],
    )
    origin = {"Source": info.source_url, "Revision": info.source_revision} | dict(info.run.rows() if info.run else ())
    return _render(
        ModelCard,
        data,
        "converted_card.md.j2",
        title=info.title or info.repo_id.split("/")[-1],
        source=info.source,
        quick_start=_model_quick_start(info.repo_id, None, info.example_question),
        published=PUBLISHED_FIGURES if info.figures else (),
        origin=_cells((name, value) for name, value in origin.items() if value),
        command=info.run and info.run.command,
        notes=list(info.notes),
        limits=list(MODEL_LIMITS),
        licence=f"{_licence('Each part of the weights stays under', info)} {READ_LICENCES} {CODE_LICENCE}",
    )


def write_eval_results(
    folder: str | os.PathLike[str],
    results: Iterable[Result],
    date: str | None = None,
    source_url: str | None = None,
) -> list[Path]:
    """Write measured results to `.eval_results/*.yaml`, which the Hub shows on the pages of model and benchmark.

    Args:
        folder (`str`): Folder of the checkpoint.
        results (`Iterable[Result]`): What was measured; results on data that is not on the Hub are left out.
        date (`str`, *optional*): When, as ISO 8601.
        source_url (`str`, *optional*): Where the evaluation is published.

    Returns:
        `list[Path]`: One file for each data set.
    """
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        if "/" in result.dataset and _hub_ids([result.dataset]):
            by_dataset.setdefault(result.dataset, []).append(result)
    paths = []
    for dataset, group in by_dataset.items():
        path = Path(folder) / ".eval_results" / f"{dataset.replace('/', '--')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = eval_result_entries_to_yaml([result.to_entry(date, source_url) for result in group])
        path.write_text(yaml_dump(entries, sort_keys=False), encoding="utf-8")
        paths.append(path)
    return paths


def render_dataset_card(info: DatasetCardInfo, metadata: Mapping[str, Any] | None = None) -> DatasetCard:
    """Render the card of a data set.

    Args:
        info (`DatasetCardInfo`): The facts.
        metadata (`Mapping`, *optional*): Metadata that a card has already, such as the `configs` and `dataset_info`
            that `Dataset.push_to_hub` wrote; it is kept where it says nothing else.

    Returns:
        `DatasetCard`: With columns, counts and one example for each kind of row.
    """
    rows = sum(info.splits.values())
    own = {
        "language": list(info.language) or None,
        "license": info.license,
        "license_name": info.license_name,
        "license_link": info.license_link,
        "pretty_name": info.title,
        "size_categories": [_size_category(rows)] if rows else None,
        "task_categories": [PIPELINE_TAG],
        "tags": [*TAGS, *(["preference", "dpo"] if info.kinds else []), *info.tags],
    }
    data = DatasetCardData(**{**(metadata or {}), **{key: value for key, value in own.items() if value is not None}})
    columns = {**COLUMNS, **(PREFERENCE_COLUMNS if info.kinds else {})}
    return _render(
        DatasetCard,
        data,
        "dataset_card.md.j2",
        title=info.title or info.repo_id.split("/")[-1],
        summary=info.summary or (PREFERENCE_SUMMARY if info.kinds else DATASET_SUMMARY),
        counts=_counts_table(info.splits, info.tasks),
        kinds=_kinds_table(info.kinds),
        quick_start=_dataset_quick_start(info.repo_id, next(iter(info.splits), "train")),
        examples=list(info.examples),
        examples_title="One row of each kind" if info.kinds else "One row of each task",
        columns=[(name, kind, meaning) for name, (kind, meaning) in columns.items()],
        source=info.source,
        run=info.run,
        limits=list(info.limits),
        licence=_licence("The data is under", info),
    )


Card = TypeVar("Card", bound=RepoCard)


def _render(kind: type[Card], metadata: CardData, template: str, **facts: Any) -> Card:
    """Fill a template and take out the blank lines that left-out sections leave behind."""
    card = kind.from_template(metadata, str(TEMPLATES / template), paper_url=PAPER_URL, citation=CITATION, **facts)
    return kind(re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n")


def _hub_ids(names: Iterable[str]) -> list[str]:
    """Keep what can be a Hub id; a path of this machine is none of the reader's business."""
    return [name for name in names if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists()]


def _cells(rows: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Make values fit into the cells of a Markdown table."""
    return [(_cell(name), _cell(value)) for name, value in rows]


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _licence(beginning: str, info: ModelCardInfo | ConvertedCardInfo | DatasetCardInfo) -> str:
    """Say under which licence something is, as far as it is known."""
    if info.license is None:
        what = "data" if isinstance(info, DatasetCardInfo) else "weights"
        return f"The licence of the {what} has not been stated yet."
    shown = info.license_name or ("the licence of its origin" if info.license == "other" else info.license)
    return f"{beginning} [{shown}]({info.license_link})." if info.license_link else f"{beginning} {shown}."


def _preference_notice(run: RunRecord) -> str | None:
    """Say loudly whether a preference run had a reference model."""
    if run.reference_free is None:
        return None
    if run.reference_free:
        return (
            f"**{run.stage} without a reference model (`reference_free=True`).** Nothing but the supervised losses "
            "held the model near its start, unlike in DPO with a reference."
        )
    return f"**{run.stage} against a reference model (`reference_free=False`).** The FPO of the paper has none."


def _results_table(results: Sequence[Result], blind: Sequence[str]) -> tuple[list[list[str]], dict[str, str]]:
    """Lay the results out: a header, a rule, and a row for each; columns without any value are left out.

    Data and protocol that all results share are returned beside the table instead of in each of its rows.
    """
    if not results:
        return [], {}
    columns = {
        "Data": [f"{r.dataset_name or r.dataset}{f' ({r.split})' if r.split else ''}" for r in results],
        "Task": [r.task for r in results],
        "Metric": [r.metric for r in results],
        "Value": [f"**{r.value:.{r.digits}f}**" for r in results],
        "95 % interval": [
            " to ".join(f"{bound:.{r.digits}f}" for bound in r.interval) if r.interval else "" for r in results
        ],
    }
    for name in blind:
        columns[f"blind: {name}"] = [f"{r.blind[name]:.{r.digits}f}" if name in r.blind else "" for r in results]
    columns["Protocol"] = ["; ".join(part for part in (r.protocol, r.settings) if part) for r in results]
    shared = {
        name: columns.pop(name)[0]
        for name in ("Data", "Protocol")
        if len(results) > 1 and any(columns[name]) and len(set(columns[name])) == 1
    }
    shown = {_cell(name): [_cell(value) for value in values] for name, values in columns.items() if any(values)}
    rule = ["---:" if name.startswith(("Value", "95", "blind")) else "---" for name in shown]
    return [list(shown), rule, *map(list, zip(*shown.values(), strict=True))], shared


def _counts_table(splits: Mapping[str, int], tasks: Mapping[str, int]) -> list[list[str]]:
    if not splits:
        return []
    rows = [["Rows of", "", "Number"], ["---", "---", "---:"]]
    rows += [["split", _cell(name), f"{count:,}"] for name, count in splits.items()]
    return rows + [["task", _cell(name), f"{count:,}"] for name, count in tasks.items()]


def _kinds_table(kinds: Mapping[tuple[str, str], int]) -> list[list[str]]:
    if not kinds:
        return []
    rows = [["Broken factor", "Perturbation", "Rows"], ["---", "---", "---:"]]
    rows += [[_cell(factor), _cell(kind), f"{count:,}"] for (factor, kind), count in kinds.items()]
    for factor in dict.fromkeys(factor for factor, _ in kinds):
        total = sum(count for (name, _), count in kinds.items() if name == factor)
        rows.append([f"**{_cell(factor)}**", "all", f"**{total:,}**"])
    return rows


def _size_category(rows: int) -> str:
    """Return the Hub's name for a number of rows."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    above = [name for power, name in enumerate(bounds, start=3) if rows >= 10**power]
    if not above:
        return "n<1K"
    return f"{above[-1]}<n<{bounds[len(above)]}" if len(above) < len(bounds) else "1B<n<10B"


def _model_quick_start(repo_id: str, video: str | None, question: str, base: str | None = None) -> str:
    """Return code that runs as it stands, with and without the package (a test runs it); an adapter has a base."""
    model = Path(base).name if base and Path(base).exists() else base or repo_id
    fetched = f'hf_hub_download("{repo_id}", "{video}")  # or a file of your own' if video else '"video.mp4"'
    lines = [
        "from huggingface_hub import hf_hub_download" if video else None,
        "from peft import PeftModel" if base else None,
        "from transformers import pipeline",
        "",
        f'grounder = pipeline("video-grounding", model="{model}", trust_remote_code=True)',
        f'grounder.model = PeftModel.from_pretrained(grounder.model, "{repo_id}").merge_and_unload()' if base else None,
        f"video = {fetched}",
        f"result = grounder(video, question={json.dumps(question, ensure_ascii=False)})",
        'print(result["answer"])',
        'for moment in result["evidence"]:',
        "    print(f\"{moment['start']:.1f} s to {moment['end']:.1f} s, score {moment['score']:.2f}\")",
    ]
    return "\n".join(line for line in lines if line is not None)


def _dataset_quick_start(repo_id: str, split: str) -> str:
    """Return code that runs as it stands with nothing but `datasets` (a test runs it)."""
    lines = [
        "from datasets import Video, load_dataset",
        "",
        f'data = load_dataset("{repo_id}", split="{split}")  # streaming=True reads without downloading all of it',
        'data = data.cast_column("video", Video(decode=False))  # the bytes of the file; without this line, a decoder',
        "row = next(iter(data))",
        'print(row["question"], row["answer"], row["spans"])',
    ]
    return "\n".join(lines)


__all__ = [
    "PUBLISHED_FIGURES",
    "ConvertedCardInfo",
    "CurveLog",
    "DatasetCardInfo",
    "Example",
    "ModelCardInfo",
    "Result",
    "RunRecord",
    "collect_run_record",
    "plot_curves",
    "render_converted_card",
    "render_dataset_card",
    "render_model_card",
    "write_eval_results",
]
