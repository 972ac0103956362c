# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Options of factorized preference optimization."""

from dataclasses import dataclass, field

from trl import DPOConfig

from .configs import GroundingArguments


LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
"""TRL's loss types; all of them see the joint log-likelihood of text and grounding."""


@dataclass
class FPOConfig(GroundingArguments, DPOConfig):
    """Options of `FPOTrainer`: those of `trl.DPOConfig` and `GroundingArguments`.

    Defaults that differ from `DPOConfig`: `learning_rate` 2e-5 (as in the paper's training), `lr_scheduler_type`
    "cosine",
    `warmup_steps` 0.03 (a share), `gradient_checkpointing` False (the shared prefix needs a cache), `max_length` None
    (rows are never truncated: a cut video has no times), `remove_unused_columns` False, `bf16` False.
    """

    output_dir: str | None = field(default="d2vlm-fpo", metadata={"help": "Folder of checkpoints and of the result."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate (paper: 2e-5; LoRA 5e-5)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1 a share of all steps."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations. Costs the shared prefix; results are the same."}
    )
    bf16: bool | None = field(default=False, metadata={"help": "Train under bfloat16 autocast."})
    max_length: int | None = field(default=None, metadata={"help": "Must stay unset: rows are never truncated."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: the collator reads the rows."})
    reference_free: bool = field(
        default=True, metadata={"help": "The paper's FPO has no reference model; False uses TRL's reference."}
    )
    text_weight: float = field(default=1.0, metadata={"help": "Weight of the text log-likelihood; 0: grounding only."})
    grounding_weight: float = field(
        default=1.0, metadata={"help": "Weight of the grounding log-likelihood; 0: plain DPO on the text."}
    )
    sft_weight: float = field(default=1.0, metadata={"help": "Weight of the language-model loss on chosen responses."})
    grounding_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the grounding loss on chosen responses. Default: the model's (10)."}
    )
    consistency_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the consistency loss on chosen responses. Default: the model's."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reject("ld_alpha", self.ld_alpha, "it shortens the text part of the likelihood, not the grounding part")
        self._reject("use_weighting", self.use_weighting, "WPO's weights are those of text alone")
        self._reject("max_length", self.max_length, "a truncated video has no times any more")
        self._reject("remove_unused_columns", self.remove_unused_columns, "the collator reads the videos and spans")
        self._reject("padding_free", self.padding_free, "prompts and responses must meet in one column")
        unknown = [loss_type for loss_type in self.loss_type if loss_type not in LOSS_TYPES]
        if unknown:
            raise ValueError(
                f"loss_type {unknown} is not supported: the joint likelihood is only checked for {list(LOSS_TYPES)}. "
                "Use some of them."
            )
        if self.reference_free and self.sync_ref_model:
            raise ValueError(
                "sync_ref_model=True needs a reference, but reference_free=True has none. Set reference_free=False."
            )
        if self.text_weight == 0 and self.grounding_weight == 0:
            raise ValueError(
                "text_weight and grounding_weight are both 0: nothing is left to prefer. Set one of them above 0."
            )

    def _reject(self, name: str, value, reason: str) -> None:
        if value:
            raise ValueError(f"{name}={value!r} cannot be used with FPO: {reason}. Leave {name} unset.")


__all__ = ["LOSS_TYPES", "FPOConfig"]
