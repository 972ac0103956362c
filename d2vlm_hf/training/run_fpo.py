# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A run of factorized preference optimization from one YAML: `d2vlm fpo --config X.yaml`."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import TrlParser

from ..data.schema import features
from ..data.sources import load_rows
from .configs import DataArguments, ModelArguments
from .fpo_config import FPOConfig
from .fpo_trainer import FPOTrainer
from .run import effective_batch, finish_run, load_model, lora_config


logger = logging.getLogger(__name__)


def load_preferences(path: str, split: str, video_root: str | None) -> Dataset:
    """Preference rows as a `datasets.Dataset`, whatever they are stored in."""
    rows = load_rows(path, split, video_root)
    return rows if isinstance(rows, Dataset) else Dataset.from_list(rows, features=features(preference=True))


def run_fpo(model_arguments: ModelArguments, data: DataArguments, config: FPOConfig) -> dict[str, Any]:
    """Train on preferences, resuming from the newest checkpoint, and save a complete checkpoint folder.

    Returns:
        The metrics of the run.

    Raises:
        ValueError: a run without stored preference rows.
    """
    if data.dataset is None:
        raise ValueError(
            "dataset is missing: FPO trains on stored preference rows. Make them with `d2vlm make-preferences`."
        )
    set_seed(config.seed)
    model, processor = load_model(model_arguments, config)
    if model_arguments.attn_implementation is not None:
        model.set_attn_implementation(model_arguments.attn_implementation)
    trainer = FPOTrainer(
        model=model,
        args=config,
        processing_class=processor,
        train_dataset=load_preferences(data.dataset, data.dataset_split, data.video_root),
        eval_dataset=load_preferences(data.eval_dataset, "validation", data.video_root) if data.eval_dataset else None,
        peft_config=lora_config(model, model_arguments) if model_arguments.use_lora else None,
    )
    logger.warning("effective batch: %d pairs", effective_batch(config))
    return finish_run(trainer, processor, config, model_arguments.license)


def main(argv: Sequence[str] | None = None) -> None:
    """`--config X.yaml` and options that override it; unknown keys are errors."""
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    parser = TrlParser((ModelArguments, DataArguments, FPOConfig), prog="d2vlm fpo")
    run_fpo(*parser.parse_args_and_config(args=argv))


if __name__ == "__main__":
    main()


__all__ = ["load_preferences", "main", "run_fpo"]
