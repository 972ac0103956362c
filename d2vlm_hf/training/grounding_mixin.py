# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the SFT and the FPO trainer share: global loss counts, two learning rates, split logs, grounding in evaluation,
and the card of the run."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import SequentialSampler

from ..hub.card_data import ModelCardInfo
from ..hub.cards import render_model_card, write_eval_results
from ..hub.checkpoint_folder import known_licence
from ..hub.measured import results_of_log
from ..hub.pictures import draw_example
from ..hub.records import CurveLog, RunRecord, collect_run_record, plot_curves, write_run_record
from ..model.evidence_d2vlm import ROLE_QUESTION, decode_spans
from ..model.pipeline_d2vlm import VideoGroundingPipeline, complete_checkpoint
from ..model.spans_d2vlm import set_f1, temporal_iou


LOSS_PICTURE, TIMELINE_PICTURE = "loss_curves.png", "timeline.png"
EVALUATION_ROWS = "evaluation rows of the run"
"""What the card calls what was measured while training."""
CURVES = ("loss", "eval_loss", "lm_loss", "grounding_loss", "consistency_loss")
"""Logged values that the card's picture shows."""


def frame_iou(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """IoU of inclusive frame spans, element by element: `(..., 2)`, `(..., 2)` -> `(...)`."""
    overlap = torch.minimum(predicted[..., 1], truth[..., 1]) - torch.maximum(predicted[..., 0], truth[..., 0]) + 1
    hull = torch.maximum(predicted[..., 1], truth[..., 1]) - torch.minimum(predicted[..., 0], truth[..., 0]) + 1
    lengths = (predicted[..., 1] - predicted[..., 0] + 1) + (truth[..., 1] - truth[..., 0] + 1)
    overlap = overlap.clamp(min=0)
    return overlap / torch.where(overlap > 0, lengths - overlap, hull)


def teacher_forced_iou(outputs, evidence_spans: torch.Tensor, evidence_role: torch.Tensor, threshold: float):
    """Grounding with the true tokens given: each `<evi>` decodes its own span, no generation and no second forward.

    Args:
        outputs (`D2VLMOutput`): Of a forward with `evidence_spans`.
        evidence_spans, evidence_role: As passed to the model.
        threshold (`float`): `config.evidence_threshold`.

    Returns:
        `torch.Tensor` of shape `(rows, 2)`: sum of frame IoUs over the response's `<evi>` tokens, and their number.
    """
    rows = evidence_role.shape[0]
    if outputs.evidence_logits is None or evidence_role.shape[1] == 0:
        return torch.zeros(rows, 2, device=evidence_role.device)
    spans, _ = decode_spans(outputs.evidence_logits, outputs.frame_mask[:, None], threshold)
    response = evidence_role > ROLE_QUESTION
    iou = torch.where(response, frame_iou(spans, evidence_spans), 0.0)
    return torch.stack([iou.sum(1), response.sum(1).float()], dim=1)


class GroundingTrainerMixin:
    """Mixed into a `transformers.Trainer`; `args` has the fields of `GroundingArguments`."""

    _name = "SFT"
    _num_evidence_samples = None
    _started: float | None = None  # time at which step 0 began; None for a run that goes on with an earlier one

    # ---- losses over the global accumulated batch -------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Also counts the samples with events, over all accumulation steps and processes."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self._count_evidence_samples(batch) for batch in batches]
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        self._num_evidence_samples = total.clamp(min=1)
        if num_items is not None:  # 0 where all rows of the batch were skipped
            num_items = torch.as_tensor(num_items).clamp(min=1)
        return batches, num_items

    @staticmethod
    def _count_evidence_samples(batch: dict[str, Any]) -> torch.Tensor:
        return (batch["evidence_role"] > ROLE_QUESTION).any(1).sum()

    # ---- logs -------------------------------------------------------------------------------------------------------

    def note(self, **values: torch.Tensor | float | None) -> None:
        """Remember values of this step; `log` averages them."""
        store = self.__dict__.setdefault("_noted", defaultdict(list))
        for name, value in values.items():
            if value is not None:
                store[name].append(value.detach().float().mean() if isinstance(value, torch.Tensor) else value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was noted since the last log."""
        store = self.__dict__.setdefault("_noted", defaultdict(list))
        if "loss" in logs:
            logs |= {name: float(torch.tensor([float(v) for v in values]).mean()) for name, values in store.items()}
            store.clear()
        super().log(logs, start_time)

    # ---- data and optimizer -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if getattr(dataset, "ordered", False):  # a curriculum says itself what comes when
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Two learning rates where `full_learning_rate` is set: adapters at `learning_rate`, the rest at the other."""
        module = self.model if model is None else model
        if self.optimizer is None and self.args.full_learning_rate is not None:
            decayed = set(self.get_decay_parameter_names(module))
            groups = defaultdict(list)
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    groups["lora_" in name, name in decayed].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "lr": self.args.learning_rate if adapter else self.args.full_learning_rate,
                    }
                    for (adapter, decays), parameters in groups.items()
                ],
                **options,
            )
        return super().create_optimizer(model)

    # ---- evaluation and saving --------------------------------------------------------------------------------------

    def rows_to_generate(self, dataset, count: int) -> list[dict[str, Any]]:
        """The rows that `eval_generated/*` is measured on: the first ones."""
        return [dataset[index] for index in range(min(count, len(dataset)))]

    def generate_rows(self, rows: list[dict[str, Any]], batch_size: int = 8) -> dict[str, float]:
        """Generate answers for some rows, shared by the processes; compare their evidence with the truth in seconds."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        pipe = VideoGroundingPipeline(model=base.eval(), processor=self.processing_class)
        own = rows[self.args.process_index :: self.args.world_size]
        inputs = [{name: row[name] for name in ("video", "question", "question_spans")} for row in own]
        options = {"max_new_tokens": self.args.eval_max_new_tokens, "fps": self.args.fps}
        results = pipe(inputs, batch_size=batch_size, **options) if inputs else []
        model.train(was_training)
        predicted = [[[e["start"], e["end"]] for e in result["evidence"]] for result in results]
        pairs = gather_object([(found, row["spans"]) for found, row in zip(predicted, own, strict=True)])
        f1 = set_f1([found for found, _ in pairs], [truth for _, truth in pairs])
        in_order = [_iou_in_order(found, truth) for found, truth in pairs if truth]
        return {
            "generated/f1": sum(f1.values()) / len(f1),
            "generated/miou": sum(in_order) / max(1, len(in_order)),
        }

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Adds `eval_generated/*` over `eval_generate_rows` rows of the evaluation set, every so many evaluations."""
        done = sum(f"{metric_key_prefix}_loss" in log for log in self.state.log_history)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        due = self.args.eval_generate_rows and done % self.args.eval_generate_every == 0
        if due and not isinstance(dataset, dict):
            rows = self.rows_to_generate(dataset, self.args.eval_generate_rows)
            generated = {f"{metric_key_prefix}_{k}": v for k, v in self.generate_rows(rows).items()}
            self.log(generated)
            metrics |= generated
        return metrics

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """A checkpoint folder is complete: weights, processor, code; it loads with and without the package."""
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "generate") and not hasattr(model, "peft_config"):
            complete_checkpoint(output_dir or self.args.output_dir, self.processing_class)
        self._write_card(Path(output_dir or self.args.output_dir))

    # ---- the card ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`; notes when the run began."""
        self._started = None if resume_from_checkpoint else time.time()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def run_record(self) -> RunRecord:
        """What is known of this run: command, commit, configuration, data, seed, device, duration, batch, versions."""
        seconds = None
        if self._started is not None:
            ended = [log["train_runtime"] for log in self.state.log_history if "train_runtime" in log]
            seconds = ended[-1] if ended else time.time() - self._started
        return collect_run_record(
            self._name,
            config=self.args.to_dict(),
            device=self.args.device.type,
            seed=self.args.seed,
            wall_time_s=seconds,
            effective_batch=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            dataset_fingerprint=getattr(self.train_dataset, "_fingerprint", None),
            reference_free=getattr(self.args, "reference_free", None),
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **facts: Any,
    ) -> None:
        """Write the card of this run to `README.md` of the output folder (also called by `push_to_hub`).

        Args:
            model_name (`str`, *optional*): Title of the card.
            dataset_name (`str`, *optional*): Hub id of the training data.
            tags (`str` or `list[str]`, *optional*): Tags beside those that every card has.
            **facts: Further fields of `ModelCardInfo`, such as `license`. The licence defaults to that of the card
                which is there already, or of the folder that the model was loaded from.
        """
        if dataset_name is not None:
            facts.setdefault("datasets", [dataset_name])
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or ())
            self._draw_timeline(Path(self.args.output_dir))
            self._write_card(Path(self.args.output_dir), title=model_name, tags=tags, **facts)

    def _draw_timeline(self, folder: Path) -> None:
        """Draw how the model answers one evaluation row, if it generates answers in evaluation at all."""
        rows = self.eval_dataset
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # one process alone cannot generate
        if not self.args.eval_generate_rows or rows is None or isinstance(rows, dict) or sharded:
            return
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        grounder = VideoGroundingPipeline(model=base.eval(), processor=self.processing_class)
        rows = self.rows_to_generate(rows, self.args.eval_generate_rows)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"max_new_tokens": self.args.eval_max_new_tokens, "fps": self.args.fps}
        draw_example(grounder, rows, folder / TIMELINE_PICTURE, **options)
        model.train(was_training)

    def _write_card(self, folder: Path, **facts: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        source = getattr(model.config, "_name_or_path", None)
        folder.mkdir(parents=True, exist_ok=True)
        logs = self.state.log_history
        curves = [
            CurveLog(name, [log["step"] for log in logs if name in log], [log[name] for log in logs if name in log])
            for name in CURVES
        ]
        facts = {
            "repo_id": getattr(self, "hub_model_id", None) or self.args.hub_model_id or Path(self.args.output_dir).name,
            "license": None,
            **(known_licence(folder) or (known_licence(source) if source else {})),
            "base_model": source or None,
            "adapter": (folder / "adapter_config.json").is_file(),
            "facts": _model_facts(model, self.processing_class),
            "results": results_of_log(logs, EVALUATION_ROWS),
            "runs": [self.run_record()],
            "loss_picture": plot_curves(curves, folder / LOSS_PICTURE) and LOSS_PICTURE,
            "timeline_picture": TIMELINE_PICTURE if (folder / TIMELINE_PICTURE).is_file() else None,
            **facts,
        }
        render_model_card(ModelCardInfo(**facts)).save(folder / "README.md")
        write_eval_results(folder, facts["results"])
        for record in facts["runs"][-1:]:
            write_run_record(record, folder)


def _model_facts(model, processor) -> dict[str, str]:
    """Size, parts and sampling, as a card lists them."""
    config = model.config
    return {
        "Parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M",
        "Language model": f"{config.text_config.model_type}, {config.text_config.num_hidden_layers} layers",
        "Vision tower": config.vision_config.model_type,
        "Connector": config.connector_type,
        "Sampling": f"{processor.video_processor.fps:g} fps",
    }


def _iou_in_order(predicted: list, truth: list) -> float:
    """IoU of the k-th predicted with the k-th true span in seconds, mean over the true ones; a missing one counts 0."""
    pairs = min(len(predicted), len(truth))
    return float(temporal_iou(predicted[:pairs], truth[:pairs]).trace()) / len(truth) if pairs else 0.0


__all__ = ["LOSS_PICTURE", "GroundingTrainerMixin", "frame_iou", "teacher_forced_iou"]
