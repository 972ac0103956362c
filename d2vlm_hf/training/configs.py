# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Options of the trainers and of the training scripts."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments


@dataclass
class GroundingArguments:
    """Options that SFT and FPO share; see the help of each field."""

    fps: float | None = field(
        default=None, metadata={"help": "Frames per second to sample. Default: the video processor's."}
    )
    max_frames: int | None = field(
        default=None, metadata={"help": "Frames per video at most. Default: the video processor's."}
    )
    on_error: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "A broken row: 'raise' stops with its path and reason, 'skip' leaves it out and counts it."},
    )
    stages: Literal["both", "answer", "grounding", "text"] = field(
        default="both",
        metadata={
            "help": "'both': grounding, then the answer with evidence (D2VLM). 'answer': no grounding stage (coupled "
            "baseline). 'grounding': grounding stage, answer without evidence (factorized baseline). 'text': no "
            "evidence at all."
        },
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Keep the vision tower as it is, as the paper does."})
    full_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of everything that is trained in full beside LoRA (heads, embeddings, connector). "
            "Default: learning_rate for all."
        },
    )
    eval_generate_rows: int = field(
        default=0, metadata={"help": "Rows of the evaluation set to generate answers for at each evaluation."}
    )
    eval_generate_every: int = field(
        default=1, metadata={"help": "Generate at the first evaluation and at every so many after it."}
    )
    eval_max_new_tokens: int = field(default=128, metadata={"help": "Tokens to generate per answer in evaluation."})


@dataclass
class D2VLMSFTConfig(GroundingArguments, TrainingArguments):
    """Options of `D2VLMSFTTrainer`: those of `TrainingArguments` and `GroundingArguments`.

    Defaults that differ from `TrainingArguments`: `learning_rate` 5e-5 stays, `lr_scheduler_type` "cosine",
    `warmup_steps` 0.03 (a share), `logging_steps` 10, `remove_unused_columns` False, `gradient_checkpointing` False
    (the shared prefix needs a cache).
    """

    output_dir: str | None = field(default="d2vlm-sft", metadata={"help": "Folder of checkpoints and of the result."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1 a share of all steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads the rows."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Inputs that are targets."}
    )
    # here and not in ModelArguments: TRL's DPOConfig has the option too, and a parser takes every option once
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the video and the spans before the collator sees them. Leave it "
                "off."
            )


@dataclass
class ModelArguments:
    """Where the model comes from and what of it is trained."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint folder or Hub id to start from; not with `scratch`."}
    )
    scratch: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Build a model from nothing: `vision`, `qformer`, `text`, `model` and `processor` options."},
    )
    warmup: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "First lessons on the shapes world for a model from `scratch`: fields of `WarmupOptions`."},
    )
    revision: str = field(default="main", metadata={"help": "Revision of a Hub model."})
    dtype: str | None = field(default=None, metadata={"help": "dtype to load the weights in, as 'bfloat16'."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "'sdpa', 'eager', ... On a CPU in bfloat16 'eager' trains faster."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the result, for its card; `d2vlm push` wants one, as 'apache-2.0'."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train low-rank adapters of the language model."})
    lora_r: int = field(default=128, metadata={"help": "Rank (paper: 128)."})
    lora_alpha: int = field(default=256, metadata={"help": "Alpha (paper: 256)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout (paper: 0.05)."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Projections of the language model. Default: attention inputs and output."}
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.scratch is None):
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path!r} and scratch={'given' if self.scratch else None}: a "
                "run starts from exactly one of them. Give a checkpoint, or the sizes of a model to build."
            )
        if self.warmup is not None and self.scratch is None:
            raise ValueError(
                f"warmup={self.warmup} stands beside model_name_or_path={self.model_name_or_path!r}: a trained model "
                "would unlearn what it knows. Leave warmup out, or give the sizes of a model to build in scratch."
            )


@dataclass
class DataArguments:
    """Where the rows come from."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Rows of the schema: .jsonl, .json or .parquet file, folder, or Hub id."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set or folder."})
    video_root: str | None = field(default=None, metadata={"help": "Folder that relative video paths start from."})
    shapes: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Render the shapes world while training: `size`, `seed`, `rows_per_video`, `stages`."},
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to evaluate on, as `dataset`."})
    eval_shapes: dict[str, Any] | None = field(
        default=None, metadata={"help": "`ShapesConfig` of an evaluation set; its files are made in the output folder."}
    )

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.shapes is None):
            raise ValueError(
                f"dataset={self.dataset!r} and shapes={'given' if self.shapes else None}: rows come from exactly one "
                "of them. Name a data set, or describe the shapes to render."
            )


__all__ = ["D2VLMSFTConfig", "DataArguments", "GroundingArguments", "ModelArguments"]
