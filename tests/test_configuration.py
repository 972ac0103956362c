# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The configuration: defaults of the paper, any sub-models, nothing lost in a file, numbers that are checked."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import CONNECTORS, TEXT_MODELS, text_config, tiny_config
from transformers import InstructBlipQFormerConfig, InstructBlipVisionConfig, Phi3Config, SiglipVisionConfig

from d2vlm_hf.model.configuration_d2vlm import D2VLMConfig


def test_defaults_are_the_paper():
    config = D2VLMConfig()
    assert config.model_type == "d2vlm"
    assert isinstance(config.vision_config, InstructBlipVisionConfig)
    assert isinstance(config.qformer_config, InstructBlipQFormerConfig)
    assert isinstance(config.text_config, Phi3Config)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1408, 39)
    assert (config.connector_type, config.num_query_tokens) == ("qformer", 32)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "default")
    assert (config.evidence_layer, config.evidence_threshold, config.evidence_decay) == (6, 0.6, 2.0)
    assert (config.grounding_weight, config.consistency_weight) == (10.0, 10.0)
    assert (config.frame_attention, config.visual_capture) == ("bidirectional", True)
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize("text", TEXT_MODELS)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_nothing_is_lost_in_a_file(text, connector, tmp_path):
    config = tiny_config(text, connector, evidence_threshold=0.5, visual_capture=False, vision_chunk_size=7)
    config.save_pretrained(tmp_path)
    loaded = D2VLMConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.text_config) is type(config.text_config)
    assert type(loaded.vision_config) is type(config.vision_config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "d2vlm"
    assert (stored["evidence_threshold"], stored["visual_capture"], stored["vision_chunk_size"]) == (0.5, False, 7)


def test_sub_models_may_be_dicts():
    config = D2VLMConfig(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 24},
        text_config={"model_type": "qwen3", "num_hidden_layers": 9},
        connector_type="mlp",
    )
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert config.vision_config.hidden_size == 24
    assert config.text_config.model_type == "qwen3"
    assert config.text_config.num_hidden_layers == 9


def test_the_qformer_belongs_to_its_connector():
    assert tiny_config(connector="mlp").qformer_config is None
    assert tiny_config(connector="mlp", qformer_config=InstructBlipQFormerConfig()).qformer_config is None
    assert tiny_config().qformer_config.encoder_hidden_size == tiny_config().vision_config.hidden_size == 24


@pytest.mark.parametrize(("text", "tied"), [("llama", False), ("qwen3", True), ("gemma", True), ("phi3", False)])
def test_the_text_model_decides_whether_embeddings_are_tied(text, tied, tmp_path):
    config = tiny_config(text)
    assert config.tie_word_embeddings is tied
    config.save_pretrained(tmp_path)
    assert D2VLMConfig.from_pretrained(tmp_path).tie_word_embeddings is tied


def test_custom_pipelines_are_dropped_when_the_package_is_there():
    config = D2VLMConfig.from_dict({**tiny_config().to_dict(), "custom_pipelines": {"video-grounding": {}}})
    assert not hasattr(config, "custom_pipelines")
    assert "custom_pipelines" not in config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evidence_layer": 4},
            r"evidence_layer=4 is outside the text model, which has 4 layers: visual capture reads.*to 1\.\.3",
        ),
        ({"evidence_layer": 0}, "evidence_layer=0 is outside the text model"),
        ({"evidence_layer": -1}, "evidence_layer=-1 is outside the text model"),
        ({"evidence_threshold": 0.0}, r"evidence_threshold=0.0 is not in \(0, 1\]"),
        ({"evidence_threshold": 1.01}, r"evidence_threshold=1.01 is not in \(0, 1\]"),
        ({"evidence_threshold": float("nan")}, r"evidence_threshold=nan is not in \(0, 1\]"),
        ({"evidence_decay": 1.0}, "evidence_decay=1.0 must be above 1"),
        ({"evidence_decay": float("nan")}, "evidence_decay=nan must be above 1"),
        ({"frame_positions": -0.1}, "frame_positions=-0.1 must be a number from 0 up"),
        ({"frame_positions": float("nan")}, "frame_positions=nan must be a number from 0 up"),
        ({"vision_chunk_size": 0}, "vision_chunk_size=0 must be at least 1"),
        ({"evidence_token_id": 45}, r"are \(45, 45, 47\): they must differ"),
    ],
)
def test_a_number_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"connector_type": "resampler"},
        {"vision_feature_select_strategy": "cls"},
        {"frame_attention": "both"},
        {"evidence_layer": "six"},
    ],
)
def test_a_value_of_the_wrong_kind_is_named(changes):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(changes))):
        tiny_config(**changes)


def test_the_default_evidence_layer_needs_a_deeper_text_model():
    with pytest.raises(ValueError, match=r"evidence_layer=6 is outside the text model, which has 6 layers"):
        D2VLMConfig(text_config=text_config("llama", num_hidden_layers=6))
