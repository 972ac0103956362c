# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The D2VLM backbone: frames become tokens, and evidence tokens are filled with the frames of their spans."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.instructblip.configuration_instructblip import InstructBlipVisionConfig
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel
from transformers.utils import ModelOutput

from .configuration_d2vlm import D2VLMConfig
from .connector_d2vlm import D2VLMQFormerConnector, build_connector, frame_codes
from .evidence_d2vlm import ROLE_QUESTION
from .sequence_d2vlm import EmbeddedSequence


@dataclass
class D2VLMModelOutput(ModelOutput):
    """States of the text model; they cover the columns `[first_column, S)` of the sequence.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(rows, S - first_column, H)`): After the final norm.
        evidence_states (same shape): After layer L-1, the input of the last layer; `h` and `f_t` are read here.
        frame_states (`torch.Tensor` of shape `(rows, T, H)`): `m_t`, frame states after `evidence_layer`.
        frame_evidence_states (same shape): `f_t`, frame states after layer L-1.
        frame_mask (`torch.BoolTensor` of shape `(rows, T)`): True on real frames.
        first_column (`int`): First column that the states cover.
        past_key_values, hidden_states, attentions: As in transformers.
    """

    last_hidden_state: torch.Tensor | None = None
    evidence_states: torch.Tensor | None = None
    frame_states: torch.Tensor | None = None
    frame_evidence_states: torch.Tensor | None = None
    frame_mask: torch.Tensor | None = None
    first_column: int | None = None
    past_key_values: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class _ReachedLayer(Exception):
    """Raised by a hook to stop the text model at a layer; carries the states that enter it."""

    def __init__(self, states: torch.Tensor):
        super().__init__("reached the requested layer")
        self.states = states


class D2VLMPreTrainedModel(PreTrainedModel):
    config: D2VLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, D2VLMQFormerConnector):
            init.normal_(module.query_tokens, mean=0.0, std=self.config.initializer_range)


class D2VLMModel(D2VLMPreTrainedModel):
    """Vision tower, connector and text model; evidence tokens are filled with the frames of their spans."""

    def __init__(self, config: D2VLMConfig):
        super().__init__(config)
        if isinstance(config.vision_config, InstructBlipVisionConfig):
            self.vision_tower = InstructBlipVisionModel._from_config(config.vision_config)
        else:
            self.vision_tower = AutoModel.from_config(config.vision_config)
        self.connector = build_connector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @property
    def embedding_scale(self) -> float | torch.Tensor:
        """Factor between raw vectors and input embeddings: where Gemma scales embeddings, frames are scaled too."""
        return getattr(self.get_input_embeddings(), "embed_scale", 1.0)

    # ---- frames -> one vector each -------------------------------------------------------------------------------

    def encode_patches(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        """Patch features of packed frames: `(N, 3, height, width)` -> `(N, P, D)`.

        A frozen tower works through `vision_chunk_size` frames at a time, so memory does not grow with the video.
        """
        frozen = not (torch.is_grad_enabled() and any(p.requires_grad for p in self.vision_tower.parameters()))
        chunk = self.config.vision_chunk_size if frozen else pixel_values_videos.shape[0]
        frames = pixel_values_videos.to(self.vision_tower.dtype).split(chunk)
        return torch.cat([self._encode_chunk(part) for part in frames])

    def _encode_chunk(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layer = self.config.vision_feature_layer
        if isinstance(self.vision_tower, InstructBlipVisionModel) and layer == -1:
            # `last_hidden_state` is post-normed; the original reads the raw states of the last layer.
            embeds = self.vision_tower.embeddings(pixel_values)
            features = self.vision_tower.encoder(inputs_embeds=embeds).last_hidden_state
        elif layer == -1:
            features = self.vision_tower(pixel_values).last_hidden_state
        else:
            features = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[layer]
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode videos for the prompts that ask about them.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(sum of T, 3, height, width)`): Packed frames of all videos.
            num_frames (`torch.LongTensor` of shape `(videos,)`): T of each video; default: one video.
            qformer_input_ids, qformer_attention_mask (`torch.LongTensor` of shape `(prompts, S)`): Questions.
            video_index (`torch.LongTensor` of shape `(prompts,)`, *optional*):
                The video that each prompt asks about; default: prompt i, video i. A video asked twice is encoded once.
            patch_features (`torch.Tensor` of shape `(sum of T, P, D)`, *optional*): Stored `encode_patches` output.

        Returns:
            `BaseModelOutputWithPooling` whose `pooler_output` is a list with one `(T, H)` tensor a prompt.
        """
        patches = self.encode_patches(pixel_values_videos) if patch_features is None else patch_features
        lengths = [patches.shape[0]] if num_frames is None else num_frames.tolist()
        if sum(lengths) != patches.shape[0]:
            raise ValueError(
                f"num_frames={lengths} adds up to {sum(lengths)} frames, but {patches.shape[0]} were given: frames are "
                "packed one video after the other. Pass num_frames as the processor returned it."
            )
        if video_index is not None:
            videos = patches.split(lengths)
            order = video_index.tolist()
            if not all(0 <= i < len(videos) for i in order):
                raise ValueError(f"video_index={order} names videos outside 0..{len(videos) - 1}. Number them from 0.")
            patches = torch.cat([videos[i] for i in order])
            lengths = [lengths[i] for i in order]
        text_ids = text_mask = None
        if self.connector.uses_text and qformer_input_ids is not None:
            if qformer_input_ids.shape[0] != len(lengths):
                raise ValueError(
                    f"{qformer_input_ids.shape[0]} questions for {len(lengths)} videos: the Q-Former reads one "
                    "question per prompt. Pass video_index to ask several questions about one video."
                )
            repeats = torch.tensor(lengths, device=patches.device)
            if qformer_attention_mask is None:
                qformer_attention_mask = torch.ones_like(qformer_input_ids)
            text_ids = qformer_input_ids.repeat_interleave(repeats, dim=0)
            text_mask = qformer_attention_mask.repeat_interleave(repeats, dim=0)
        embeds = self.connector(patches, text_ids, text_mask)  # (sum of T, H)
        if self.config.frame_positions:
            embeds = embeds + self.config.frame_positions * frame_codes(lengths, embeds.shape[1]).to(embeds)
        return BaseModelOutputWithPooling(last_hidden_state=embeds, pooler_output=list(embeds.split(lengths)))

    # ---- the text model -------------------------------------------------------------------------------------------

    def token_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, token_id: int) -> torch.Tensor:
        """True where a token stands; found by its embedding when only embeddings were given. `(rows, S)`."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.tensor(token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _run_text_model(self, inputs_embeds, attention_mask, position_ids, cache=None, video_mask=None, **kwargs):
        if video_mask is not None and self.config.frame_attention == "bidirectional":
            attention = self.config.text_config._attn_implementation
            if attention and "flash" in attention:
                raise ValueError(
                    f"attn_implementation='{attention}' cannot let frames attend to each other both ways: its masks "
                    "are causal. Use 'sdpa', 'eager' or 'flex_attention' for the text model, or "
                    "frame_attention='causal'."
                )
            attention_mask = create_masks_for_generate(
                config=self.config.text_config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
                block_sequence_ids=torch.where(video_mask, 0, -1),  # one video a row: one block
            )
        wanted = kwargs.pop("output_hidden_states", None)
        kwargs.pop("return_dict", None)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            # two layers are read here; the states of the others are kept only for a caller who asks
            output_hidden_states=True if wanted else [self.config.evidence_layer, -2],
            return_dict=True,
            **kwargs,
        )

    def _states_entering_layer(self, layer: int, inputs_embeds, *args, **kwargs) -> torch.Tensor:
        """Run the text model only up to a layer; exact with and without gradient checkpointing."""

        owner = threading.get_ident()

        def stop(module, layer_args, layer_kwargs):
            if threading.get_ident() == owner:  # other threads may be running the same model
                raise _ReachedLayer(layer_args[0] if layer_args else layer_kwargs["hidden_states"])

        handle = self.language_model.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run_text_model(inputs_embeds, *args, **kwargs)
        except _ReachedLayer as reached:
            return reached.states
        finally:
            handle.remove()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        num_frames: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        video_index: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        evidence_spans: torch.Tensor | None = None,
        evidence_role: torch.Tensor | None = None,
        evidence_embeds: torch.Tensor | None = None,
        prompt_length: int | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> D2VLMModelOutput:
        r"""Arguments as in [`D2VLMForConditionalGeneration.forward`]."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        rows, columns = inputs_embeds.shape[:2]
        if position_ids is None and torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -columns:]
        # `generate` marks its steps by `evidence_embeds`; asking a static cache would break the compiled graph
        if evidence_embeds is not None or (past_key_values is not None and past_key_values.get_seq_length() > 0):
            if evidence_embeds is not None:
                inputs_embeds = inputs_embeds + evidence_embeds * self.embedding_scale
            outputs = self._run_text_model(inputs_embeds, attention_mask, position_ids, past_key_values, **kwargs)
            return self._pack(outputs, keep_states=kwargs.get("output_hidden_states"))

        features = None
        if mm_encoder_outputs and mm_encoder_outputs.get("video") is not None:
            features = mm_encoder_outputs["video"].pooler_output
        elif pixel_values_videos is not None or patch_features is not None:
            features = self.get_video_features(
                pixel_values_videos, num_frames, qformer_input_ids, qformer_attention_mask, video_index, patch_features
            ).pooler_output
        if attention_mask is None:
            attention_mask = torch.ones(rows, columns, dtype=torch.long, device=inputs_embeds.device)
        if position_ids is None:
            position_ids = torch.arange(columns, device=inputs_embeds.device).expand(rows, -1)
        video_mask = self.token_mask(input_ids, inputs_embeds, self.config.video_token_id)
        evidence_mask = self.token_mask(input_ids, inputs_embeds, self.config.evidence_token_id)
        frames = self._place_frames(features, video_mask)
        if frames is not None:
            inputs_embeds = inputs_embeds.masked_scatter(
                video_mask[..., None], (torch.cat(frames) * self.embedding_scale).to(inputs_embeds.dtype)
            )
        sequence = EmbeddedSequence(inputs_embeds, attention_mask, position_ids, video_mask, evidence_mask, frames)
        if evidence_spans is not None or evidence_role is not None or frames:
            sequence.check_evidence(evidence_spans, evidence_role)
        if evidence_spans is not None:
            sequence.fill_question(evidence_spans, evidence_role, self.embedding_scale)
        responses = rows // len(features) if features else 1
        if prompt_length is not None:
            self._check_prompts(input_ids, sequence, evidence_role, prompt_length, responses)
        has_response = evidence_role is not None and bool((evidence_role > ROLE_QUESTION).any())
        if prompt_length is not None and past_key_values is None and not self._checkpointing:
            return self._shared_prefix(sequence, evidence_spans, evidence_role, prompt_length, responses, **kwargs)
        if has_response and self.config.visual_capture and frames is not None:
            self._fill_response(sequence, evidence_spans, evidence_role, responses, **kwargs)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        outputs = self._run_text_model(
            sequence.embeds, attention_mask, position_ids, past_key_values, video_mask if frames else None, **kwargs
        )
        return self._pack(outputs, sequence, kwargs.get("output_hidden_states"))

    @property
    def _checkpointing(self) -> bool:
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.language_model.modules())

    def _place_frames(self, features, video_mask: torch.Tensor) -> list[torch.Tensor] | None:
        """Frame vectors row by row, `(T, H)` each; the placeholders of every row are counted against them."""
        placeholders = video_mask.sum(1).tolist()
        if features is None:
            if any(placeholders):
                raise ValueError(
                    f"the text has {placeholders} <video> placeholders per row but no video was given. Pass "
                    "pixel_values_videos and num_frames as the processor returned them."
                )
            return None
        rows = video_mask.shape[0]
        if rows % len(features):
            raise ValueError(
                f"{rows} rows of text for {len(features)} videos: every video needs the same number of responses (all "
                "first ones, then all second ones). Pass video_index to ask several questions about one video."
            )
        frames = list(features) * (rows // len(features))
        counts = [len(f) for f in frames]
        if counts != placeholders:
            raise ValueError(
                f"videos have {counts} frames but the text has {placeholders} <video> placeholders: there must be one "
                "a frame. Make both with the processor."
            )
        return frames

    def _check_prompts(self, input_ids, sequence, role, prompt_length: int, responses: int) -> None:
        """What sharing the prompts' pass takes for granted; checked on every path, so that all take the same input."""
        columns = sequence.embeds.shape[1]
        if not 0 < prompt_length < columns:
            raise ValueError(
                f"prompt_length={prompt_length} leaves no prompt or no response in {columns} columns. It is the number "
                "of columns of the left-padded prompts."
            )
        if sequence.video_mask[:, prompt_length:].any():
            raise ValueError(
                f"prompt_length={prompt_length} cuts the video: a frame stands in column {prompt_length} or later. It "
                "is the number of columns of the left-padded prompts."
            )
        if role is not None:
            tokens = sequence.evidence_mask[:, :prompt_length].sum(1).tolist()
            given = (role == ROLE_QUESTION).sum(1).tolist()
            if tokens != given:
                raise ValueError(
                    f"the prompts have {tokens} <evi> tokens but {given} of role 0: with prompt_length every <evi> of "
                    "a prompt is a moment given in the question, and no other is. Mend evidence_role, or leave "
                    "prompt_length out."
                )
        if responses > 1 and input_ids is not None:
            prompts = input_ids[:, :prompt_length].unflatten(0, (responses, -1))
            if (prompts != prompts[:1]).any():
                raise ValueError(
                    f"the {responses} responses to a video have different prompts: with prompt_length the prompts run "
                    "once. Order the rows as all first responses, then all second ones, or leave prompt_length out."
                )

    def _fill_response(self, sequence, spans, role, responses: int, **kwargs) -> None:
        """Plain visual capture: a first pass of the prompts up to `evidence_layer`, then the spans are filled."""
        prompts = sequence.embeds.shape[0] // responses
        first = sequence.select(rows=prompts)
        states = self._states_entering_layer(
            self.config.evidence_layer,
            first.embeds,
            first.attention_mask,
            first.position_ids,
            video_mask=first.video_mask,
            **kwargs,
        )
        frame_states = first.frame_states(states).repeat(responses, 1, 1)
        sequence.fill_response(frame_states, spans, role, self.embedding_scale)

    def _shared_prefix(self, sequence, spans, role, prompt_length: int, responses: int, **kwargs) -> D2VLMModelOutput:
        """The prompts run once with a cache, all responses run against it; gradients flow through the cache."""
        prompts = sequence.embeds.shape[0] // responses
        prefix = sequence.select(rows=prompts, columns=slice(0, prompt_length))
        # Without the config no layer is a sliding window: responses see exactly what a full pass would show them.
        cache = DynamicCache()
        before = self._run_text_model(
            prefix.embeds,
            prefix.attention_mask,
            prefix.position_ids,
            cache,
            prefix.video_mask if prefix.frames else None,
            **kwargs,
        )
        layer_states = (before.hidden_states[self.config.evidence_layer], before.hidden_states[-2])
        frame_states = frame_evidence_states = None
        if prefix.frames:
            frame_states, frame_evidence_states = (
                prefix.frame_states(states).repeat(responses, 1, 1) for states in layer_states
            )
            if role is not None and self.config.visual_capture:
                sequence.fill_response(frame_states, spans, role, self.embedding_scale)
        for layer in cache.layers:
            layer.keys = layer.keys.repeat(responses, 1, 1, 1)
            layer.values = layer.values.repeat(responses, 1, 1, 1)
        response = sequence.select(columns=slice(prompt_length, None))
        after = self._run_text_model(
            response.embeds, sequence.attention_mask, response.position_ids, cache, None, **kwargs
        )

        def join(prompt_states: torch.Tensor, response_states: torch.Tensor) -> torch.Tensor:
            # the last prompt position predicts the first response token
            return torch.cat([prompt_states[:, -1:].repeat(responses, 1, 1), response_states], dim=1)

        return D2VLMModelOutput(
            last_hidden_state=join(before.last_hidden_state, after.last_hidden_state),
            evidence_states=join(before.hidden_states[-2], after.hidden_states[-2]),
            frame_states=frame_states,
            frame_evidence_states=frame_evidence_states,
            frame_mask=sequence.frame_mask(),
            first_column=prompt_length - 1,
        )

    def _pack(self, outputs, sequence: EmbeddedSequence | None = None, keep_states=None) -> D2VLMModelOutput:
        hidden = outputs.hidden_states
        packed = D2VLMModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            evidence_states=hidden[-2],
            first_column=0,
            past_key_values=outputs.past_key_values,
            hidden_states=hidden if keep_states else None,
            attentions=outputs.attentions,
        )
        if sequence is not None and sequence.frames:
            packed.frame_states = sequence.frame_states(hidden[self.config.evidence_layer])
            packed.frame_evidence_states = sequence.frame_states(hidden[-2])
            packed.frame_mask = sequence.frame_mask()
        return packed


__all__ = ["D2VLMModel", "D2VLMModelOutput", "D2VLMPreTrainedModel"]
