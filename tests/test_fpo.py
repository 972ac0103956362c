# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Factorized preference optimization: closed forms, TRL's loss types, references, normalisation."""

import inspect
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import trl.trainer.dpo_trainer as dpo_module
from datasets import Dataset
from tiny_runs import preference_dataset, sft_rows, tiny
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from d2vlm_hf.data.collators import PreferenceCollator
from d2vlm_hf.training.configs import DataArguments, ModelArguments
from d2vlm_hf.training.fpo_config import LOSS_TYPES, FPOConfig
from d2vlm_hf.training.fpo_trainer import NAMES, FPOTrainer, joint_likelihood
from d2vlm_hf.training.run import lora_config
from d2vlm_hf.training.run_fpo import run_fpo


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    rows = sft_rows(tmp_path_factory.mktemp("videos"), videos=2)
    return preference_dataset(rows).select(range(8))


def options(folder, **changed) -> FPOConfig:
    return FPOConfig(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "report_to": "none",
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **changed,
        },
    )


def make(folder, dataset, model=None, **changed) -> FPOTrainer:
    kwargs = {
        key: changed.pop(key)
        for key in ("ref_model", "peft_config", "eval_dataset", "compute_metrics")
        if key in changed
    }
    built, processor = tiny()
    return FPOTrainer(
        model=model or built,
        args=options(folder, **changed),
        train_dataset=dataset,
        processing_class=processor,
        **kwargs,
    )


def batch_of(trainer, dataset, count: int = 4):
    return trainer.data_collator([dataset[i] for i in range(count)])


def preference_part(trainer, batch) -> torch.Tensor:
    """The loss without its SFT terms."""
    trainer.args.sft_weight = trainer.args.grounding_loss_weight = trainer.args.consistency_loss_weight = 0.0
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch)


def test_equal_sides_give_exactly_log_2(tmp_path, dataset):
    trainer = make(tmp_path, dataset)
    rows = [
        {**dataset[i], "rejected": dataset[i]["chosen"], "rejected_spans": dataset[i]["chosen_spans"]} for i in range(4)
    ]
    assert preference_part(trainer, trainer.data_collator(rows)).item() == pytest.approx(math.log(2), abs=1e-6)


def test_text_part_and_grounding_part_add_up_to_the_margin(tmp_path, dataset):
    trainer = make(tmp_path, dataset)
    preference_part(trainer, batch_of(trainer, dataset))
    logged = {
        name: values[-1] for name, values in trainer._metrics["eval" if not trainer.model.training else "train"].items()
    }
    parts = logged["rewards/margins/text"] + logged["rewards/margins/grounding"]
    assert logged["rewards/margins"] == pytest.approx(parts, rel=1e-5)


def test_swapping_the_sides_changes_the_loss_by_beta_times_the_margin(tmp_path, dataset):
    trainer = make(tmp_path, dataset)
    row = dataset[0]
    swapped = {
        **row, "chosen": row["rejected"], "rejected": row["chosen"],
        "chosen_spans": row["rejected_spans"], "rejected_spans": row["chosen_spans"],
    }  # fmt: skip
    batch = trainer.data_collator([row])
    with torch.no_grad():
        likelihood = joint_likelihood(trainer.model, batch, 2.0)
    joint = likelihood.text + likelihood.grounding
    margin = 0.1 * (joint[0] - joint[1]).item()
    there = preference_part(trainer, batch).item()
    back = preference_part(trainer, trainer.data_collator([swapped])).item()
    assert back - there == pytest.approx(margin, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "formula"),
    [
        ("sigmoid", lambda c, r: -F.logsigmoid(0.1 * (c - r))),
        ("hinge", lambda c, r: torch.relu(1 - 0.1 * (c - r))),
        ("nca_pair", lambda c, r: -F.logsigmoid(0.1 * c) - 0.5 * F.logsigmoid(-0.1 * c) - 0.5 * F.logsigmoid(-0.1 * r)),
        ("apo_zero", lambda c, r: 1 - torch.sigmoid(0.1 * c) + torch.sigmoid(0.1 * r)),
    ],
)
def test_loss_types_see_the_weighted_joint_likelihood(tmp_path, dataset, loss_type, formula):
    trainer = make(tmp_path, dataset, loss_type=[loss_type], text_weight=0.5, grounding_weight=2.0)
    batch = batch_of(trainer, dataset)
    with torch.no_grad():
        likelihood = joint_likelihood(trainer.model, batch, 2.0)
    chosen, rejected = (0.5 * likelihood.text + 2.0 * likelihood.grounding).chunk(2)
    expected = formula(chosen, rejected).mean().item()
    assert preference_part(trainer, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "exo_pair"])
def test_every_loss_type_runs(tmp_path, dataset, loss_type):
    trainer = make(tmp_path, dataset, loss_type=[loss_type])
    assert preference_part(trainer, batch_of(trainer, dataset)).isfinite()


def test_trls_sft_loss_type_is_untouched_by_the_grounding(tmp_path, dataset):
    losses = []
    for weight in (0.0, 5.0):
        trainer = make(tmp_path, dataset, loss_type=["sft"], grounding_weight=weight, text_weight=0.3)
        losses.append(preference_part(trainer, batch_of(trainer, dataset)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_grounding_weight_0_is_plain_dpo_on_the_text(tmp_path, dataset):
    trainer = make(tmp_path, dataset, grounding_weight=0.0)
    batch = batch_of(trainer, dataset)
    with torch.no_grad():
        outputs = trainer.model(**{k: v for k, v in batch.items() if k not in NAMES})
    chosen, rejected = outputs.token_logps.sum(1).chunk(2)
    expected = -F.logsigmoid(0.1 * (chosen - rejected)).mean().item()
    assert preference_part(trainer, batch).item() == pytest.approx(expected, rel=1e-5)


def test_two_responses_at_once_are_as_two_calls(tmp_path, dataset):
    """Each response is filled with its own spans, the question's spans included."""
    trainer = make(tmp_path, dataset)
    for index in range(4):
        row = dataset[index]
        both = joint_likelihood(trainer.model, trainer.data_collator([row]), 2.0)
        for side, position in (("chosen", 0), ("rejected", 1)):
            alone = {
                **row, "chosen": row[side], "rejected": row[side],
                "chosen_spans": row[f"{side}_spans"], "rejected_spans": row[f"{side}_spans"],
            }  # fmt: skip
            single = joint_likelihood(trainer.model, trainer.data_collator([alone]), 2.0)
            torch.testing.assert_close(both.text[position], single.text[0], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(both.grounding[position], single.grounding[0], atol=1e-4, rtol=1e-5)


def test_training_logs_what_moves(tmp_path, dataset):
    trainer = make(tmp_path, dataset, max_steps=2, eval_dataset=dataset, learning_rate=1e-2)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[0]
    for name in (
        "loss", "lm_loss", "grounding_loss", "consistency_loss", "rewards/chosen", "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies", "rewards/margins/text", "rewards/margins/grounding", "rewards/accuracies/text",
        "rewards/accuracies/grounding", "grounding/miou",
    ):  # fmt: skip
        assert math.isfinite(log[name]), name
    kinds = {row["perturbation"] for row in dataset} & {name.split("/")[-1] for name in log}
    assert kinds == {name.split("/")[-1] for name in log if "/kind/" in name}
    assert all({f"rewards/margins/kind/{kind}", f"rewards/accuracies/kind/{kind}"} <= set(log) for kind in kinds)
    assert kinds
    assert not {"entropy", "logits/chosen", "mean_token_accuracy"} & set(log)  # not measured, so not logged
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert {"evidence_head.1.weight", "frame_head.1.weight", "model.connector.query_tokens"} <= moved
    assert not any(name.startswith("model.vision_tower") for name in moved)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_grounding/miou"] <= 1
    assert math.isfinite(metrics["eval_rewards/margins/grounding"])
    assert trainer.evaluate(dataset)["eval_loss"] > 0  # a set given later, after training


def test_no_second_model_without_a_reference(tmp_path, dataset, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise AssertionError("a second model was loaded")

    monkeypatch.setattr(dpo_module, "create_model_from_path", refuse)
    with caplog.at_level(logging.WARNING, logger="d2vlm_hf"):
        trainer = make(tmp_path, dataset)
    assert trainer.ref_model is None
    assert "without a reference model (reference_free=True)" in caplog.text
    trainer.train()


@pytest.mark.parametrize("kind", ["model", "precomputed", "adapter"])
def test_with_a_reference_the_first_margin_is_zero(tmp_path, dataset, kind):
    extra = {"reference_free": False}
    if kind == "model":
        extra["ref_model"] = tiny()[0]
    elif kind == "precomputed":
        extra["precompute_ref_log_probs"] = True
    else:
        extra["peft_config"] = lora_config(
            tiny()[0], ModelArguments(model_name_or_path="x", lora_r=2, lora_dropout=0.0)
        )
    trainer = make(tmp_path, dataset, max_steps=2, learning_rate=1e-2, **extra)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert first["rewards/margins/grounding"] == pytest.approx(0.0, abs=1e-4)  # the parts are those of the margin
    parts = second["rewards/margins/text"] + second["rewards/margins/grounding"]
    assert second["rewards/margins"] == pytest.approx(parts, abs=1e-4)
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert abs(second["rewards/chosen"]) > 1e-4


def test_the_cut_into_batches_does_not_matter(tmp_path, dataset):
    """1 x 8 = 2 x 4 accumulated = 8 x 1, though pairs differ in length and in their number of events."""
    runs = []
    for size in (8, 2, 1):
        trainer = make(
            tmp_path / str(size), dataset, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        for (name, a), b in zip(runs[0].model.named_parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4, msg=name)
        assert other.state.log_history[0]["loss"] == pytest.approx(runs[0].state.log_history[0]["loss"], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_step(tmp_path, dataset):
    runs = []
    for checkpointing in (False, True):
        trainer = make(tmp_path / str(checkpointing), dataset, optim="sgd", gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append(trainer)
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4, msg=name)


def test_bfloat16_trains(tmp_path, dataset):
    trainer = make(tmp_path, dataset, bf16=True)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ld_alpha": 0.5}, r"ld_alpha=0.5 cannot be used with FPO: it shortens the text part"),
        ({"use_weighting": True}, r"use_weighting=True cannot be used with FPO"),
        ({"max_length": 512}, r"max_length=512 cannot be used with FPO: a truncated video has no times"),
        ({"remove_unused_columns": True}, r"remove_unused_columns=True cannot be used with FPO"),
        ({"loss_type": ["magic"]}, r"loss_type \['magic'\] is not supported"),
        ({"sync_ref_model": True}, r"sync_ref_model=True needs a reference"),
        ({"text_weight": 0, "grounding_weight": 0}, r"text_weight and grounding_weight are both 0"),
    ],
)
def test_options_that_cannot_work(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **changed)


def test_wrong_parts_are_refused(tmp_path, dataset):
    model, processor = tiny()
    with pytest.raises(ValueError, match="processing_class is missing"):
        FPOTrainer(model=model, args=options(tmp_path), train_dataset=dataset)
    with pytest.raises(ValueError, match="a ref_model was given but reference_free=True"):
        FPOTrainer(
            model=model, ref_model=tiny()[0], args=options(tmp_path), train_dataset=dataset, processing_class=processor
        )
    with pytest.raises(ValueError, match="dataset is missing: FPO trains on stored preference rows"):
        run_fpo(ModelArguments(model_name_or_path="x"), DataArguments(shapes={}), options(tmp_path))


def test_a_batch_without_video_is_refused():
    def blind(**inputs):
        return SimpleNamespace(evidence_logits=None)

    with pytest.raises(ValueError, match="no video reached the model"):
        joint_likelihood(blind, {}, 2.0)


def test_trl_hooks_are_where_we_expect_them():
    """Contract: trl changed one of these? See training/fpo_trainer.py, which overrides or calls each of them."""
    expected = {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
        "_set_signature_columns_if_needed": ["self"],
        "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
        "log": ["self", "logs", "start_time"],
        "evaluate": ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"],
        "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(DPOTrainer, name)).parameters) == parameters, name
    source = inspect.getsource(DPOTrainer._compute_loss)
    for used in ("self.precompute_ref_logps", 'inputs["ref_chosen_logps"]', "outputs.log_probs[:, -seq_len:]",
                 "labels=labels, fused_lm_head=True", "self._metrics[mode]", "completion_mask[..., 1:]",
                 "self.accelerator.gather(chosen_rewards)", "per_sequence_loss.mean() * loss_weight"):  # fmt: skip
        assert used in source, used
    fields = {"log_probs", "entropy", "mean_logits", "is_top1", "label_mask"}
    assert fields <= set(FusedCausalLMOutput.__dataclass_fields__)


def test_prompt_columns_leave_room_for_the_grounding(dataset):
    """The grounding stands in column 0 of log_probs, which predicts a prompt token in every row."""
    _, processor = tiny()
    batch = PreferenceCollator(processor)([dataset[i] for i in range(4)])
    assert (batch["labels"][:, :2] == -100).all()
