# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["d2vlm-hf[train,eval]"]
# ///
"""The ladder on the shapes world: what each part of the method adds, under equal budgets.

    python recipes/shapes/ladder/run.py --config recipes/shapes/ladder/ladder.yaml
    python recipes/shapes/ladder/run.py --config recipes/shapes/ladder/ladder.yaml --arms fpo --seeds 1

A killed run goes on where it stopped, arm by arm and seed by seed. Any option of the YAML can be overridden on the
command line; unknown keys are errors.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ladder_arms import ARMS, Material, preference_rows, train_arm
from ladder_report import write_report
from ladder_scores import score_arm
from ladder_videos import PatchStore
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import TrlParser

from d2vlm_hf.data.shapes import TASK_WEIGHTS, make_rows, make_scene


@dataclass
class LadderArguments:
    """What the ladder is measured on, and how much each arm may learn."""

    stage0: str = field(metadata={"help": "Checkpoint that all arms start from; its tower stays frozen."})
    output_dir: str = field(default="runs/shapes-ladder", metadata={"help": "Folder of all that is made."})
    readme: str = field(
        default="recipes/shapes/ladder/README.md",
        metadata={"help": "Where the table goes, the picture beside it."},
    )
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": f"Some of {list(ARMS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Runs of each arm."})
    difficulty: str = field(default="middle", metadata={"help": "Of the shapes world; SFT should not be saturated."})
    fps: float = field(default=2.0, metadata={"help": "Frames per second."})
    task_weights: dict[str, float] = field(
        default_factory=lambda: dict(TASK_WEIGHTS), metadata={"help": "Share of each task in training and test."}
    )
    train_videos: int = field(default=1500, metadata={"help": "Videos that the arms learn from."})
    train_rows: int = field(default=3, metadata={"help": "Rows about each of them."})
    first_video: int = field(default=2_000_000, metadata={"help": "Index of the first one: stage 0 has seen others."})
    preference_videos: int = field(default=500, metadata={"help": "Videos of them that preferences are made about."})
    preferences_per_row: int = field(default=2, metadata={"help": "Rejected answers of a row at most."})
    test_videos: int = field(default=500, metadata={"help": "Videos of the test split, the same for all arms."})
    test_rows: int = field(default=4, metadata={"help": "Rows about each of them."})
    steps: int = field(default=400, metadata={"help": "Steps of an arm that starts from stage 0."})
    videos_per_step: int = field(default=8, metadata={"help": "Videos of one such step, each with all its rows."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of these steps."})
    further_steps: int = field(default=120, metadata={"help": "Steps of an arm that goes on from SFT."})
    pairs_per_step: int = field(default=16, metadata={"help": "Preference rows of one such step."})
    further_learning_rate: float = field(default=5e-5, metadata={"help": "Of these steps."})
    consistency_weight: float = field(default=10.0, metadata={"help": "Of the consistency loss, in arms that have it."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of all steps."})
    beta: float = field(default=0.1, metadata={"help": "Of FPO and DPO."})
    new_heads: bool = field(default=True, metadata={"help": "Draw the evidence heads anew, by the seed."})
    bf16: bool = field(default=False, metadata={"help": "Train under bfloat16 autocast."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    save_steps: int = field(default=100, metadata={"help": "Steps between checkpoints of an arm; 0 for none."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens of an answer at most."})
    rows_per_batch: int = field(default=32, metadata={"help": "Rows answered at a time."})

    def __post_init__(self) -> None:
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"arms has unknown names {sorted(unknown)}. Use some of {list(ARMS)}.")


def material(settings: LadderArguments) -> tuple[Material, list[dict[str, Any]], PatchStore]:
    """Training videos with rows and preferences; test rows and their videos."""
    model = AutoModelForImageTextToText.from_pretrained(settings.stage0).eval()
    processor = AutoProcessor.from_pretrained(settings.stage0)
    parts = {}
    for split, start, count in (
        ("train", settings.first_video, settings.train_videos),
        ("test", 0, settings.test_videos),
    ):
        scenes = [make_scene(settings.difficulty, split, start + index, 0) for index in range(count)]
        decides = {"stage0": str(settings.stage0), "difficulty": settings.difficulty, "fps": settings.fps}
        store = PatchStore(Path(settings.output_dir) / f"patches-{split}", {**decides, "start": start, "count": count})
        store.fill(model, processor, scenes, settings.fps)
        rows = settings.train_rows if split == "train" else settings.test_rows
        groups = [{"rows": make_rows(scene, rows, settings.task_weights, video=scene.name)} for scene in scenes]
        parts[split] = store, [group for group in groups if group["rows"]]
    store, groups = parts["train"]
    pairs = preference_rows(groups, settings.preference_videos, settings.preferences_per_row)
    test_store, test_groups = parts["test"]
    return Material(store, groups, pairs), [row for group in test_groups for row in group["rows"]], test_store


def run_ladder(settings: LadderArguments) -> dict[str, Any]:
    """Train and score every arm with every seed, then write the report.

    Args:
        settings (`LadderArguments`): Of the run.

    Returns:
        `dict`: Arm -> seed -> scores of the test rows.
    """
    torch.set_num_threads(settings.threads)
    learned, rows, store = material(settings)
    for seed in settings.seeds:
        for name in (arm for arm in ARMS if arm in settings.arms):
            folder = train_arm(name, seed, settings, learned).parent
            if not (folder / "scores.json").exists():
                scores = score_arm(folder, ARMS[name].stages, rows, store, settings)
                (folder / "scores.json").write_text(json.dumps(scores) + "\n")
    return report(settings)


def report(settings: LadderArguments) -> dict[str, Any]:
    """Write the README of whatever arms and seeds are done by now."""
    scores: dict[str, dict[int, Any]] = {}
    minutes: dict[str, float | None] = {}
    for name in ARMS:
        done = sorted(Path(settings.output_dir).glob(f"{name}-[0-9]*/scores.json"))
        if done:
            scores[name] = {int(path.parent.name.rpartition("-")[2]): json.loads(path.read_text()) for path in done}
            trained = [json.loads((path.parent / "trained.json").read_text()) for path in done]
            whole = [part["cpu_seconds"] / 60 for part in trained if not part["resumed"]]
            minutes[name] = sum(whole) / len(whole) if whole else None
    facts = (
        f"Measured on {settings.test_videos} videos of the test split ({settings.difficulty}, {settings.fps:g} fps); "
        f"{settings.steps} steps of {settings.videos_per_step} videos from stage 0, {settings.further_steps} steps of "
        f"{settings.pairs_per_step} preference rows from SFT; {settings.threads} thread(s)."
    )
    write_report(scores, minutes, facts, Path(settings.readme))
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    """`--config X.yaml` and options that override it; unknown keys are errors."""
    logging.basicConfig(format="%(message)s")
    run_ladder(*TrlParser((LadderArguments,)).parse_args_and_config(args=argv))


if __name__ == "__main__":
    main()
