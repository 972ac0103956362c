# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Factorized preference optimization as a TRL trainer.

A response's likelihood is the product of its text and its grounding (paper: FPO):

    log pi(y) = sum over tokens of log p(token) + sum over <evi> and frames of log(s_t p_t + (1 - s_t)(1 - p_t))
    L_FPO     = -log sigmoid(beta (log pi(chosen) - log pi(rejected)))          without a reference model

TRL's own `_compute_loss` keeps computing its loss types. It is handed a stand-in for the model that runs our forward
once over B videos and 2B responses and returns TRL's `FusedCausalLMOutput`; the grounding log-likelihood stands in a
column of `log_probs` where `completion_mask` is 0, so every loss type sees the joint likelihood and the `sft` type is
untouched.
"""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, Video
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from ..data.collators import IGNORE_INDEX, PreferenceCollator, last_text
from ..data.schema import PERTURBATIONS
from ..model.evidence_d2vlm import (
    ROLE_QUESTION,
    consistency_loss,
    grounding_log_likelihood,
    grounding_loss,
    soft_targets,
)
from .fpo_config import FPOConfig
from .grounding_mixin import GroundingTrainerMixin, teacher_forced_iou
from .teacher_forced import read_answers, teacher_forced_answers


logger = logging.getLogger(__name__)

# What the collator adds for us; the model does not take them.
NAMES = ("factor", "perturbation", "frame_times", "frame_period", "chosen_seconds")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
KINDS = tuple(kind for kinds in PERTURBATIONS.values() for kind in kinds)


@dataclass
class JointLikelihood:
    """Log-likelihoods of 2B responses, all chosen first.

    Attributes:
        token_logps (`torch.Tensor` of shape `(2B, S)`): Of each response token, 0 elsewhere.
        grounding (`torch.Tensor` of shape `(2B,)`): Of each response's own spans.
        outputs (`D2VLMOutput`): Of the forward.
    """

    token_logps: torch.Tensor
    grounding: torch.Tensor
    outputs: Any

    @property
    def text(self) -> torch.Tensor:
        """Sum over the tokens, `(2B,)`."""
        return self.token_logps.sum(1)

    @property
    def parts(self) -> torch.Tensor:
        """Text and grounding, `(2B, 2)`; their sum is the joint log-likelihood."""
        return torch.stack([self.text, self.grounding], dim=1)


def joint_likelihood(model, inputs: Mapping[str, Any], decay: float, **options: Any) -> JointLikelihood:
    """One forward over B videos and 2B responses (paper: FPO).

    Args:
        model: `D2VLMForConditionalGeneration`, or what wraps it.
        inputs: A batch of `PreferenceCollator`.
        decay (`float`): alpha of the soft frame labels.
        **options: Further arguments of the forward.
    """
    given = {k: v for k, v in inputs.items() if k not in (*NAMES, *REFERENCE, "completion_mask")}
    outputs = model(**given, **options)
    if outputs.evidence_logits is None:
        raise ValueError(
            "no video reached the model: the batch has no frames, so there is nothing to ground. Check that the rows "
            "have a `video` column and that the collator is a PreferenceCollator."
        )
    response = inputs["evidence_role"] > ROLE_QUESTION
    grounding = grounding_log_likelihood(
        outputs.evidence_logits, inputs["evidence_spans"], response, outputs.frame_mask, decay
    )
    return JointLikelihood(outputs.token_logps, grounding, outputs)


class FPOTrainer(GroundingTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` on preference rows of the schema, with the joint likelihood of text and grounding.

    One video encoding and one prefix serve chosen and rejected; each response is filled with its own spans. Logged
    beside TRL's rewards: `rewards/margins/text` and `/grounding`, `rewards/accuracies/text` and `/grounding`, the same
    of every perturbation kind as `rewards/margins/kind/<kind>` and `rewards/accuracies/kind/<kind>`, the loss parts,
    `grounding/miou` of the chosen responses. All losses are normalised over the global accumulated batch.

    Args:
        model: The model; a `PeftModel` or a `peft_config` trains adapters.
        args (`FPOConfig`): Options; reference-free by default, and then no second model is loaded.
        train_dataset, eval_dataset (`datasets.Dataset`): Columns `prompt`, `chosen`, `rejected`, `chosen_spans`,
            `rejected_spans`, `question_spans`, `video`, `factor`, `perturbation`.
        processing_class (`D2VLMProcessor`): The processor.
        compute_metrics (*optional*): Gets an `EvalPrediction` with what the model answers where the chosen tokens are
            given so far (no generation, no second forward): `predictions`, a dict a row with `answer`, `evidence` and
            `spans` in seconds, and `label_ids` with `answer` and `spans`.
        others: As in `trl.DPOTrainer`.
    """

    _tag_names = ["trl", "fpo", "d2vlm", "temporal-grounding"]
    _name = "FPO"

    def __init__(
        self, model, ref_model=None, args: FPOConfig | None = None, data_collator=None, train_dataset=None,
        eval_dataset=None, processing_class=None, compute_metrics=None, **kwargs,
    ):  # fmt: skip
        args = args if args is not None else FPOConfig()
        if processing_class is None:
            raise ValueError("processing_class is missing: rows are tokenized by the model's D2VLMProcessor. Pass it.")
        if args.reference_free and ref_model is not None:
            raise ValueError(
                "a ref_model was given but reference_free=True would not use it. Set reference_free=False or leave it "
                "out."
            )
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if args.freeze_vision:
            base.model.vision_tower.requires_grad_(False)
        if data_collator is None:
            data_collator = PreferenceCollator(
                processing_class,
                fps=args.fps,
                max_frames=args.max_frames,
                on_error=args.on_error,
                stages=args.stages,
                max_context=base.config.text_config.max_position_embeddings,
            )
        self._grounding_config = base.config
        self._user_metrics = compute_metrics
        asked_to_precompute = args.precompute_ref_log_probs
        # The one way to keep DPOTrainer from loading a second model; `_precompute_ref_logps` below then does nothing.
        args.precompute_ref_log_probs = asked_to_precompute or args.reference_free
        self._skip_precompute = args.reference_free
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=_undecoded(train_dataset),
            eval_dataset=_undecoded(eval_dataset),
            processing_class=processing_class,
            compute_metrics=self._metrics_of_evaluation,
            **kwargs,
        )
        args.precompute_ref_log_probs = asked_to_precompute
        self.precompute_ref_logps = asked_to_precompute and not args.reference_free
        logger.warning(
            "FPO %s, beta %g, weights: text %g, grounding %g",
            "without a reference model (reference_free=True)" if args.reference_free else "with a reference model",
            args.beta,
            args.text_weight,
            args.grounding_weight,
        )

    # ---- what TRL would do to the rows ------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return _undecoded(dataset)  # tokenized by the collator, beside the video

    def _set_signature_columns_if_needed(self):
        self._signature_columns = []

    def _precompute_ref_logps(self, dataset, name, batch_size):
        return dataset if self._skip_precompute else super()._precompute_ref_logps(dataset, name, batch_size)

    # ---- the joint likelihood in TRL's loss -------------------------------------------------------------------------

    def _joint(self, parts: torch.Tensor) -> torch.Tensor:
        """Weighted log-likelihood of text and grounding: `(N, 2)` -> `(N,)`."""
        return self.args.text_weight * parts[:, 0] + self.args.grounding_weight * parts[:, 1]

    def compute_ref_log_probs(self, model, inputs):
        """Log-likelihoods of text and grounding under the reference: `(B, 2)` of the chosen, then of the rejected."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        adapters_off = contextlib.nullcontext()
        if self.ref_model is None and hasattr(unwrapped, "peft_config"):
            adapters_off = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            adapters_off,
            self.accelerator.autocast(),
        ):
            likelihood = joint_likelihood(model, inputs, self._grounding_config.evidence_decay)
        return likelihood.parts.chunk(2)

    def _reference(self, inputs, like: torch.Tensor) -> torch.Tensor:
        """Text and grounding of all responses under the reference, `(2B, 2)`."""
        if self.args.reference_free:
            return torch.zeros_like(like)
        if "ref_chosen_logps" in inputs:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        return torch.cat(self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs))

    def _compute_loss(self, model, inputs, return_outputs):
        # what users measure reads the likeliest tokens
        options = {"logits_to_keep": 0} if self._user_metrics is not None and not self.model.training else {}
        likelihood = joint_likelihood(model, inputs, self._grounding_config.evidence_decay, **options)
        parts = likelihood.parts
        joint, reference = self._joint(parts), self._reference(inputs, parts)
        chosen, rejected = self._joint(reference).chunk(2)
        scored = inputs["labels"] != IGNORE_INDEX
        trl_inputs = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "completion_mask": scored.long(),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        # Column 0 predicts a prompt token, so it is free to hold what the joint likelihood adds to the text.
        log_probs = likelihood.token_logps[:, 1:].clone()
        log_probs[:, 0] = log_probs[:, 0] + joint - likelihood.text
        zeros = torch.zeros_like(log_probs)
        stand_in = FusedCausalLMOutput(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=scored[:, 1:]
        )
        with self._reference_given(), self._uneven_batches():
            loss = super()._compute_loss(lambda **_: stand_in, trl_inputs, return_outputs=False)
        self._drop_unmeasured()
        counts = self._counts(inputs)
        # TRL's loss is a mean over this batch; batches count by their pairs.
        loss = loss * self._count_pairs(inputs) / counts["pairs"] * counts["scale"]
        loss = loss + self._sft_terms(likelihood, inputs, counts)
        self._note_factors(likelihood, parts.detach() - reference, inputs)
        return (loss, likelihood.outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _reference_given(self):
        """Inside, TRL reads the reference values from the batch."""
        before, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            yield
        finally:
            self.precompute_ref_logps = before

    @contextlib.contextmanager
    def _uneven_batches(self):
        """Inside, TRL may gather values of pairs though processes have different numbers of them (skipped rows)."""
        gather = self.accelerator.gather
        if self.args.world_size > 1:
            self.accelerator.gather = self._gather
        try:
            yield
        finally:
            self.accelerator.gather = gather

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes, which may have different numbers of them."""
        gather = type(self.accelerator).gather
        if values.dim() == 0 or self.args.world_size == 1:
            return gather(self.accelerator, values)
        mask = torch.ones(len(values), device=values.device)
        padded = (self.accelerator.pad_across_processes(tensor) for tensor in (values, mask))
        gathered, real = (gather(self.accelerator, tensor) for tensor in padded)
        return gathered[real > 0]

    def _drop_unmeasured(self) -> None:
        """Metrics of quantities that the stand-in does not measure are not logged."""
        for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
            self._metrics["train" if self.model.training else "eval"].pop(name, None)

    def _sft_terms(self, likelihood: JointLikelihood, inputs, counts: Mapping[str, Any]) -> torch.Tensor:
        """The three SFT terms on the chosen responses, normalised over the global accumulated batch."""
        outputs, config = likelihood.outputs, self._grounding_config
        pairs = likelihood.grounding.shape[0] // 2
        role, spans = inputs["evidence_role"][:pairs], inputs["evidence_spans"][:pairs]
        similarity = outputs.evidence_logits[:pairs]
        response = role > ROLE_QUESTION
        targets = soft_targets(spans, similarity.shape[-1], config.evidence_decay)
        by_token, by_sample = counts["scale"] / counts["tokens"], counts["scale"] / counts["samples"]
        lm = -likelihood.token_logps[:pairs].sum() * by_token
        grounding = grounding_loss(similarity, targets, response, outputs.frame_mask[:pairs]).sum() * by_sample
        consistency = consistency_loss(outputs.evidence_queries[:pairs], role).sum() * by_sample
        weights = (
            self.args.sft_weight,
            _default(self.args.grounding_loss_weight, config.grounding_weight),
            _default(self.args.consistency_loss_weight, config.consistency_weight),
        )
        self._metrics_of_step(lm_loss=lm, grounding_loss=grounding, consistency_loss=consistency)
        return weights[0] * lm + weights[1] * grounding + weights[2] * consistency

    # ---- global counts ----------------------------------------------------------------------------------------------

    _global_counts: dict[str, torch.Tensor] | None = None

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Counts pairs, labelled tokens and samples with events of the chosen side, over steps and processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._global_counts = None
        if batches:
            own = torch.stack([torch.stack([self._count_pairs(b), self._count_tokens(b)]) for b in batches])
            pairs, tokens = self.accelerator.gather(own.sum(0, keepdim=True).to(device)).sum(0).clamp(min=1)
            self._global_counts = {"pairs": pairs, "tokens": tokens, "samples": self._num_evidence_samples}
        return batches, num_items

    def _counts(self, inputs) -> dict[str, Any]:
        """What the losses of a batch are divided by, and what they are multiplied with (`scale`)."""
        if self.model.training and self._global_counts is not None:
            # DDP averages over processes and Trainer over accumulation steps; the counts are global already.
            return {
                **self._global_counts,
                "scale": self.accelerator.num_processes * self.current_gradient_accumulation_steps,
            }
        own = (self._count_pairs(inputs), self._count_tokens(inputs), self._count_evidence_samples(inputs))
        return {
            **{name: n.clamp(min=1) for name, n in zip(("pairs", "tokens", "samples"), own, strict=True)},
            "scale": 1,
        }

    @staticmethod
    def _count_pairs(batch) -> torch.Tensor:
        """A row that stands in for skipped ones has no labels and is no pair."""
        return (batch["labels"].chunk(2)[0] != IGNORE_INDEX).any(1).sum()

    @staticmethod
    def _count_tokens(batch) -> torch.Tensor:
        return (batch["labels"].chunk(2)[0] != IGNORE_INDEX).sum()

    @staticmethod
    def _count_evidence_samples(batch) -> torch.Tensor:
        return (batch["evidence_role"].chunk(2)[0] > ROLE_QUESTION).any(1).sum()

    # ---- what is logged ---------------------------------------------------------------------------------------------

    def _metrics_of_step(self, **values: torch.Tensor) -> None:
        """Notes means over pairs and processes of values of one shape, `()` or `(B,)`; NaN does not count."""
        mode = "train" if self.model.training else "eval"
        table = torch.stack([value.detach().float().reshape(-1) for value in values.values()], dim=1)
        for name, mean in zip(values, self._gather(table).nanmean(0).tolist(), strict=True):
            if mean == mean:
                self._metrics[mode][name].append(mean)

    @torch.no_grad()
    def _note_factors(self, likelihood: JointLikelihood, ratios: torch.Tensor, inputs) -> None:
        """Margins and accuracies by part of the likelihood, and by perturbation kind.

        Args:
            likelihood (`JointLikelihood`): Of the batch.
            ratios (`torch.Tensor` of shape `(2B, 2)`): Text and grounding, less those of the reference.
            inputs (`Mapping`): The batch.
        """
        chosen, rejected = ratios.chunk(2)
        weights = torch.tensor([self.args.text_weight, self.args.grounding_weight], device=ratios.device)
        margins = self.beta * weights * (chosen - rejected)  # (B, 2)
        total, named = margins.sum(1), inputs.get("perturbation", [""] * len(margins))
        noted = {"text": margins[:, 0], "grounding": margins[:, 1]}
        for kind in KINDS:
            of_kind = torch.tensor([name == kind for name in named], device=total.device)
            noted[f"kind/{kind}"] = torch.where(of_kind, total, torch.nan)
        self._metrics_of_step(
            **{f"rewards/margins/{name}": margin for name, margin in noted.items()},
            **{
                f"rewards/accuracies/{name}": torch.where(margin.isnan(), torch.nan, (margin > 0).float())
                for name, margin in noted.items()
            },
        )
        if self.model.training:
            iou = self._iou(likelihood.outputs, inputs)
            self._metrics_of_step(**{"grounding/miou": iou[:, 0].sum() / iou[:, 1].sum()})

    def _iou(self, outputs, inputs) -> torch.Tensor:
        """Teacher-forced IoU sums of the chosen responses, `(B, 2)`."""
        iou = teacher_forced_iou(
            outputs, inputs["evidence_spans"], inputs["evidence_role"], self._grounding_config.evidence_threshold
        )
        return iou.chunk(2)[0]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, and per row the IoU sum and number of the chosen response's evidence tokens; no second forward."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        iou = self._iou(outputs, inputs)
        if self._user_metrics is None:
            return loss.detach(), iou, iou[:, 1]
        predicted, true = teacher_forced_answers(outputs, inputs, len(iou), self._grounding_config.evidence_threshold)
        return loss.detach(), (iou, *predicted), true

    def _metrics_of_evaluation(self, prediction) -> dict[str, float]:
        measured = self._user_metrics is not None
        sums = (prediction.predictions[0] if measured else prediction.predictions).sum(0)
        metrics = {"grounding/miou": float(sums[0] / max(1.0, sums[1]))}
        if not measured:
            return metrics
        answers = read_answers(prediction.predictions[1:], prediction.label_ids, self.processing_class)
        return metrics | self._user_metrics(answers)

    def rows_to_generate(self, dataset, count: int) -> list[dict[str, Any]]:
        """The first different questions, with the spans of their chosen answers: rows differ by what is rejected."""
        rows: dict[Any, dict[str, Any]] = {}
        for index in range(len(dataset)):
            if len(rows) == count:
                break
            row = dataset[index]
            question, spans = last_text(row["prompt"]), row["question_spans"] or []
            video = row["video"].get("path") if isinstance(row["video"], Mapping) else row["video"]
            columns = {"video": row["video"], "question": question, "question_spans": spans}
            rows.setdefault((video, question, str(spans)), {**columns, "spans": row["chosen_spans"] or []})
        return list(rows.values())


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _undecoded(dataset):
    """The data set with videos as bytes and paths: nothing is decoded before the collator asks."""
    if isinstance(dataset, (dict, DatasetDict)):
        return type(dataset)({name: _undecoded(part) for name, part in dataset.items()})
    if isinstance(dataset, (Dataset, IterableDataset)) and isinstance((dataset.features or {}).get("video"), Video):
        return dataset.cast_column("video", Video(decode=False))
    return dataset


__all__ = ["FPOTrainer", "JointLikelihood", "joint_likelihood"]
