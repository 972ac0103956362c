# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Make a task of lmms-eval of a folder of shapes.

    d2vlm shapes OUT --split test --num-videos 100
    python -m d2vlm_hf.lmms_plugin.task OUT
    python -m lmms_eval --include_path OUT --tasks d2vlm_shapes --model d2vlm --model_args pretrained=DIR,evidence=true

Any other model of the harness takes the place of `d2vlm` in the last line.
"""

import argparse
import json
import os
from pathlib import Path

from ..evaluation.shapes_benchmark import TASKS


NAME = "d2vlm_shapes"
_FUNCTIONS = {
    "doc_to_visual": "video_path",
    "doc_to_text": "question_text",
    "doc_to_target": "target_text",
    "process_results": "process_results",
}


def write_task(folder: str | os.PathLike, max_new_tokens: int = 256) -> Path:
    """Write the task's YAML beside the rows.

    Args:
        folder (`str`): What `d2vlm shapes` wrote.
        max_new_tokens (`int`, *optional*, defaults to 256): Length of an answer at most.

    Returns:
        `Path`: The YAML; the folder is what `--include_path` takes.

    Raises:
        ValueError: If the folder holds no rows of shapes.
    """
    folder = Path(folder).resolve()
    rows = folder / "rows.jsonl"
    if not rows.is_file():
        raise ValueError(f"{folder} has no rows.jsonl, so there is no task to make. Run `d2vlm shapes {folder}` first.")
    own = f"{__package__}.answers"
    metrics = [f"  - {{metric: shapes_{task}, aggregation: mean, higher_is_better: true}}" for task in TASKS]
    mean = f"  - {{metric: shapes_mean, aggregation: !function {own}.mean_of_tasks, higher_is_better: true}}"
    lines = [
        f"task: {NAME}",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(rows))}}}}}",
        "test_split: test",
        "output_type: generate_until",
        *(f"{key}: !function {own}.{function}" for key, function in _FUNCTIONS.items()),
        f"generation_kwargs: {{max_new_tokens: {max_new_tokens}, temperature: 0, do_sample: false}}",
        "cluster_key: video",
        "metric_list:",
        *metrics,
        mean,
        f"lmms_eval_specific_kwargs: {{default: {{root: {json.dumps(str(folder))}}}}}",
    ]
    path = folder / f"{NAME}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a task of lmms-eval of a folder of shapes.")
    parser.add_argument("folder", help="what `d2vlm shapes` wrote")
    write_task(parser.parse_args().folder)


__all__ = ["NAME", "write_task"]
