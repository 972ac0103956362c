# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The arms of the ladder, and how one of them is trained."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Video
from ladder_videos import PatchStore, StoredVideos
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from d2vlm_hf.data.collators import PreferenceCollator, SFTCollator
from d2vlm_hf.data.preference import make_preferences
from d2vlm_hf.data.schema import features
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint
from d2vlm_hf.training.configs import D2VLMSFTConfig
from d2vlm_hf.training.fpo_config import FPOConfig
from d2vlm_hf.training.fpo_trainer import FPOTrainer
from d2vlm_hf.training.sft_trainer import D2VLMSFTTrainer


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Args:
        title (`str`): What it is called in the table.
        stages (`str`): As in `GroundingArguments`.
        model (`dict`): Fields of `D2VLMConfig` that it changes.
        after (`str`, *optional*): The arm whose result it starts from; default: stage 0.
        preference (`dict`, *optional*): Fields of `FPOConfig`; without them the arm is supervised.
    """

    title: str
    stages: str = "both"
    model: dict[str, Any] = field(default_factory=dict)
    after: str | None = None
    preference: dict[str, Any] | None = None


ALONE = {"consistency_weight": 0.0}
ARMS = {
    "coupled": Arm("coupled: no grounding stage", "answer", ALONE),
    "factorized": Arm("+ factorized: grounding, then an answer without evidence", "grounding", ALONE),
    "interleaved": Arm("+ interleaved: evidence in the answer", model=ALONE),
    "consistency": Arm("+ consistency (= SFT)"),
    "fpo": Arm("+ FPO", after="consistency", preference={}),
    "more-sft": Arm("SFT, more SFT instead of FPO", after="consistency"),
    "dpo": Arm("SFT, plain DPO instead of FPO", after="consistency", preference={"grounding_weight": 0.0}),
    "no-capture": Arm("SFT without visual capture", model={"visual_capture": False}),
}
"""In the order of the table; an arm stands behind the one that it starts from."""


@dataclass
class Material:
    """What the arms learn from: the videos, their rows (grouped by video), and preference rows of some of them."""

    store: PatchStore
    groups: list[dict[str, Any]]
    pairs: Dataset


def preference_rows(groups: list[dict[str, Any]], videos: int, per_row: int, seed: int = 0) -> Dataset:
    """Preference rows about the first videos."""
    rows = [row for group in groups[:videos] for row in group["rows"]]
    made = list(make_preferences(rows, per_row=per_row, seed=seed))
    return Dataset.from_list(made, features=features(preference=True)).cast_column("video", Video(decode=False))


def train_arm(name: str, seed: int, settings, material: Material) -> Path:
    """Train an arm, or go on where it was killed.

    Args:
        name (`str`), seed (`int`): The arm, and what it draws the order of its rows (and new heads) from.
        settings (`LadderArguments`): Of the run.
        material (`Material`): What to learn from.

    Returns:
        `Path`: Folder of the trained checkpoint.
    """
    arm, folder = ARMS[name], Path(settings.output_dir) / f"{name}-{seed}"
    done = folder / "trained.json"
    if done.exists():
        return folder / "model"
    source = settings.stage0 if arm.after is None else train_arm(arm.after, seed, settings, material)
    set_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    if arm.after is None and settings.new_heads:
        for module in [*model.evidence_head, *model.frame_head]:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    for option, value in {"consistency_weight": settings.consistency_weight, **arm.model}.items():
        setattr(model.config, option, value)
    trainer = _trainer(arm, folder / "checkpoints", seed, settings, material, model, processor)
    kept = get_last_checkpoint(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    started, processor_started = time.time(), time.process_time()
    trainer.train(resume_from_checkpoint=kept)
    figures = {"wall_seconds": time.time() - started, "cpu_seconds": time.process_time() - processor_started}
    figures |= {"steps": trainer.state.global_step, "resumed": kept is not None, "log": trainer.state.log_history}
    save_checkpoint(folder / "model", model, processor)
    done.write_text(json.dumps(figures, indent=1) + "\n")
    return folder / "model"


def _trainer(arm: Arm, folder: Path, seed: int, settings, material: Material, model, processor):
    """The same budget for all first arms, and the same for all that go on from the supervised one."""
    first = arm.after is None
    options = {
        "output_dir": str(folder),
        "stages": arm.stages,
        "max_steps": settings.steps if first else settings.further_steps,
        "per_device_train_batch_size": settings.videos_per_step if first else settings.pairs_per_step,
        "learning_rate": settings.learning_rate if first else settings.further_learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": 1.0,
        "bf16": settings.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": 1,
        "logging_steps": 20,
        "report_to": "none",
    }
    chosen = {"model": model, "processing_class": processor}
    if arm.preference is None:
        collator = StoredVideos(SFTCollator(processor, stages=arm.stages), material.store)
        rows = material.groups if first else material.pairs
        return D2VLMSFTTrainer(args=D2VLMSFTConfig(**options), train_dataset=rows, data_collator=collator, **chosen)
    collator = StoredVideos(PreferenceCollator(processor, stages=arm.stages), material.store)
    config = FPOConfig(beta=settings.beta, **options, **arm.preference)
    return FPOTrainer(args=config, train_dataset=material.pairs, data_collator=collator, **chosen)
