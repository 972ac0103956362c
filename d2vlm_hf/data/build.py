# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Preference data from one YAML: `d2vlm make-preferences --config X.yaml`."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from trl import TrlParser

from ..hub.card_data import DatasetCardInfo
from ..hub.cards import render_dataset_card
from ..hub.records import collect_run_record
from .importers import import_rows
from .parquet_files import read_texts, write_parquet
from .preference import make_preferences
from .schema import PERTURBATIONS
from .shapes import ShapesConfig, generate
from .sources import load_rows


logger = logging.getLogger(__name__)

KINDS = [kind for kinds in PERTURBATIONS.values() for kind in kinds]
SOURCE = (
    "One factor of each good answer is broken on purpose: the grounding (a moment is shifted, added, dropped, or "
    "merged with another) or the text (a detail is exchanged for one that occurs elsewhere in the data, or a few words "
    "are repeated). `factor`, `perturbation`, `edit` and `seed` say what was done, so every row can be made again."
)
LIMIT = (
    "A rejected answer differs from the chosen one by one edit. What a real model gets wrong is often wrong in several "
    "ways at once."
)


@dataclass
class PreferenceArguments:
    """What to make preference rows of, and how."""

    output: str = field(metadata={"help": "Folder of the data set: parquet files that load_dataset reads."})
    dataset: str | None = field(default=None, metadata={"help": "SFT rows: .jsonl, .json, .parquet, folder or Hub id."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a folder or Hub data set."})
    format: str | None = field(
        default=None, metadata={"help": "Published annotation format of `dataset`, as 'charades_sta' or 'et_instruct'."}
    )
    video_root: str | None = field(default=None, metadata={"help": "Folder that relative video paths start from."})
    shapes: dict[str, Any] | None = field(
        default=None, metadata={"help": "`ShapesConfig` of videos to make first, in `<output>-shapes`."}
    )
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": f"Some of {KINDS}."})
    per_row: int | None = field(
        default=None, metadata={"help": "Rejected answers per row at most; default: all kinds."}
    )
    choices: bool = field(
        default=False,
        metadata={"help": "Also ask which answer is right, with the rejected answers of a row as wrong options."},
    )
    seed: int = field(default=0, metadata={"help": "With a row's id and the kind it fixes the result."})
    split: str = field(default="train", metadata={"help": "Split to write."})
    embed_video: bool = field(default=True, metadata={"help": "Put the videos into the files, not only their paths."})
    num_proc: int = field(default=1, metadata={"help": "Processes that render shapes."})
    license: str | None = field(
        default=None, metadata={"help": "Licence id for the card; default: apache-2.0 for shapes, else left open."}
    )

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.shapes is None):
            raise ValueError(
                f"dataset={self.dataset!r} and shapes={'given' if self.shapes else None}: rows come from exactly one "
                "of them. Name a data set, or describe shapes to render."
            )
        if self.license is None and self.shapes is not None:
            self.license = "apache-2.0"


def _source(arguments: PreferenceArguments):
    if arguments.shapes is not None:
        folder = Path(f"{arguments.output.rstrip('/')}-shapes")
        return load_rows(str(generate(ShapesConfig(**arguments.shapes), folder, num_proc=arguments.num_proc)))
    if arguments.format is not None:
        imported = import_rows(arguments.format, arguments.dataset, video_root=arguments.video_root)
        rows = list(imported.rows)
        logger.warning("%s: %d rows read, %d kept, dropped: %s", arguments.format, imported.read, imported.kept,
                       dict(imported.dropped))  # fmt: skip
        return rows
    return load_rows(arguments.dataset, arguments.dataset_split, arguments.video_root)


def build_preferences(arguments: PreferenceArguments) -> dict[str, Any]:
    """Make preference rows and write them as parquet; beside the data stand `counts.json` and the card, `README.md`.

    Returns:
        Counts: rows read, rows made by factor and kind, and why others were impossible.
    """
    started = time.time()
    preferences = make_preferences(
        _source(arguments),
        kinds=arguments.kinds,
        per_row=arguments.per_row,
        seed=arguments.seed,
        choices=arguments.choices,
    )
    bar = tqdm(preferences, desc="preference rows", unit="row")
    write_parquet(bar, arguments.output, embed_video=arguments.embed_video, split=arguments.split)
    counts = preferences.counts()
    Path(arguments.output, "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    _write_card(arguments, time.time() - started)
    logger.warning("%d rows -> %s", counts["rows"], counts["made"])
    return counts


def _write_card(arguments: PreferenceArguments, seconds: float) -> None:
    """The card of what now lies in the folder, splits of earlier runs included."""
    folder, splits = Path(arguments.output), read_texts(arguments.output)
    run = collect_run_record(
        "make-preferences", config=asdict(arguments), device="cpu", seed=arguments.seed, wall_time_s=seconds
    )
    info = DatasetCardInfo.from_rows(
        folder.name, splits, license=arguments.license, source=SOURCE, run=run, limits=[LIMIT], language=["en"],
        tags=["synthetic"] if arguments.shapes is not None else [],
    )  # fmt: skip
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    render_dataset_card(info, {"configs": [{"config_name": "default", "data_files": files}]}).save(folder / "README.md")


def main(argv: Sequence[str] | None = None) -> None:
    """`--config X.yaml` and options that override it; unknown keys are errors."""
    logging.basicConfig(format="%(message)s")
    parser = TrlParser((PreferenceArguments,), prog="d2vlm make-preferences")
    build_preferences(*parser.parse_args_and_config(args=argv))


if __name__ == "__main__":
    main()


__all__ = ["PreferenceArguments", "build_preferences", "main"]
