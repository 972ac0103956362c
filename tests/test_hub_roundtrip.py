# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Trained, pushed and loaded again by a stranger: model, adapter, data set; and the card that a training run writes."""

import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from datasets import Dataset, Video
from hub_server import LocalHub, run_script
from huggingface_hub import DatasetCard, ModelCard, ModelCardData, parse_eval_result_entries
from peft import get_peft_model
from tiny_processor import assert_same
from tiny_runs import preference_dataset, sft_rows, tiny
from transformers import AutoModelForImageTextToText

from d2vlm_hf.hub.card_data import DatasetCardInfo, Result
from d2vlm_hf.hub.cards import render_dataset_card
from d2vlm_hf.hub.checkpoint_folder import check_folder, known_licence
from d2vlm_hf.hub.pictures import draw_example
from d2vlm_hf.hub.publish import push
from d2vlm_hf.hub.records import collect_run_record, read_run_record
from d2vlm_hf.model.pipeline_d2vlm import VideoGroundingPipeline, save_checkpoint
from d2vlm_hf.training.configs import D2VLMSFTConfig, ModelArguments
from d2vlm_hf.training.fpo_config import FPOConfig
from d2vlm_hf.training.fpo_trainer import FPOTrainer
from d2vlm_hf.training.run import lora_config
from d2vlm_hf.training.sft_trainer import D2VLMSFTTrainer


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own call

MODEL, ADAPTER, DATA = "me/round-trip", "me/round-trip-lora", "me/round-trip-preferences"
QUESTION = "When does the red circle move?"
TRAINING = {
    "use_cpu": True, "report_to": "none", "max_steps": 2, "per_device_train_batch_size": 2,
    "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": True, "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return sft_rows(tmp_path_factory.mktemp("videos"), videos=2)


def sft_trainer(folder: Path, rows: list[dict], model, processor, **changed) -> D2VLMSFTTrainer:
    args = D2VLMSFTConfig(output_dir=str(folder), **{**TRAINING, **changed})
    return D2VLMSFTTrainer(model=model, args=args, processing_class=processor, train_dataset=rows)


def call_options(processor) -> dict:
    """A call in which the model, which has hardly learned anything, is drawn to `<evi>` and `</evi>`."""
    bias = [[[processor.evidence_token_id], 50.0], [[processor.evidence_end_token_id], 40.0]]
    return {
        "question": QUESTION,
        "generate_kwargs": {"sequence_bias": bias, "no_repeat_ngram_size": 2},
        "max_new_tokens": 8,
        "return_curves": True,
    }


def push_model(folder: Path, rows: list[dict], video: str) -> dict:
    """Push the model before training, after two steps, and the latter in shards; return what strangers must find."""
    model, processor = tiny()
    with torch.no_grad():  # a model whose frames differ, and whose moments are therefore not the whole video
        model.frame_head[-1].weight.mul_(30)
        model.config.evidence_threshold = 0.999
    options = call_options(processor)
    trainer = sft_trainer(folder, rows, model, processor, hub_model_id=MODEL)
    trainer.save_model()
    trainer.create_model_card(license="apache-2.0", dataset_name=DATA)
    (folder / "LICENSE").write_text("Apache License\n")
    first = push(folder, MODEL, commit_message="Before training")
    pipe = VideoGroundingPipeline(model=model.eval(), processor=processor, device="cpu")
    untrained = pipe(video, **options)
    trainer.train()
    trainer.save_model()
    assert check_folder(folder) == []
    report = push(folder, MODEL)
    assert report.changed
    assert report.warnings == []
    answer = pipe.__class__(model=trainer.model.eval(), processor=processor, device="cpu")(video, **options)
    assert answer["references"]
    assert min(moment["end"] - moment["start"] for moment in answer["evidence"]) < answer["duration"] / 2
    assert answer != untrained
    shards = folder.with_name("shards")
    save_checkpoint(shards, trainer.model, processor, max_shard_size="60KB")
    for name in ("README.md", "LICENSE"):
        (shards / name).write_bytes((folder / name).read_bytes())
    sharded = push(shards, MODEL, revision="sharded")
    assert sum(name.endswith(".safetensors") for name, _ in sharded.files) > 2
    return {"video": video, "options": options, "first": first.commit, "untrained": untrained, "answer": answer}


def push_adapter(folder: Path, rows: list[dict], processor, video: str, options: dict) -> dict:
    """Train an adapter of the model on the Hub and push it; return what the two say together."""
    arguments = ModelArguments(model_name_or_path=MODEL, use_lora=True, lora_r=2, lora_alpha=4, lora_dropout=0.0)
    base = AutoModelForImageTextToText.from_pretrained(MODEL)
    model = get_peft_model(base, lora_config(base, arguments))
    trainer = sft_trainer(folder, rows, model, processor, max_steps=1, hub_model_id=ADAPTER)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="apache-2.0")
    push(folder, ADAPTER)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", [MODEL])
    assert f'PeftModel.from_pretrained(grounder.model, "{ADAPTER}")' in card.text
    merged = model.eval().merge_and_unload()
    return VideoGroundingPipeline(model=merged, processor=processor, device="cpu")(video, **options)


def push_data(rows: list[dict], hub: LocalHub) -> Dataset:
    """Push preference rows with their videos, then the card that is made from them."""
    data = preference_dataset(rows, per_row=1).cast_column("video", Video(decode=False))
    data.cast_column("video", Video()).push_to_hub(DATA)
    counted = DatasetCardInfo.from_rows(DATA, {"train": data.remove_columns("video")}, license="apache-2.0")
    written = DatasetCard.load(DATA).data.to_dict()
    render_dataset_card(counted, metadata=written).push_to_hub(DATA, repo_type="dataset")
    assert "dataset_info" in hub.files(DATA, "dataset")["README.md"].decode()
    return data


STRANGER = r"""
import hashlib, json, os, re, sys

from datasets import Video, load_dataset
from peft import PeftModel
from transformers import (
    AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, pipeline
)

call = json.loads(os.environ["CALL"])
model_id, adapter_id, data_id = call["names"]
video, options = call["video"], call["options"]
trust = {"trust_remote_code": True}

def ask(model=model_id, **loading):
    return pipeline("video-grounding", model=model, device="cpu", **trust, **loading)(video, **options)

processor = AutoProcessor.from_pretrained(model_id, **trust)
tokenizer = AutoTokenizer.from_pretrained(model_id, **trust)
result = {"types": [type(processor).__name__], "tokens": tokenizer(options["question"])["input_ids"]}
grounder = pipeline("video-grounding", model=model_id, device="cpu", **trust)
result["answers"] = {"main": grounder(video, **options)}
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    grounder.model = auto_class.from_pretrained(model_id, **trust).eval()
    result["types"].append(type(grounder.model).__name__)
    result["answers"][auto_class.__name__] = grounder(video, **options)
result["answers"]["sharded"] = ask(revision="sharded")
result["answers"]["low memory"] = ask(model_kwargs={"device_map": "cpu", "dtype": "float32"})
result["untrained"] = ask(revision=call["first"])
grounder.model = PeftModel.from_pretrained(grounder.model, adapter_id).merge_and_unload()
result["adapter"] = grounder(video, **options)

def plain(row):
    clip = row.pop("video")
    return {**row, "video": hashlib.sha256(clip["bytes"]).hexdigest()}

loaded, stream = load_dataset(data_id, split="train"), load_dataset(data_id, split="train", streaming=True)
result["features"] = [str(loaded.features), str(stream.features)]
result["is_video"] = isinstance(loaded.features["video"], Video) and isinstance(stream.features["video"], Video)
result["rows"] = [[plain(row) for row in part.cast_column("video", Video(decode=False))] for part in (loaded, stream)]
for card in call["cards"]:  # what a card says is run as it stands
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
result["modules"] = [name for name, module in sys.modules.items() if name.startswith("d2vlm_hf") and module]
print("RESULT" + json.dumps(result))
"""

OFFLINE = """
import json, os

from datasets import load_dataset
from transformers import pipeline

call = json.loads(os.environ["CALL"])
grounder = pipeline("video-grounding", model=call["names"][0], device="cpu", trust_remote_code=True)
rows = load_dataset(call["names"][2], split="train").num_rows
result = {"answer": grounder(call["video"], **call["options"]), "rows": rows}
print("RESULT" + json.dumps(result))
"""

OWNER = """
import json, os

import d2vlm_hf
from transformers import pipeline

call = json.loads(os.environ["CALL"])
grounder = pipeline("video-grounding", model=call["names"][0], device="cpu")
result = {"answer": grounder(call["video"], **call["options"]), "module": type(grounder.model).__module__}
print("RESULT" + json.dumps(result))
"""


def result_of(script: str, hub: LocalHub, call: dict, **options) -> dict:
    run = run_script(script, hub, env={"CALL": json.dumps(call), **options.pop("env", {})}, **options)
    return json.loads(run.stdout.split("RESULT")[1])


def test_round_trip(hub_of_all: LocalHub, tmp_path: Path, rows: list[dict]) -> None:
    """Train two steps, push model, adapter and data; load all of it without the package, offline, and with it."""
    hub, video = hub_of_all, rows[0]["video"]
    call = push_model(tmp_path / "model", rows, video) | {"names": [MODEL, ADAPTER, DATA]}
    processor = tiny()[1]
    adapted = push_adapter(tmp_path / "adapter", rows, processor, video, call["options"])
    data = push_data(rows, hub)
    assert adapted != call["answer"]

    blocked = ["d2vlm_hf", "torchvision", "trl"]
    shutil.copy(video, tmp_path / "video.mp4")
    cards = {"cards": [(tmp_path / name / "README.md").read_text() for name in ("model", "adapter")]}
    stranger = result_of(STRANGER, hub, call | cards, block=blocked, cwd=tmp_path)
    assert stranger["types"] == ["D2VLMProcessor", *["D2VLMForConditionalGeneration"] * 3]
    assert stranger["tokens"] == processor.tokenizer(QUESTION)["input_ids"]
    answers = stranger["answers"]
    assert len(answers) == 6
    for answer in answers.values():
        assert_same(answer, call["answer"])
    assert_same(stranger["untrained"], call["untrained"])
    assert_same(stranger["adapter"], adapted)
    assert stranger["is_video"]
    assert stranger["features"] == [str(data.cast_column("video", Video()).features)] * 2
    expected = [{**row, "video": hashlib.sha256(Path(row["video"]["path"]).read_bytes()).hexdigest()} for row in data]
    assert stranger["rows"] == [expected, expected]
    assert stranger["modules"] == []

    with hub.down():
        offline = result_of(OFFLINE, hub, call, block=blocked, env={"HF_HUB_OFFLINE": "1"})
    assert offline == {"answer": answers["main"], "rows": len(data)}
    owner = result_of(OWNER, hub, call)
    assert owner == {"answer": answers["main"], "module": "d2vlm_hf.model.modeling_d2vlm"}


def test_the_push_methods_of_transformers(hub_of_all: LocalHub, tmp_path: Path, rows: list[dict]) -> None:
    """`push_to_hub` of model and processor, and of the pipeline, which pushes all that `save_checkpoint` saves."""
    model, processor = tiny()
    model.push_to_hub("me/parts")
    processor.push_to_hub("me/parts")
    pipe = VideoGroundingPipeline(model=model.eval(), processor=processor, device="cpu")
    pipe.push_to_hub("me/whole", private=True)
    save_checkpoint(tmp_path / "whole", model, processor)
    saved = {path.relative_to(tmp_path / "whole").as_posix() for path in (tmp_path / "whole").rglob("*.*")}
    assert set(hub_of_all.files("me/whole")) == saved | {".gitattributes", "README.md"}
    assert hub_of_all.repo("me/whole").private
    expected = pipe(rows[0]["video"], **call_options(processor))
    for repo_id in ("me/parts", "me/whole"):
        loaded = transformers.pipeline("video-grounding", model=repo_id, device="cpu")
        assert_same(loaded(rows[0]["video"], **call_options(processor)), expected)


# -- the card of a run ------------------------------------------------------------------------------------------------


def read_card(text: str | bytes) -> ModelCard:
    return ModelCard(text.decode() if isinstance(text, bytes) else text)


def test_a_run_writes_the_card_of_each_checkpoint(tmp_path: Path, rows: list[dict]) -> None:
    trainer = sft_trainer(tmp_path / "run", rows, *tiny(), save_strategy="steps", save_steps=2, hub_model_id="me/sft")
    trainer.train()
    card = read_card((tmp_path / "run" / "checkpoint-2" / "README.md").read_text())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "video-text-to-text")
    assert card.data.tags == ["temporal-grounding", "video-grounding", "d2vlm", "sft"]
    record = trainer.run_record()
    for name, value in record.rows():
        if name != "Wall time":
            assert f"| {name} | {value} |" in card.text
    assert (record.seed, record.effective_batch, record.reference_free) == (7, 2, None)
    assert record.config_hash == trainer.run_record().config_hash
    assert 0 < record.wall_time_s == trainer.state.log_history[-1]["train_runtime"]
    assert "| Wall time |" in card.text
    assert "| Sampling | 1 fps |" in card.text
    assert 'pipeline("video-grounding", model="me/sft"' in card.text
    assert "![Loss curves](loss_curves.png)" in card.text
    assert (tmp_path / "run" / "checkpoint-2" / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not {"More information needed", "None", str(tmp_path)} & set(card.text.split())
    assert str(tmp_path) not in card.text
    assert "reference model" not in card.text
    assert "The licence of the weights has not been stated yet." in card.text
    with pytest.raises(ValueError, match=r"the card README\.md names no licence"):
        check_folder(tmp_path / "run" / "checkpoint-2")

    trainer.create_model_card(model_name="Shapes", license="mit", tags="shapes", dataset_name="me/shapes")
    trainer.create_model_card()  # once stated, a licence stays
    card = read_card((tmp_path / "run" / "README.md").read_text())
    assert card.data.license == "mit"

    resumed = sft_trainer(tmp_path / "more", rows, *tiny(), max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.run_record().wall_time_s is None  # how long the first part took is not known


def test_what_a_run_has_measured_is_in_its_card(tmp_path: Path, rows: list[dict]) -> None:
    """The last figures, the timeline of one evaluation row, the record for later; figures on the Hub's data besides."""
    model, processor = tiny()
    evaluated = {"per_device_eval_batch_size": 2, "eval_generate_rows": 2, "eval_max_new_tokens": 4}
    args = D2VLMSFTConfig(output_dir=str(tmp_path), **{**TRAINING, "max_steps": 1, **evaluated})
    trainer = D2VLMSFTTrainer(
        model=model, args=args, processing_class=processor, train_dataset=rows, eval_dataset=rows[:3]
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(license="mit")
    card = read_card((tmp_path / "README.md").read_text())
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        "mIoU, true answer given (Grounding)": pytest.approx(100 * metrics["eval_grounding/miou"], abs=1e-4),
        "mIoU, answer generated (Grounding)": pytest.approx(100 * metrics["eval_generated/miou"], abs=1e-4),
        "F1, answer generated (Grounding)": pytest.approx(100 * metrics["eval_generated/f1"], abs=1e-4),
    }
    assert "Data: evaluation rows of the run. Protocol: last evaluation of the run." in card.text
    assert "![Frames, frame scores and the moments that were found](timeline.png)" in card.text
    for picture in ("timeline.png", "loss_curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / ".eval_results").exists()  # its rows are not on the Hub
    record = read_run_record(json.loads((tmp_path / "run_record.json").read_text()))
    assert record == trainer.run_record()

    trainer.create_model_card(results=[Result("Grounding", "mIoU", 50.0, "me/shapes", split="test")])
    card = read_card((tmp_path / "README.md").read_text())
    assert [(r.dataset_type, r.metric_value) for r in card.data.eval_results] == [("me/shapes", 50.0)]
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results/me--shapes.yaml").read_text()))
    assert (entry.dataset_id, entry.value) == ("me/shapes", 50.0)


def test_a_picture_that_cannot_be_drawn_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def grounder(asked: list[dict], **options: object) -> list[dict]:
        raise ValueError("a.mp4 is empty")

    row = {"video": "a.mp4", "question": "When?", "question_spans": [], "spans": [[1.0, 2.0]]}
    assert draw_example(grounder, [{**row, "spans": []}], tmp_path / "t.png") is None
    assert caplog.text == ""
    assert draw_example(grounder, [row], tmp_path / "t.png") is None
    assert "the card has no timeline picture: a.mp4 is empty" in caplog.text
    assert not (tmp_path / "t.png").exists()


def test_a_stated_fact_reaches_the_card(tmp_path: Path, rows: list[dict]) -> None:
    trainer = sft_trainer(tmp_path, rows, *tiny())
    trainer.create_model_card(model_name="Shapes", license="mit", tags="shapes", dataset_name="me/shapes")
    card = read_card((tmp_path / "README.md").read_text())
    assert card.text.lstrip().startswith("# Shapes")
    assert (card.data.license, card.data.datasets) == ("mit", ["me/shapes"])
    assert card.data.tags[-1] == "shapes"
    assert "Wall time" not in card.text  # nothing ran yet
    assert "Loss curves" not in card.text


@pytest.mark.parametrize("reference_free", [True, False])
def test_a_preference_run_pushes_our_card(hub_of_all, tmp_path, rows, caplog, reference_free: bool) -> None:
    """Regression: TRL writes a card with a quick start for text generation, in `push_to_hub` and at each checkpoint."""
    model, processor = tiny()
    base = tmp_path / "base"
    save_checkpoint(base, model, processor)  # where TRL takes the reference model from
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: research\n---\n")
    model.config._name_or_path = str(base)
    repo_id = f"me/fpo-{'free' if reference_free else 'reference'}"
    args = FPOConfig(
        output_dir=str(tmp_path / "run"), hub_model_id=repo_id, reference_free=reference_free,
        **{**TRAINING, "max_steps": 1, "save_strategy": "steps", "save_steps": 1},
    )  # fmt: skip
    data = preference_dataset(rows[:4], per_row=1)
    with caplog.at_level(logging.WARNING):
        trainer = FPOTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    cards = [
        (tmp_path / "run" / "README.md").read_text(),
        (tmp_path / "run" / "checkpoint-1" / "README.md").read_text(),
        hub_of_all.files(repo_id)["README.md"],
    ]
    for card in map(read_card, cards):
        assert (card.data.library_name, card.data.license, card.data.license_name) == (
            "transformers",
            "other",
            "research",
        )
        assert card.data.base_model is None  # a folder of this machine
        assert "fpo" in card.data.tags
        assert len(set(card.data.tags)) == len(card.data.tags)
        said = f"(`reference_free={reference_free}`)"
        notice = "FPO without a reference model" if reference_free else "FPO against a reference model"
        assert f"**{notice} {said}" in card.text
        assert '"text-generation"' not in card.text
        assert "huggingface.co/None" not in card.text
        assert f"| Data fingerprint | `{trainer.train_dataset._fingerprint}` |" in card.text
        assert 'pipeline("video-grounding"' in card.text
    assert "loss_curves.png" in hub_of_all.files(repo_id)
    check_folder(tmp_path / "run")


def test_the_licence_of_a_folder(tmp_path: Path) -> None:
    assert known_licence(tmp_path / "absent") == {}
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n")
    assert known_licence(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert known_licence(tmp_path) == {}
    data = ModelCardData(license="other", license_name="own", license_link="https://example.org/licence")
    ModelCard(f"---\n{data.to_yaml()}\n---\n").save(tmp_path / "README.md")
    expected = {"license": "other", "license_name": "own", "license_link": "https://example.org/licence"}
    assert known_licence(tmp_path) == expected


@pytest.mark.parametrize(
    ("module", "words", "command"),
    [
        (None, ["-c"], None),
        (None, [""], None),
        (None, ["recipes/sft.py", "--seed", "1"], "python recipes/sft.py --seed 1"),
        ("d2vlm_hf.training.run", ["/home/me/run.py", "--seed", "1"], "python -m d2vlm_hf.training.run --seed 1"),
        ("d2vlm_hf.__main__", ["/home/me/__main__.py", "sft"], "python -m d2vlm_hf sft"),
        (None, [".venv/bin/d2vlm", "sft", "--seed", "1"], "d2vlm sft --seed 1"),
    ],
)
def test_the_command_of_a_run_can_be_repeated(monkeypatch, module: str | None, words: list[str], command) -> None:
    spec = module and SimpleNamespace(name=module, origin=words[0])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr("sys.argv", words)
    assert collect_run_record("SFT", packages=()).command == command
