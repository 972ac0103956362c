# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation from rows to a table: `d2vlm evaluate --config X.yaml`.

    model -> predictions (resumable JSON lines, one shard a process) -> metrics -> JSON and a table

Decoding is greedy unless `generate_kwargs` says otherwise, so two runs give the same bytes.
"""

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import pipeline
from trl import TrlParser

from ..bundled import bundled_checkpoint
from ..data.shapes import ShapesConfig, blind_controls, generate
from ..data.sources import load_rows
from .benchmarks import load_annotations
from .prediction_files import PredictionFile, read_predictions
from .statistics import paired_difference


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
        default_factory=list, metadata={"help": "Blind controls to run too: 'swapped' and 'black' videos."}
    )
    fps: float | None = field(default=None, metadata={"help": "Frames per second. Default: the checkpoint's."})
    max_frames: int | None = field(default=None, metadata={"help": "Frames per video. Default: the checkpoint's."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens per answer at most."})
    generate_kwargs: dict[str, Any] = field(default_factory=dict, metadata={"help": "More for `generate`."})
    batch_size: int = field(default=8, metadata={"help": "Videos at a time."})
    limit: int | None = field(default=None, metadata={"help": "Only the first rows."})
    seed: int = field(default=0, metadata={"help": "Of the blind controls and the bootstrap."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})

    def __post_init__(self) -> None:
        if self.benchmark not in SCORERS:
            raise ValueError(f"benchmark={self.benchmark!r} is unknown. Use one of {sorted(SCORERS)}.")
        unknown = set(self.blind) - {"swapped", "black"}
        if unknown:
            raise ValueError(f"blind={self.blind} has unknown controls {sorted(unknown)}. Use 'swapped' and 'black'.")
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


def predict(pipe, rows: Sequence[Mapping[str, Any]], file: PredictionFile, batch_size: int = 8, **options: Any) -> None:
    """Answer the rows that a file of predictions still lacks, a few videos at a time, with a progress bar."""
    done = file.read()
    missing = [row for row in rows if str(row["id"]) not in done]
    bar = tqdm(total=len(rows), initial=len(rows) - len(missing), desc=file.path.stem, unit="row")
    with bar:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            inputs = [{key: row.get(key) for key in ("video", "question", "question_spans")} for row in part]
            for row, result in zip(part, pipe(inputs, batch_size=batch_size, **options), strict=True):
                file.add(str(row["id"]), result)
            bar.update(len(part))


def _rows(arguments: EvaluationArguments) -> list[dict[str, Any]]:
    state = PartialState()
    if arguments.shapes is not None:
        folder = Path(arguments.output_dir) / "shapes"
        with state.main_process_first():
            generate(ShapesConfig(**arguments.shapes), folder, progress=state.is_main_process)
        rows = load_rows(str(folder))
    elif arguments.benchmark == "shapes":
        rows = load_rows(arguments.dataset, arguments.dataset_split, arguments.video_root)
    else:
        rows = load_annotations(arguments.benchmark, arguments.dataset, arguments.prompt)
        root = Path(arguments.video_root or Path(arguments.dataset).parent)
        rows = [{**row, "video": str(root / row["video"])} for row in rows]
    return list(rows)[: arguments.limit]


def _settings(arguments: EvaluationArguments, model: str) -> dict[str, Any]:
    """What decides the predictions; names of folders only, no path of a machine."""
    names = ("benchmark", "prompt", "fps", "max_frames", "max_new_tokens", "generate_kwargs", "shapes", "limit")
    known = asdict(arguments)
    return {"model": Path(model).name, **{name: known[name] for name in names}}


def run_evaluation(arguments: EvaluationArguments) -> dict[str, Any]:
    """Predict (unless predictions are given), score, and write `results.json` and `results.md`.

    Returns:
        The results: metrics of the model and of each blind control.
    """
    state = PartialState()
    rows = _rows(arguments)
    variants = {"model": rows}
    if arguments.blind:
        folder = Path(arguments.output_dir) / "black" if "black" in arguments.blind else None
        with state.main_process_first():
            controls = blind_controls(rows, arguments.seed, folder)
        variants |= {name: controls[name] for name in arguments.blind}
    files = dict.fromkeys(variants, arguments.predictions) if arguments.predictions else {}
    settings: dict[str, Any] = {"predictions": [Path(p).name for p in arguments.predictions or []]}
    if not arguments.predictions:
        model = arguments.model or bundled_checkpoint()
        settings = _settings(arguments, model)
        pipe = pipeline(
            "video-grounding", model=model, trust_remote_code=arguments.trust_remote_code, device=state.device
        )
        for name, variant in variants.items():
            stem = Path(arguments.output_dir) / f"predictions-{name}"
            files[name] = [f"{stem}-{rank:03d}.jsonl" for rank in range(state.num_processes)]
            file = PredictionFile(files[name][state.process_index], {**settings, "variant": name})
            own = variant[state.process_index :: state.num_processes]
            options = {key: getattr(arguments, key) for key in ("fps", "max_frames", "max_new_tokens")}
            predict(pipe, own, file, arguments.batch_size, generate_kwargs=arguments.generate_kwargs, **options)
        state.wait_for_everyone()
    results: dict[str, Any] = {"settings": {**settings, "protocol": arguments.protocol}, "rows_scored": len(rows)}
    if state.is_main_process:
        for name, variant in variants.items():
            results[name] = evaluate(arguments.benchmark, variant, read_predictions(files[name]), arguments.protocol)
            for row in results[name]["rows"]:  # no path of this machine in a file that may be published
                row["video"] = Path(str(row["video"])).name
        _write(Path(arguments.output_dir), results)
    return results


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False, default=_plain)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(results) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON. Turn it into numbers and lists first.")


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested summary by path; an interval's value stands for it."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping) and "value" in value and isinstance(value["value"], int | float):
            flat[f"{prefix}{key}"] = float(value["value"])
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def table(results: Mapping[str, Any]) -> str:
    """A Markdown table: one line a metric, one column for the model and for each blind control."""
    columns = {
        name: _flat(part["metrics"])
        for name, part in results.items()
        if isinstance(part, Mapping) and "metrics" in part
    }
    names = list(dict.fromkeys(key for flat in columns.values() for key in flat))
    lines = ["| metric | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = [f"{flat[name]:.3f}" if name in flat else "" for flat in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(first: str, second: str, key: str = "score", seed: int = 0) -> str:
    """A paired comparison of two results on the same rows, as a Markdown table.

    Args:
        first, second (`str`): `results.json` of two runs.
        key (`str`): Per-row figure to compare.
        seed (`int`): Of the bootstrap.

    Raises:
        ValueError: results of different rows, or without the figure.
    """
    scores = []
    for path in (first, second):
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["model"]["rows"]
        scores.append({str(row["id"]): row for row in rows if row.get(key) is not None})
    common = [row_id for row_id in scores[0] if row_id in scores[1]]
    if not common or len(common) < max(map(len, scores)):
        raise ValueError(
            f"{first} and {second} share {len(common)} of {len(scores[0])} and {len(scores[1])} scored rows: a paired "
            "comparison needs the same rows. Evaluate both on the same data."
        )
    lines = ["| task | rows | first | second | difference | 95 % | wins | losses | ties |", "|---" * 9 + "|"]
    tasks = {row_id: scores[0][row_id].get("task", "") for row_id in common}
    for task in ["all", *sorted(set(tasks.values()))]:
        ids = [row_id for row_id in common if task in ("all", tasks[row_id])]
        a, b = ([float(part[row_id][key]) for row_id in ids] for part in scores)
        result = paired_difference(b, a, seed=seed)
        lines.append(
            f"| {task} | {len(ids)} | {np.mean(a):.3f} | {np.mean(b):.3f} | {result.difference:+.3f} "
            f"| [{result.low:+.3f}, {result.high:+.3f}] | {result.wins} | {result.losses} | {result.ties} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """`--config X.yaml` and options that override it; unknown keys are errors."""
    logging.basicConfig(format="%(message)s")
    (arguments,) = TrlParser((EvaluationArguments,), prog="d2vlm evaluate").parse_args_and_config(args=argv)
    if arguments.compare is not None:
        logger.warning("%s", compare(*arguments.compare, seed=arguments.seed))
        return
    results = run_evaluation(arguments)
    if PartialState().is_main_process:
        logger.warning("%s", table(results))


if __name__ == "__main__":
    main()


__all__ = ["EvaluationArguments", "compare", "evaluate", "main", "predict", "run_evaluation", "table"]
