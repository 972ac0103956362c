# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: language modelling + grounding + consistency, as the paper's first stage."""

from typing import Any

import torch
from transformers import Trainer

from ..data.collators import SFTCollator
from .configs import D2VLMSFTConfig
from .grounding_mixin import GroundingTrainerMixin, teacher_forced_iou


class D2VLMSFTTrainer(GroundingTrainerMixin, Trainer):
    """`transformers.Trainer` on rows of the schema.

    Losses are normalised over the global accumulated batch (labelled tokens; samples with events), so that the
    number of
    processes and of accumulation steps does not change the curve. Logged beside `loss`: `lm_loss`, `grounding_loss`,
    `consistency_loss`, `grounding/miou`; in evaluation `eval_grounding/miou` (teacher-forced) and, with
    `eval_generate_rows`, `eval_generated/miou` and `eval_generated/f1`.

    Args:
        model (`D2VLMForConditionalGeneration`): The model.
        args (`D2VLMSFTConfig`): Options.
        train_dataset, eval_dataset: Rows of the schema; only `question`, `question_spans`, `answer`, `spans`,
        `video` are read.
        processing_class (`D2VLMProcessor`): The processor.
        data_collator (*optional*): Default: `SFTCollator`.
    """

    def __init__(self, model, args: D2VLMSFTConfig | None = None, processing_class=None, data_collator=None, **kwargs):
        args = args if args is not None else D2VLMSFTConfig()
        if processing_class is None:
            raise ValueError("processing_class is missing: rows are tokenized by the model's D2VLMProcessor. Pass it.")
        if args.freeze_vision:
            model.get_base_model().model.vision_tower.requires_grad_(False) if hasattr(
                model, "get_base_model"
            ) else model.model.vision_tower.requires_grad_(False)
        if data_collator is None:
            data_collator = SFTCollator(
                processing_class,
                fps=args.fps,
                max_frames=args.max_frames,
                on_error=args.on_error,
                stages=args.stages,
                max_context=model.config.text_config.max_position_embeddings,
            )
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator,
            compute_metrics=_grounding_metrics, **kwargs,
        )  # fmt: skip

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The model's own loss, normalised by the global counts."""
        counts: dict[str, Any] = {}
        if num_items_in_batch is not None and model.training:
            counts = {"num_items_in_batch": num_items_in_batch, "num_evidence_samples": self._num_evidence_samples}
        outputs = model(**inputs, **counts)
        iou = teacher_forced_iou(
            outputs, inputs["evidence_spans"], inputs["evidence_role"], self.model.config.evidence_threshold
        )
        if model.training:
            scale = self.accelerator.num_processes if counts else 1
            steps = self.args.gradient_accumulation_steps if counts else 1
            self.note(
                lm_loss=outputs.lm_loss * scale * steps,
                grounding_loss=outputs.grounding_loss * scale * steps,
                consistency_loss=outputs.consistency_loss * scale * steps,
                **{"grounding/miou": iou[:, 0].sum() / iou[:, 1].sum().clamp(min=1)},
            )
            # DDP averages gradients; the counts are global already.
            outputs.loss = outputs.loss * scale
        outputs["iou"] = iou
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Loss, and per row the IoU sum and number of its evidence tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["iou"], outputs["iou"][:, 1]


def _grounding_metrics(prediction) -> dict[str, float]:
    sums = prediction.predictions.sum(0)
    return {"grounding/miou": float(sums[0] / max(1.0, sums[1]))}


__all__ = ["D2VLMSFTTrainer"]
