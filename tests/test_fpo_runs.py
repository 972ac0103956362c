# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Whole runs of factorized preference optimization: two processes, resuming, evaluation, skipped rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Video
from test_fpo import make
from tiny_runs import preference_dataset, sft_rows, tiny

from d2vlm_hf.data.schema import features
from d2vlm_hf.training.teacher_forced import teacher_forced_answers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Eight pairs; the last four have no event at all, so that in order one of two ranks sees none."""
    rows = list(preference_dataset(sft_rows(tmp_path_factory.mktemp("videos"), videos=2)).select(range(8)))
    without = {"chosen": [{"role": "assistant", "content": "Nothing."}], "chosen_spans": [], "spans": []}
    without |= {"rejected": [{"role": "assistant", "content": "Nothing at all, nothing at all."}]}
    without |= {"rejected_spans": [], "answer": "Nothing.", "captions": [], "factor": "text", "perturbation": "repeat"}
    rows = [{**row, **without} if place >= 4 else row for place, row in enumerate(rows)]
    dataset = Dataset.from_list(rows, features=features(preference=True))
    return dataset.cast_column("video", Video(decode=False))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def two_processes(folder: Path, dataset: Dataset, steps: str) -> None:
    """Run a script on two processes; it has `folder`, `dataset`, and `rank`."""
    dataset.save_to_disk(str(folder / "rows"))
    script = folder / "run.py"
    script.write_text(
        f"import json, os, sys, torch\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom datasets import Video, load_from_disk\n"
        "from test_fpo import make\nfrom test_fpo_runs import weights\n"
        f"folder, rank = Path({str(folder)!r}), int(os.environ['RANK'])\n"
        "dataset = load_from_disk(str(folder / 'rows')).cast_column('video', Video(decode=False))\n" + steps
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


ONE_STEP = {"learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0, "data_seed": 0}
TWO_RANKS = f"""
trainer = make(folder / "out", dataset, eval_dataset=dataset.select(range(5)), per_device_train_batch_size=4,
               per_device_eval_batch_size=2, eval_generate_rows=3, eval_max_new_tokens=4, ddp_backend="gloo",
               **{ONE_STEP})
trainer.train_dataset.ordered = True
trainer.train()
if rank == 0:
    torch.save(weights(trainer.accelerator.unwrap_model(trainer.model)), folder / "weights.pt")
metrics = trainer.evaluate()
if rank == 0:
    (folder / "metrics.json").write_text(json.dumps([trainer.state.log_history[0], metrics]))

# the only row of one rank cannot be read: it is left out, and the other rank's step is that of its own row
rows = [dict(dataset[i]) for i in (0, 0)]
rows[0]["video"] = {{"path": "missing.mp4", "bytes": None}}
from datasets import Dataset
skipping = make(folder / "skip", Dataset.from_list(rows, features=dataset.features), on_error="skip",
                per_device_train_batch_size=1, ddp_backend="gloo", **{ONE_STEP})
skipping.train()
if rank == 0:
    torch.save(weights(skipping.accelerator.unwrap_model(skipping.model)), folder / "skipped.pt")
"""


def test_two_processes_take_the_same_step(tmp_path, dataset):
    """2 x 4 = 1 x 8, though one rank sees no event; the logs, the evaluation and skipped rows agree too."""
    two_processes(tmp_path, dataset, TWO_RANKS)
    single = make(tmp_path / "one", dataset, per_device_train_batch_size=8, **ONE_STEP)
    single.train()
    both = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, one in weights(single.model).items():
        torch.testing.assert_close(one, both[name], atol=5e-6, rtol=1e-4, msg=name)
    log, metrics = json.loads((tmp_path / "metrics.json").read_text())
    alone = single.state.log_history[0]
    for name in ("loss", "lm_loss", "grounding_loss", "consistency_loss", "rewards/margins", "rewards/margins/text",
                 "rewards/accuracies", "rewards/margins/kind/repeat", "rewards/accuracies/kind/repeat"):  # fmt: skip
        assert log[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert 0 <= metrics["eval_generated/miou"] <= 1
    assert 0 <= metrics["eval_grounding/miou"] <= 1
    rest = make(tmp_path / "rest", dataset.select([0]), per_device_train_batch_size=1, **ONE_STEP)
    rest.train()
    skipped = torch.load(tmp_path / "skipped.pt", weights_only=True)
    for name, one in weights(rest.model).items():
        torch.testing.assert_close(one, skipped[name], atol=5e-6, rtol=1e-4, msg=name)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, dataset):
    """With a last step that has fewer pairs than the others: 8 pairs, 3 a step."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "seed": 1}
    whole = make(tmp_path / "whole", dataset, **settings)
    whole.train()
    make(tmp_path / "half", dataset, save_strategy="steps", save_steps=2, **settings).train()
    halfway = tmp_path / "half" / "checkpoint-2"
    assert {"processor_config.json", "modeling_d2vlm.py", "model.safetensors"} <= {p.name for p in halfway.iterdir()}
    resumed = make(tmp_path / "again", dataset, **settings)
    resumed.train(resume_from_checkpoint=str(halfway))
    for name, one in weights(whole.model).items():
        torch.testing.assert_close(one, weights(resumed.model)[name], atol=1e-6, rtol=1e-5, msg=name)


def test_evaluation_generates_and_hands_out_spans_and_texts(tmp_path, dataset):
    """`compute_metrics` gets what the one forward of each batch decodes, in seconds and words."""
    seen, calls = [], []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": float(len(prediction.predictions))}

    trainer = make(
        tmp_path, dataset, eval_dataset=dataset, compute_metrics=compute_metrics, per_device_eval_batch_size=3,
        eval_generate_rows=2, eval_generate_every=2, eval_max_new_tokens=4,
    )  # fmt: skip
    trainer.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    generate = trainer.generate_rows
    trainer.generate_rows = lambda rows: (calls.clear(), generate(rows))[1]  # its own forwards do not count
    metrics = trainer.evaluate()
    calls.clear()
    assert metrics["eval_rows"] == 8
    assert 0 <= metrics["eval_generated/miou"] <= 1
    assert 0 <= metrics["eval_grounding/miou"] <= 1
    assert "eval_generated/miou" not in trainer.evaluate()  # every second evaluation
    assert len(calls) == 3  # one forward a batch
    (first, _), predicted = seen, seen[0].predictions
    true_spans = [[pytest.approx(span) for span in row["chosen_spans"]] for row in dataset]
    assert [truth["spans"] for truth in first.label_ids] == true_spans
    texts = [row["chosen"][0]["content"] for row in dataset]
    squeezed = ["".join(truth["answer"].split()) for truth in first.label_ids]
    assert squeezed == ["".join(text.split()) for text in texts]
    for row, answer in zip(dataset, predicted, strict=True):
        assert len(answer["evidence"]) == len(answer["spans"]) == len(row["chosen_spans"])
        assert all(0 <= start < end <= row["duration"] + 1 for start, end in answer["evidence"] + answer["spans"])
        assert isinstance(answer["answer"], str)
    rows = trainer.rows_to_generate(dataset, 8)
    assert len(rows) == len({(row["video"]["path"], row["question"]) for row in rows}) < 8  # each question once
    batch = trainer.data_collator([dataset[0]])
    del batch["frame_times"]
    with pytest.raises(ValueError, match="the batch has no frame_times, so spans cannot be told to compute_metrics"):
        teacher_forced_answers(None, batch, 1, 0.6)


def test_a_named_evaluation_set_is_generated_for_too(tmp_path, dataset):
    trainer = make(
        tmp_path, dataset, eval_dataset={"a": dataset.select([0])}, eval_generate_rows=1, eval_max_new_tokens=2
    )
    assert "eval_a_generated/miou" in trainer.evaluate()


def test_adapters_are_evaluated_in_place(tmp_path, dataset):
    from d2vlm_hf.training.configs import ModelArguments
    from d2vlm_hf.training.run import lora_config

    config = lora_config(tiny()[0], ModelArguments(model_name_or_path="x", lora_r=2))
    trainer = make(tmp_path, dataset, peft_config=config, eval_dataset=dataset.select([0]), eval_generate_rows=1,
                   eval_max_new_tokens=2)  # fmt: skip
    assert 0 <= trainer.evaluate()["eval_generated/miou"] <= 1
