# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""One saved folder, loaded by the auto classes: with the package, and in a process that has never heard of it."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hub_server import run_script
from tiny_processor import assert_same, model_for, tiny_processor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from video_files import write_video

import d2vlm_hf
from d2vlm_hf.model.pipeline_d2vlm import VideoGroundingPipeline, complete_checkpoint, save_checkpoint


QUESTION = "When does the man open the door?"
MODEL = Path(d2vlm_hf.__file__).parent / "model"
AUTO_MODELS = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a saved pipeline, a video, and what the pipeline says about it."""
    folder = tmp_path_factory.mktemp("auto")
    video = write_video(folder / "video.mp4", 25)
    processor = tiny_processor()
    model = model_for(processor, evidence_threshold=0.97)
    model.config._name_or_path = str(folder)
    processor.tokenizer.name_or_path = str(folder)
    pipe = VideoGroundingPipeline(model=model, processor=processor, device="cpu")
    pipe.save_pretrained(folder / "checkpoint")
    expected = pipe(video, **options(processor))
    assert len(expected["evidence"]) > 1
    assert len(expected["references"]) > 1
    return folder / "checkpoint", video, expected


def options(processor) -> dict:
    """Of a call in which the model, which has learned nothing, is drawn to `<evi>` and `</evi>`; written in JSON."""
    bias = [[[processor.evidence_token_id], 50.0], [[processor.evidence_end_token_id], 40.0]]
    return {
        "question": QUESTION,
        "generate_kwargs": {"sequence_bias": bias, "no_repeat_ngram_size": 2},
        "max_new_tokens": 12,
        "return_curves": True,
    }


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_saved_pipeline_is_complete(saved):
    folder = saved[0]
    code = {path.name for path in MODEL.glob("*_d2vlm.py")}
    others = {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
        *("qformer_tokenizer/tokenizer.json", "qformer_tokenizer/tokenizer_config.json"),
    }
    assert set(files(folder)) == code | others
    config = json.loads((folder / "config.json").read_text())
    model = "modeling_d2vlm.D2VLMForConditionalGeneration"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_d2vlm.D2VLMConfig",
        "AutoModel": model,
        "AutoModelForImageTextToText": model,
        "AutoModelForMultimodalLM": model,
        "AutoProcessor": "processing_d2vlm.D2VLMProcessor",
    }
    assert config["custom_pipelines"] == {
        "video-grounding": {
            "impl": "pipeline_d2vlm.VideoGroundingPipeline",
            "pt": ["AutoModelForImageTextToText"],
            "type": "multimodal",
        }
    }
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_d2vlm.D2VLMProcessor"}
    assert (
        processor["video_processor"]["auto_map"]["AutoVideoProcessor"] == "video_processing_d2vlm.D2VLMVideoProcessor"
    )


def test_no_path_of_this_machine_is_saved(saved):
    folder = saved[0]
    places = [str(folder.parent), str(Path(d2vlm_hf.__file__).parent), os.path.expanduser("~") + "/", sys.prefix]
    for name, content in files(folder).items():
        if name.endswith((".json", ".jinja")):
            text = content.decode()
            assert not [place for place in places if place in text], name
            assert not re.search(r'"(/|[A-Z]:\\)[^"]*"', text) or name.endswith("tokenizer.json"), name


def test_loading_with_the_package(saved):
    folder, video, expected = saved
    assert type(AutoConfig.from_pretrained(folder)) is d2vlm_hf.D2VLMConfig
    assert not hasattr(AutoConfig.from_pretrained(folder), "custom_pipelines")
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tiny_processor().tokenizer)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is d2vlm_hf.D2VLMProcessor
    for auto_class in AUTO_MODELS:
        model = auto_class.from_pretrained(folder)
        assert type(model) is d2vlm_hf.D2VLMForConditionalGeneration
    direct = VideoGroundingPipeline(model=model, processor=processor, device="cpu")
    for pipe in (
        direct,
        pipeline("video-grounding", model=str(folder), device="cpu"),
        pipeline("video-grounding", model=str(folder), trust_remote_code=True, device="cpu"),
    ):
        assert type(pipe) is VideoGroundingPipeline
        assert_same(pipe(video, **options(processor)), expected)
    call = options(processor)
    question = call.pop("question")
    assert_same(
        pipeline("video-grounding", model=str(folder), device="cpu", **call)(video, question=question), expected
    )


STRANGER = """
import json, os, sys

from transformers import (
    AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline
)

folder, video, again, options = json.loads(os.environ["CALL"])
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
result = {"types": [type(config).__name__, type(processor).__name__], "answers": [], "losses": []}
inputs = processor.ask(options["question"], video)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(folder, **trust)
    result["types"].append(type(model).__name__)
    result["losses"].append(model(**inputs, labels=inputs["input_ids"]).loss.item())
pipe = pipeline("video-grounding", model=folder, device="cpu", **trust)
result["answers"].append(pipe(video, **options))
pipe.save_pretrained(again)
result["answers"].append(pipeline(model=again, device="cpu", **trust)(video, **options))
refused = None
try:
    pipeline("video-grounding", model=folder, trust_remote_code=False)
except ValueError as error:
    refused = str(error)
result["refused"] = refused
result["modules"] = [name for name, module in sys.modules.items() if name.startswith("d2vlm_hf") and module]
print("RESULT" + json.dumps(result))
"""


def test_loading_without_the_package(saved, hub, tmp_path):
    folder, video, expected = saved
    call = json.dumps([str(folder), video, str(tmp_path / "again"), options(tiny_processor())])
    run = run_script(STRANGER, hub, block=["d2vlm_hf", "torchvision"], env={"CALL": call})
    result = json.loads(run.stdout.split("RESULT")[1])
    assert result["types"] == ["D2VLMConfig", "D2VLMProcessor", *["D2VLMForConditionalGeneration"] * 3]
    assert_same(result["answers"], [expected] * 2)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor.ask(QUESTION, video)
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"]).loss.item()
    assert result["losses"] == pytest.approx([loss] * 3, abs=1e-6)
    assert "trust_remote_code" in result["refused"]
    assert result["modules"] == []
    # What a stranger saves is as complete, and the same
    first, second = files(folder), files(tmp_path / "again")
    assert set(first) == set(second)
    for name in first:
        if name.endswith((".py", ".jinja", ".safetensors", "tokenizer.json")):
            assert first[name] == second[name], name
    assert json.loads(first["config.json"])["auto_map"] == json.loads(second["config.json"])["auto_map"]
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_a_folder_saved_by_a_trainer_is_completed(saved, tmp_path):
    folder = saved[0]
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.save_pretrained(tmp_path / "trainer")
    written = (tmp_path / "trainer" / "model.safetensors").stat().st_mtime_ns
    complete_checkpoint(tmp_path / "trainer", processor)
    assert (tmp_path / "trainer" / "model.safetensors").stat().st_mtime_ns == written
    assert set(files(tmp_path / "trainer")) == set(files(folder))
    assert pipeline("video-grounding", model=str(tmp_path / "trainer"), device="cpu").task == "video-grounding"
    with pytest.raises(ValueError, match=r"has no config\.json to complete\. Save the model there first"):
        complete_checkpoint(tmp_path / "empty", processor)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: a checkpoint is a folder of several"):
        save_checkpoint(tmp_path / "file", model, processor)


def test_saving_leaves_the_model_as_it_was(tmp_path):
    processor = tiny_processor()
    model = model_for(processor)
    save_checkpoint(tmp_path / "one", model, processor)
    before = model.config.to_dict()
    assert "custom_pipelines" not in before
    save_checkpoint(tmp_path / "two", model, processor)
    assert model.config.to_dict() == before
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_saving_and_pushing_at_once(saved, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        VideoGroundingPipeline, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs))
    )
    pipe = pipeline("video-grounding", model=str(saved[0]), device="cpu")
    pipe.save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    pipe.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/other")
    assert pushed == [(("name",), {"private": True}), (("me/other",), {})]
    assert (tmp_path / "name" / "model.safetensors").is_file()


def test_the_stock_pipeline_accepts_chats_about_videos(saved):
    folder, video, _ = saved
    chat = [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": QUESTION}]}]
    stock = pipeline("image-text-to-text", model=str(folder), device="cpu")
    (result,) = stock(text=chat, max_new_tokens=5, return_full_text=False)
    assert isinstance(result["generated_text"], str)
