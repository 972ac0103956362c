# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint loads as users of transformers load: placed, in another precision, quantized; data sets as theirs do."""

import importlib.util
import io
import json
import resource
import shutil
from pathlib import Path

import av
import pytest
import torch
from datasets import Dataset, Video, load_dataset
from hub_server import LocalHub, run_script
from huggingface_hub import DatasetCard
from safetensors.torch import load_file
from tiny_runs import sft_rows, tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import d2vlm_hf
from d2vlm_hf.data.schema import COLUMNS, features
from d2vlm_hf.hub.card_data import DatasetCardInfo
from d2vlm_hf.hub.cards import render_dataset_card
from d2vlm_hf.hub.checkpoint_folder import safe_save
from d2vlm_hf.model.pipeline_d2vlm import VideoGroundingPipeline, save_checkpoint


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own call

QUESTION = "When does the red circle move?"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("loading") / "checkpoint"
    save_checkpoint(folder, *tiny())
    return folder


def ask(grounder: VideoGroundingPipeline) -> dict:
    """An answer with evidence, to which the model is drawn."""
    ids = grounder.processor
    bias = [[[ids.evidence_token_id], 50.0], [[ids.evidence_end_token_id], 40.0]]
    options = {"sequence_bias": bias, "no_repeat_ngram_size": 2}
    return grounder(d2vlm_hf.bundled_clip(), question=QUESTION, max_new_tokens=8, generate_kwargs=options)


def check_answer(answer: dict) -> None:
    assert answer["evidence"]
    for moment in answer["evidence"]:
        assert 0 <= moment["start"] < moment["end"] <= answer["duration"]
        assert 0 < moment["score"] <= 1


@pytest.mark.parametrize(
    ("dtype", "device_map"), [("float32", "auto"), ("bfloat16", "cpu"), ("float16", {"": "cpu"})], ids=str
)
def test_placed_and_in_another_precision(saved: Path, dtype: str, device_map: str | dict) -> None:
    grounder = pipeline("video-grounding", model=str(saved), dtype=dtype, device_map=device_map)
    kinds = {parameter.dtype for parameter in grounder.model.parameters()}
    assert kinds == {getattr(torch, dtype)}
    check_answer(ask(grounder))


def quantization(name: str):
    """The configuration of a quantization library and the class that its linear layers become."""
    if name.startswith("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        bits = name.removeprefix("bitsandbytes-")
        return BitsAndBytesConfig(**{f"load_in_{bits}": True})
    if name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def is_installed(library: str) -> bool:
    parts = {"quanto": ["optimum", "optimum.quanto"]}.get(library, [library])
    return all(importlib.util.find_spec(part) is not None for part in parts)


@pytest.mark.parametrize("name", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao", "quanto"])
def test_quantized(saved: Path, name: str) -> None:
    library = name.split("-")[0]
    if not is_installed(library):
        pytest.skip(f"{library} is not installed")
    config = quantization(name)
    model = AutoModelForImageTextToText.from_pretrained(saved, quantization_config=config, device_map="cpu")
    assert model.is_quantized
    check_answer(ask(VideoGroundingPipeline(model=model.eval(), processor=AutoProcessor.from_pretrained(saved))))


@pytest.mark.skipif(not is_installed("torchvision"), reason="torchvision is not installed, and nothing here needs it")
def test_the_video_processor_by_its_auto_class(saved: Path, hub: LocalHub) -> None:
    """With the package, and in a process that has only transformers: the same class, options and pixels."""
    from transformers import AutoVideoProcessor

    loaded = AutoVideoProcessor.from_pretrained(saved)
    assert type(loaded) is d2vlm_hf.D2VLMVideoProcessor
    assert loaded.to_dict() == AutoProcessor.from_pretrained(saved).video_processor.to_dict()
    script = f"""
import json, sys
from transformers import AutoVideoProcessor

loaded = AutoVideoProcessor.from_pretrained({str(saved)!r}, trust_remote_code=True)
pixels = loaded(videos=[{str(d2vlm_hf.bundled_clip())!r}], return_tensors="pt")["pixel_values_videos"]
modules = [name for name, module in sys.modules.items() if name.startswith("d2vlm_hf") and module]
print("RESULT" + json.dumps([type(loaded).__name__, list(pixels.shape), pixels.double().sum().item(), modules]))
"""
    pixels = loaded(videos=[str(d2vlm_hf.bundled_clip())], return_tensors="pt")["pixel_values_videos"]
    result = json.loads(run_script(script, hub, block=["d2vlm_hf"]).stdout.split("RESULT")[1])
    expected = [type(loaded).__name__, list(pixels.shape), pytest.approx(pixels.double().sum().item()), []]
    assert result == expected


# -- saving -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_while_a_checkpoint_is_saved(saved: Path, tmp_path: Path) -> None:
    """Over an older checkpoint, which is still the old one afterwards, all of it; a second try completes."""
    target = Path(shutil.copytree(saved, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    model, processor = tiny(seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="could not be saved: there is no room for it"):
            safe_save(lambda folder: save_checkpoint(folder, model, processor), target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    safe_save(lambda folder: save_checkpoint(folder, model, processor), target)
    weights = load_file(target / "model.safetensors")
    assert weights
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items() if name in weights)
    check_answer(ask(pipeline("video-grounding", model=str(target), device="cpu")))


def test_a_pipeline_saved_over_an_older_one(saved: Path, tmp_path: Path) -> None:
    """With no room for it, the older one stays whole; weights that were split otherwise go, and nothing else does."""
    target = tmp_path / "model"
    model, processor = tiny(seed=1)
    grounder = VideoGroundingPipeline(model=model, processor=processor)
    grounder.save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    (target / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(Exception, match="File too large"):
            grounder.save_pretrained(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    check_answer(ask(pipeline("video-grounding", model=str(target), device="cpu")))
    grounder.save_pretrained(target)
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]
    assert (target / "notes.txt").read_text() == "mine"
    check_answer(ask(pipeline("video-grounding", model=str(target), device="cpu")))


# -- data sets --------------------------------------------------------------------------------------------------------


def test_the_shapes_data_set(hub_of_all: LocalHub, tmp_path: Path) -> None:
    """Pushed with its videos inside, loaded plain and streaming by what `datasets` knows; its card from the rows."""
    rows = sft_rows(tmp_path, videos=2)
    repo_id = "org/d2vlm-shapes"
    Dataset.from_list(rows, features=features()).push_to_hub(repo_id, split="test")
    info = DatasetCardInfo.from_rows(repo_id, {"test": rows}, license="apache-2.0")
    render_dataset_card(info, DatasetCard.load(repo_id).data.to_dict()).push_to_hub(repo_id, repo_type="dataset")
    shutil.rmtree(tmp_path)  # nothing but the Hub has the videos now
    plain = load_dataset(repo_id, split="test")
    stream = load_dataset(repo_id, split="test", streaming=True)
    assert list(plain.features) == list(COLUMNS)
    for loaded in (plain, stream):
        assert isinstance(loaded.features["video"], Video)
        got = list(loaded.cast_column("video", Video(decode=False)))
        assert [{**row, "video": None} for row in got] == [{**row, "video": None} for row in rows]
        for row in got:
            with av.open(io.BytesIO(row["video"]["bytes"])) as container:
                stream_of_file = container.streams.video[0]
                assert stream_of_file.codec_context.name == "h264"
                assert container.duration / av.time_base == pytest.approx(row["duration"], abs=0.2)
    card = DatasetCard.load(repo_id)
    assert card.data.configs[0]["data_files"][0]["split"] == "test"
    assert {"video", "spans"} <= {feature["name"] for feature in card.data.dataset_info["features"]}
    assert f"| split | test | {len(rows)} |" in card.text
