# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of D2VLM: three stock sub-models and every number of the method under a name."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.instructblip.configuration_instructblip import InstructBlipQFormerConfig


@strict
class D2VLMConfig(PreTrainedConfig):
    r"""Configuration of a [`D2VLMForConditionalGeneration`].

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The vision tower; `model_type` names any vision model. Default: `instructblip_vision_model` (EVA-ViT-g/14).
        qformer_config (`dict` or `InstructBlipQFormerConfig`, *optional*):
            The text-conditioned Q-Former of the `"qformer"` connector; `None` with the `"mlp"` connector.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Any causal language model that `AutoModel` knows. Default: `phi3`.
        connector_type (`str`, defaults to `"qformer"`):
            `"qformer"`: the question reads the patches (paper). `"mlp"`: mean-pooled patches through an MLP.
        num_query_tokens (`int`, defaults to 32): Queries of the Q-Former for each frame.
        vision_feature_layer (`int`, defaults to -1):
            Vision hidden state to read. -1 is the last layer (before the final norm for `instructblip_vision_model`).
        vision_feature_select_strategy (`str`, defaults to `"default"`): `"default"` drops the CLS token, `"full"`
            keeps all.
        video_token_id, evidence_token_id, evidence_end_token_id (`int`):
            Ids of `<video>` (one placeholder a frame), `<evi>` and `</evi>`.
        evidence_layer (`int`, defaults to 6):
            Visual semantic capture pools the frame states after this many text layers.
        evidence_threshold (`float`, defaults to 0.6): Frames with `p >= evidence_threshold * max p` are kept in
            decoding.
        evidence_decay (`float`, defaults to 2.0): `alpha` of the soft target `alpha ** -d`, d in frames from the span.
        grounding_weight, consistency_weight (`float`, default to 10.0): Weights of the two evidence terms in the SFT
            loss.
        frame_attention (`str`, defaults to `"bidirectional"`): `"bidirectional"` among frames of a video, or
            `"causal"`.
        visual_capture (`bool`, defaults to `True`): Add pooled frame states to `<evi>` embeddings (off: an ablation).
        frame_positions (`float`, defaults to 0.0): Size of a sinusoidal code of its index that is added to every frame
            vector; 0 adds none (paper). With it a moment given in a question says when it is, not only what it shows.
        vision_chunk_size (`int`, defaults to 64): Frames the frozen vision tower encodes at a time; bounds memory.
    """

    model_type = "d2vlm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="instructblip_vision_model"),
        "qformer_config": SubConfigSpec(config_class=InstructBlipQFormerConfig, optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="phi3"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector_type: Literal["qformer", "mlp"] = "qformer"
    num_query_tokens: int = 32
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    video_token_id: int = 32010
    evidence_token_id: int = 32011
    evidence_end_token_id: int = 32012
    evidence_layer: int = 6
    evidence_threshold: float = 0.6
    evidence_decay: float = 2.0
    grounding_weight: float = 10.0
    consistency_weight: float = 10.0
    frame_attention: Literal["bidirectional", "causal"] = "bidirectional"
    visual_capture: bool = True
    frame_positions: float = 0.0
    vision_chunk_size: int = 64
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        # `custom_pipelines` makes `pipeline()` demand trust_remote_code; only a remote load needs it.
        if not type(self).__module__.startswith("transformers_modules"):
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if self.connector_type == "qformer":
            if self.qformer_config is None:
                self.qformer_config = InstructBlipQFormerConfig()
            self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        else:
            self.qformer_config = None
        # As LlavaConfig: the text model knows whether its embeddings are tied.
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        self._check_numbers()

    def _check_numbers(self) -> None:
        layers = self.text_config.num_hidden_layers
        if not 1 <= self.evidence_layer < layers:
            raise ValueError(
                f"evidence_layer={self.evidence_layer} is outside the text model, which has {layers} layers: visual "
                f"capture reads the states after that layer. Set evidence_layer to 1..{layers - 1}."
            )
        if not 0.0 < self.evidence_threshold <= 1.0:
            raise ValueError(
                f"evidence_threshold={self.evidence_threshold} is not in (0, 1]: it is the share of the highest frame "
                "probability that a frame must reach. The paper uses 0.6."
            )
        if not self.evidence_decay > 1.0:
            raise ValueError(
                f"evidence_decay={self.evidence_decay} must be above 1: the soft target alpha ** -d would not fall "
                "with the distance d from the span. The paper uses 2.0."
            )
        if not 0.0 <= self.frame_positions < float("inf"):
            raise ValueError(
                f"frame_positions={self.frame_positions} must be a number from 0 up: it is the size of the code of a "
                "frame's index that is added to its vector. 0 adds none; `recipes/shapes/sft.yaml` uses 0.35."
            )
        if self.vision_chunk_size < 1:
            raise ValueError(
                f"vision_chunk_size={self.vision_chunk_size} must be at least 1: it is the number of frames encoded at "
                "a time. 64 is a good start; lower it if memory runs out."
            )
        special = (self.video_token_id, self.evidence_token_id, self.evidence_end_token_id)
        if len(set(special)) != len(special):
            raise ValueError(
                f"video_token_id, evidence_token_id and evidence_end_token_id are {special}: they must differ, one id "
                "per token. Take them from the tokenizer."
            )


D2VLMConfig.register_for_auto_class()

__all__ = ["D2VLMConfig"]
