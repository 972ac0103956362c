# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation from rows to a table: `d2vlm evaluate --config X.yaml`.

    model -> predictions (resumable JSON lines, one shard a process) -> metrics -> JSON, a table, figures, card metadata

Decoding is greedy unless `generate_kwargs` says otherwise, so two runs give the same bytes, also when one of them was
killed and resumed, or ran in several processes.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.repocard_data import yaml_dump
from tqdm.auto import tqdm
from transformers import pipeline
from trl import TrlParser

from ..bundled import bundled_checkpoint
from ..data.shapes import ShapesConfig, blind_controls, generate
from ..data.sources import load_rows
from ..hub.cards import write_eval_results
from .benchmarks import load_annotations
from .plots import draw_figures
from .prediction_files import PredictionFile, read_predictions
from .report import card_metadata, card_results, compare, headlines, parts_of, table
from .shapes_benchmark import constant_predictions


logger = logging.getLogger(__name__)

# Benchmark -> the module whose `score` knows it.
SCORERS = {
    "shapes": "shapes_benchmark",
    "etbench": "etbench",
    "charades_sta": "moment_retrieval",
    "qvhighlights": "moment_retrieval",
    "tacos": "moment_retrieval",
    "youcook2": "dense_captioning",
    "activitynet_captions": "dense_captioning",
    "mvbench": "multiple_choice",
    "video_mme": "multiple_choice",
}
# What a running score leaves out, since it takes long: scorer -> options of its `score`.
QUICK = {"etbench": {"captions": False, "similarity": False}, "dense_captioning": {"captions": False}}


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and how."""

    benchmark: str = field(default="shapes", metadata={"help": f"One of {sorted(SCORERS)}."})
    model: str | None = field(default=None, metadata={"help": "Checkpoint folder or Hub id. Default: the shipped one."})
    dataset: str | None = field(default=None, metadata={"help": "Rows of the schema, or the benchmark's own file."})
    dataset_split: str = field(default="test", metadata={"help": "Split of a folder or Hub data set."})
    video_root: str | None = field(default=None, metadata={"help": "Folder that relative video paths start from."})
    shapes: dict[str, Any] | None = field(
        default=None, metadata={"help": "`ShapesConfig` of videos to make in the output folder and evaluate on."}
    )
    predictions: list[str] | None = field(
        default=None, metadata={"help": "Files of predictions to score instead of running a model."}
    )
    compare: list[str] | None = field(
        default=None, metadata={"help": "Two results.json of earlier runs: print a paired comparison and stop."}
    )
    protocol: str = field(default="clean", metadata={"help": "'clean', 'etbench' or 'd2vlm'."})
    prompt: str = field(default="default", metadata={"help": "Name of the prompt of a published benchmark."})
    output_dir: str = field(default="evaluation", metadata={"help": "Folder of predictions, metrics and tables."})
    blind: list[str] = field(
        default_factory=list,
        metadata={"help": "Blind controls: 'swapped' and 'black' videos, 'constant' answers."},
    )
    fps: float | None = field(default=None, metadata={"help": "Frames per second. Default: the checkpoint's."})
    max_frames: int | None = field(default=None, metadata={"help": "Frames per video. Default: the checkpoint's."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens per answer at most."})
    generate_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "More for `generate`."})
    batch_size: int = field(default=8, metadata={"help": "Videos at a time."})
    limit: int | None = field(default=None, metadata={"help": "Only the first rows."})
    seed: int = field(default=0, metadata={"help": "Of sampled decoding, the blind controls and the comparison."})
    figures: bool = field(default=True, metadata={"help": "Draw figures into the output folder (needs matplotlib)."})
    examples: int = field(default=3, metadata={"help": "Timelines drawn of the best and of the worst answers."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})

    def __post_init__(self) -> None:
        if self.benchmark not in SCORERS:
            raise ValueError(f"benchmark={self.benchmark!r} is unknown. Use one of {sorted(SCORERS)}.")
        unknown = set(self.blind) - {"swapped", "black", "constant"}
        if unknown:
            raise ValueError(
                f"blind={self.blind} has unknown controls {sorted(unknown)}. Use 'swapped', 'black' and 'constant'."
            )
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"compare={self.compare} names {len(self.compare)} files: two are compared. Give two.")
        if self.compare is None and (self.dataset is None) == (self.shapes is None):
            raise ValueError(
                f"dataset={self.dataset!r}, shapes={'given' if self.shapes else None}: rows come from exactly one of "
                "them. Name a data set, or describe shapes to make."
            )


def evaluate(
    benchmark: str, rows: Sequence[Mapping[str, Any]], predictions: Any, protocol: str = "clean", **options: Any
) -> dict[str, Any]:
    """Score predictions on a benchmark.

    Args:
        benchmark (`str`): One of `SCORERS`.
        rows (`Sequence[Mapping]`): Rows of the schema, or of `load_annotations`.
        predictions (`Sequence` or `Mapping`): One per row, or by row id: pipeline results, or texts.
        protocol (`str`): `"clean"`, `"etbench"` or `"d2vlm"`.
        **options: For the benchmark's `score`.

    Returns:
        `dict`: `benchmark`, `protocol`, `metrics` (summary) and `rows` (one result each).

    Raises:
        ValueError: an unknown benchmark or protocol, or predictions that do not fit the rows.
    """
    if benchmark not in SCORERS:
        raise ValueError(f"benchmark={benchmark!r} is unknown. Use one of {sorted(SCORERS)}.")
    module = importlib.import_module(f".{SCORERS[benchmark]}", __package__)
    if SCORERS[benchmark] not in ("shapes_benchmark", "etbench"):
        options["benchmark"] = benchmark
    summary, per_row = module.score(rows, predictions, protocol, **options)
    return {"benchmark": benchmark, "protocol": protocol, "metrics": summary, "rows": per_row}


class RunningScore:
    """The headline of the rows answered so far, for a progress bar: mean score of each task, then of the tasks.

    Args:
        benchmark (`str`): One of `SCORERS`.
        protocol (`str`): As in [`evaluate`]. Captions are not scored.
    """

    def __init__(self, benchmark: str, protocol: str = "clean"):
        self.benchmark, self.protocol = benchmark, protocol
        self._scores: dict[str, list[float]] = {}

    def add(self, rows: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> float | None:
        """Score more rows and return the mean so far; None where rows have no score of their own."""
        if rows:
            quick = QUICK.get(SCORERS[self.benchmark], {})
            for row in evaluate(self.benchmark, rows, predictions, self.protocol, **quick)["rows"]:
                if row.get("score") is not None:
                    self._scores.setdefault(row["task"], []).append(row["score"])
        return float(np.mean([np.mean(scores) for scores in self._scores.values()])) if self._scores else None


def predict(
    pipe,
    rows: Sequence[Mapping[str, Any]],
    file: PredictionFile,
    batch_size: int = 8,
    process: tuple[int, int] = (0, 1),
    running: RunningScore | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """Answer the rows that a file of predictions still lacks, a batch at a time, with a progress bar.

    The batches are cut from all rows before anything is left out, since the last digits of a score depend on what else
    is in its batch: an answer is the same in whatever process, and before or after a kill.

    Args:
        pipe: The "video-grounding" pipeline.
        rows (`Sequence[Mapping]`): All rows, of every process.
        file (`PredictionFile`): Where the predictions go.
        batch_size (`int`): Rows at a time.
        process (`tuple[int, int]`): Index of this process and number of processes, which take turns by batch.
        running (`RunningScore`, *optional*): What the progress bar shows; only the first process has a bar.
        seed (`int`): Of sampled decoding, together with the number of the batch.
        **options: For the pipeline.
    """
    index, count = process
    batches = [(n, rows[n * batch_size : (n + 1) * batch_size]) for n in range(-(-len(rows) // batch_size))]
    own, done = batches[index::count], file.read()
    answered = [row for _, batch in own for row in batch if str(row["id"]) in done]
    total = sum(len(batch) for _, batch in own)
    with tqdm(total=total, initial=len(answered), desc=file.path.stem, unit="row", disable=index > 0) as bar:
        _show(bar, running, answered, [done[str(row["id"])] for row in answered])
        for number, batch in own:
            lacking = [n for n, row in enumerate(batch) if str(row["id"]) not in done]
            if not lacking:
                continue
            if options.get("generate_kwargs", {}).get("do_sample"):
                torch.manual_seed(seed + number)
            inputs = [{key: row.get(key) for key in ("video", "question", "question_spans")} for row in batch]
            answers = list(pipe(inputs, batch_size=batch_size, **options))
            for n in lacking:
                file.add(str(batch[n]["id"]), answers[n])
            _show(bar, running, [batch[n] for n in lacking], [answers[n] for n in lacking])
            bar.update(len(lacking))


def _show(bar: tqdm, running: RunningScore | None, rows: Sequence[Mapping], predictions: Sequence[Mapping]) -> None:
    """Put the running score behind the bar."""
    score = running.add(rows, predictions) if running else None
    if score is not None:
        bar.set_postfix(score=f"{score:.3f}", refresh=False)


# ---- what is evaluated -----------------------------------------------------------------------------------------------


def _processes() -> PartialState:
    """The processes that share the work; without being told, accelerate would take those on a CPU for single ones."""
    return PartialState(cpu=not torch.accelerator.is_available())


def _rows(arguments: EvaluationArguments) -> list[dict[str, Any]]:
    state = _processes()
    if arguments.shapes is not None:
        folder = Path(arguments.output_dir) / "shapes"
        with state.main_process_first():
            generate(ShapesConfig(**arguments.shapes), folder, progress=state.is_main_process)
        rows = load_rows(str(folder))
    elif arguments.benchmark == "shapes":
        rows = load_rows(arguments.dataset, arguments.dataset_split, arguments.video_root)
    else:
        source = Path(arguments.dataset)
        files = sorted(source.glob("*.json")) if source.is_dir() else [source]
        rows = load_annotations(arguments.benchmark, files, arguments.prompt)
        root = Path(arguments.video_root or (source if source.is_dir() else source.parent))
        rows = _distinct([{**row, "video": str(root / row["video"])} for row in rows])
    rows = list(rows)[: arguments.limit]
    ids = [str(row["id"]) for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(row_id for row_id in ids if ids.count(row_id) > 1)
        raise ValueError(
            f"the id {twice!r} stands for {ids.count(twice)} rows, which would share one prediction. Give each row its "
            "own id."
        )
    return rows


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a published file, whose ids may only be unique within their task and source."""
    if len({row["id"] for row in rows}) == len(rows):
        return rows
    return [{**row, "id": f"{row['task']}/{row['source']}/{row['id']}"} for row in rows]


def _digest(parts: Iterable[Any]) -> str:
    """16 hex digits for a sequence of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _rows_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of what the model is asked; the videos by the name of their file."""
    asked = ([row["id"], row["question"], row.get("question_spans"), _video_name(row["video"])] for row in rows)
    return _digest(json.dumps(part).encode() for part in asked)


def _video_name(video: Any) -> str | None:
    path = video.get("path") if isinstance(video, Mapping) else video
    return Path(str(path)).name if path else None


def _weights_digest(model: torch.nn.Module) -> str:
    """Of the weights: a folder may be trained further under the same name."""
    tensors = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in model.state_dict().values())
    return _digest(tensor.view(torch.uint8).numpy() for tensor in tensors)


def _name(source: str) -> str:
    """A Hub id as it is, of a file or folder its name."""
    return Path(source).resolve().name if Path(source).exists() else source


def _data_settings(arguments: EvaluationArguments) -> dict[str, Any]:
    """What is evaluated on; names only, no path of a machine."""
    dataset = _name(arguments.dataset) if arguments.dataset else None
    split = arguments.dataset_split if dataset and not Path(dataset).suffix else None
    known = {name: getattr(arguments, name) for name in ("benchmark", "prompt", "shapes", "limit")}
    return {**known, "dataset": dataset, "dataset_split": split}


def _model_settings(arguments: EvaluationArguments, name: str, pipe) -> dict[str, Any]:
    """What decides the predictions of a model."""
    videos = pipe.processor.video_processor
    return {
        "model": _name(name),
        "weights": _weights_digest(pipe.model),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "fps": arguments.fps or videos.fps,
        "max_frames": arguments.max_frames or videos.max_frames,
        **{key: getattr(arguments, key) for key in ("max_new_tokens", "generate_kwargs", "batch_size", "seed")},
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


def _predictions(
    arguments: EvaluationArguments, variants: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Ask the model for every variant of the rows, or name the files of predictions that are given."""
    settings = _data_settings(arguments)
    if arguments.predictions:
        names = [Path(path).name for path in arguments.predictions]
        return {**settings, "predictions": names}, {"model": arguments.predictions}
    state, name, files = _processes(), arguments.model or bundled_checkpoint(), {}
    pipe = pipeline("video-grounding", model=name, trust_remote_code=arguments.trust_remote_code, device=state.device)
    settings |= _model_settings(arguments, name, pipe)
    options = {key: getattr(arguments, key) for key in ("fps", "max_frames", "max_new_tokens", "generate_kwargs")}
    for variant, rows in variants.items():
        stem = Path(arguments.output_dir) / f"predictions-{variant}"
        files[variant] = [f"{stem}-{rank:03d}.jsonl" for rank in range(state.num_processes)]
        header = {**settings, "variant": variant, "rows": _rows_digest(rows)}
        predict(
            pipe,
            rows,
            PredictionFile(files[variant][state.process_index], header),
            arguments.batch_size,
            process=(state.process_index, state.num_processes),
            running=RunningScore(arguments.benchmark, arguments.protocol) if state.is_main_process else None,
            seed=arguments.seed,
            **options,
        )
    state.wait_for_everyone()
    return settings, files


def run_evaluation(arguments: EvaluationArguments) -> dict[str, Any]:
    """Predict (unless predictions are given), score, and write what came out into the output folder.

    Args:
        arguments (`EvaluationArguments`): What to evaluate, on what, and how.

    Returns:
        `dict`: `settings`, `rows_scored`, and the result of the model and of each blind control. The folder has them as
        `results.json`, with a table and the figures in `results.md`, and the card's metadata in `card.yaml`.

    Raises:
        ValueError: If rows, predictions, protocol or options do not fit each other.
    """
    state = _processes()
    rows = _rows(arguments)
    variants = {"model": rows}
    if arguments.blind and arguments.predictions:
        raise ValueError(
            f"blind={arguments.blind} asks the model about other videos, but predictions={arguments.predictions} are "
            "given. Leave one of them out."
        )
    if arguments.blind:
        folder = Path(arguments.output_dir) / "black" if "black" in arguments.blind else None
        with state.main_process_first():
            controls = blind_controls(rows, arguments.seed, folder)
        variants |= {name: controls[name] for name in arguments.blind if name in controls}
    settings, files = _predictions(arguments, variants)
    results: dict[str, Any] = {"settings": {**settings, "protocol": arguments.protocol}, "rows_scored": len(rows)}
    if state.is_main_process:
        predictions = {name: read_predictions(files[name]) for name in variants}
        if "constant" in arguments.blind:
            variants["constant"], predictions["constant"] = rows, constant_predictions(rows)
        for name, variant in variants.items():
            results[name] = evaluate(arguments.benchmark, variant, predictions[name], arguments.protocol)
            for row in results[name]["rows"]:  # no path of this machine in a file that may be published
                row["video"] = Path(str(row["video"])).name
        _write(arguments, results, rows, predictions["model"])
    return results


def _write(
    arguments: EvaluationArguments,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Any],
) -> None:
    """Results first, so that they are safe whatever happens to a picture."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, default=_plain)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(results) + "\n", encoding="utf-8")
    (folder / "card.yaml").write_text(yaml_dump(card_metadata(results), sort_keys=False), encoding="utf-8")
    write_eval_results(folder, card_results(results))
    if not arguments.figures:
        return
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("No figures: matplotlib is not installed. `pip install 'd2vlm-hf[eval]'` brings it.")
        return
    parts = parts_of(results)
    figures = {name: headlines(part) for name, part in parts.items()}
    paths = draw_figures(folder / "figures", parts, figures, rows, predictions, arguments.examples)
    pictures = [f"![{path.stem}](figures/{path.name})" for path in paths]
    (folder / "results.md").write_text("\n\n".join([table(results), *pictures]) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON. Turn it into numbers and lists first.")


def main(argv: Sequence[str] | None = None) -> None:
    """`--config X.yaml` and options that override it; unknown keys are errors."""
    logging.basicConfig(format="%(message)s")
    (arguments,) = TrlParser((EvaluationArguments,), prog="d2vlm evaluate").parse_args_and_config(args=argv)
    if arguments.compare is not None:
        sys.stdout.write(compare(*arguments.compare, seed=arguments.seed) + "\n")
        return
    results = run_evaluation(arguments)
    if _processes().is_main_process:
        sys.stdout.write(f"{table(results)}\nwritten to {arguments.output_dir}\n")


if __name__ == "__main__":
    main()


__all__ = ["EvaluationArguments", "RunningScore", "compare", "evaluate", "main", "predict", "run_evaluation", "table"]
