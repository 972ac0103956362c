# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""How the original checkpoints name things: their tensors and their `config.json`, translated and accounted for."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import (
    Gemma2Config,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from ..model.configuration_d2vlm import D2VLMConfig


TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "phi3": Phi3Config,
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "gemma2": Gemma2Config,
}
EVIDENCE_TOKENS = ("<evi>", "</evi>", "<video>")
"""What our tokenizers hold; `<video>` stands for the original's placeholder -200, which is no token there."""

EVA_DEPTH = 40
"""Layers of EVA-ViT-g/14; `vision_output_layer` counts from its end, and later layers are never built."""

BERT_VOCABULARY = 30523
"""BERT-base and the `[DEC]` token that the original adds."""

# Prefix there, prefix here, and what changes behind it: the first pattern that matches applies, none: unknown.
_PARTS = [
    (
        "model.vision_tower.vision_tower.",
        "model.vision_tower.",
        [
            (r"cls_token$", "embeddings.class_embedding"),
            (r"pos_embed$", "embeddings.position_embedding"),
            (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
            (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
            (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
            (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
            (r"blocks\.(\d+)\.attn\.[qv]_bias$", r"encoder.layers.\1.self_attn.qkv.bias"),  # two become one
            (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
        ],
    ),
    (
        "model.qformer_bert.bert.",
        "model.connector.qformer.",
        [
            (r"embeddings\.LayerNorm\.", "embeddings.layernorm."),
            (r"(encoder\.layer\.\d+\.\w+)\.self\.", r"\1.attention."),
            (r"", ""),
        ],
    ),
    (
        "model.qformer_",
        "model.connector.",
        [
            (r"query$", "query_tokens"),
            (r"ln\.", "patch_norm."),
            (r"proj\.", "query_out."),
            (r"q_proj\.", "attn_query."),
            (r"k_proj\.", "attn_key."),
            (r"v_proj\.", "attn_value."),
        ],
    ),
    ("model.", "model.language_model.", [(r"(embed_tokens|layers|norm)\.", r"\1.")]),
    ("evi_head.", "evidence_head.", [(r"", "")]),
    ("frm_head.", "frame_head.", [(r"", "")]),
    ("lm_head.", "lm_head.", [(r"", "")]),
]
_LEFT_OUT = [
    (r"\.position_ids$", "a fixed count of positions, not a weight"),
    (r"^model\.qformer_bert\.cls\.", "the Q-Former's language-modelling head, which the model never runs"),
    (r"\.rotary_emb\.inv_freq$", "computed from the config"),
    (r"^vid_head\.", "only used to match <vid> tokens to frames; evidence has a head of its own"),
]


def target_name(name: str) -> str | None:
    """Name of an original tensor in this package, or `None` where no rule knows it.

    The q and v biases of a vision layer's attention give one name: they are fused there.
    """
    for prefix, new_prefix, renames in _PARTS:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            for pattern, replacement in renames:
                if re.match(pattern, rest):
                    return new_prefix + re.sub(f"^{pattern}", replacement, rest)
            return None
    return None


def reason_to_leave_out(name: str) -> str | None:
    """Why an original tensor has no place in this package, or `None` if it has one."""
    return next((reason for pattern, reason in _LEFT_OUT if re.search(pattern, name)), None)


@dataclass
class ConversionReport:
    """What became of every tensor.

    Attributes:
        source: Where the checkpoint came from.
        family: `"d2vlm"`, or `"etchat"` for an E.T. Chat checkpoint, which is a starting point for training.
        text_model: `"phi3"`, `"llama"`, `"qwen2"` or `"gemma2"`.
        kept: Tensors that have the same name here.
        renamed: Original name -> name here.
        merged: Name here -> the original tensors that were put together.
        initialised: Name here -> what a tensor, or some of its rows, was set to.
        left_out: Original name -> why there is no place for it.
        missing: Names here that nothing was found for; a conversion that writes files has none.
        misshaped: Original tensors that do not fit the sizes in `config.json`; likewise.
        unexpected: Original tensors that no rule knows; they are not converted.
        notes: What else was decided.
    """

    source: str = ""
    family: str = "d2vlm"
    text_model: str = ""
    kept: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    merged: dict[str, tuple[str, ...]] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.family} with a {self.text_model} text model"]
        lines.append(
            f"{len(self.kept)} tensors kept, {len(self.renamed)} renamed, {len(self.merged)} merged from several"
        )
        lines += [f"  merged: {line}" for line in _without_numbers(self.merged)]
        lines += [f"  initialised: {line}" for line in _without_numbers(self.initialised.items())]
        lines += [f"  left out: {line}" for line in _without_numbers(self.left_out.items())]
        for title in ("missing", "misshaped", "unexpected"):
            lines += [f"  {title}: {line}" for line in _without_numbers(getattr(self, title))]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _without_numbers(entries: Iterable[str | tuple[str, str]]) -> list[str]:
    """Names, or names with reasons, one line for those that differ in layer numbers only."""
    texts = [entry if isinstance(entry, str) else ": ".join(entry) for entry in entries]
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", text) for text in texts)
    return [f"{text} ({count}x)" if count > 1 else text for text, count in counts.items()]


class TokenIds(NamedTuple):
    """Ids of the special tokens and rows of the embedding matrix that hold them."""

    video: int
    evidence: int
    evidence_end: int
    vocab_size: int


def text_family(source: Mapping[str, Any]) -> str:
    """Which text model an original `config.json` describes: a key of `TEXT_CONFIGS`.

    Raises:
        ValueError: it describes none of them.
    """
    model_type = str(source.get("model_type", ""))
    architecture = re.match(r"ETChat(\w+)ForCausalLM", str((source.get("architectures") or [""])[0]))
    candidates = (
        model_type.removeprefix("etchat_") if model_type.startswith("etchat_") else "",
        architecture[1].lower() if architecture else "",
        source.get("language_model") or "",
    )
    family = next((name for name in candidates if name in TEXT_CONFIGS), None)
    if family is None:
        raise ValueError(
            f"config.json has model_type={model_type!r} and architectures={source.get('architectures')}: that is no "
            f"D2VLM or E.T. Chat checkpoint of its authors (etchat_{', etchat_'.join(TEXT_CONFIGS)}). Pass the "
            "folder that holds such a config.json; a checkpoint of this package needs no conversion."
        )
    return family


def is_etchat(source: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is E.T. Chat's own: nothing in it was trained on evidence."""
    return not source.get("use_evidence") and not any(name.startswith("evi_head.") for name in names)


def _text_config(source: Mapping[str, Any]) -> PreTrainedConfig:
    family = text_family(source)
    config_class = TEXT_CONFIGS[family]
    names = set(config_class.__annotations__) | {"rope_theta", "rope_scaling", "partial_rotary_factor"}
    fields = {name: copy.deepcopy(source[name]) for name in names & set(source)}
    # transformers 4.44 leaves ids that are None out of config.json; today's defaults are not all None.
    fields |= {name: source.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    scaling = fields.get("rope_scaling")
    if scaling and family == "phi3":
        # "su" and "yarn" are what Phi-3 first called it; today's config completes it under its new name only.
        scaling.pop("type", None)
        scaling["rope_type"] = "longrope"
    if family in ("phi3", "qwen2"):
        # The original runs these with eager attention, which had no sliding window in transformers 4.44.
        fields["sliding_window"] = None
        fields.pop("use_sliding_window", None)
    return config_class(**fields)


def _vision_config(source: Mapping[str, Any]) -> InstructBlipVisionConfig:
    tiny = source.get("tiny_vision")
    if tiny is None:
        layer = source.get("vision_output_layer", -2)
        return InstructBlipVisionConfig(num_hidden_layers=layer + 1 if layer >= 0 else EVA_DEPTH + layer + 1)
    return InstructBlipVisionConfig(
        hidden_size=tiny["hidden_size"],
        intermediate_size=int(tiny["hidden_size"] * tiny["mlp_ratio"]),
        num_hidden_layers=tiny["built_layers"],
        num_attention_heads=tiny["num_attention_heads"],
        image_size=tiny["image_size"],
        patch_size=tiny["patch_size"],
    )


def _qformer_config(source: Mapping[str, Any]) -> InstructBlipQFormerConfig:
    tiny = source.get("tiny_qformer")
    if tiny is None:
        return InstructBlipQFormerConfig(vocab_size=BERT_VOCABULARY)  # BERT-base, dropout 0.1 included
    sizes = {name: value for name, value in tiny.items() if name != "num_query_tokens"}
    return InstructBlipQFormerConfig(**{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **sizes})


_ONLY_KNOWN_AS = {
    "vision_tower": "eva_vit",
    "vision_output_token": "patch",
    "mm_projector": "qformer",
    "use_time_tag": False,
}


def translate_config(source: Mapping[str, Any], ids: TokenIds, etchat: bool = False) -> D2VLMConfig:
    """The `D2VLMConfig` of an original `config.json`.

    Where it has no `tiny_vision` and `tiny_qformer` blocks, the sizes are the published ones: EVA-ViT-g/14 at 224 px,
    built as deep as `vision_output_layer` says (39 layers), and BERT-base with 32 queries.

    Args:
        source: The original `config.json`.
        ids (`TokenIds`): See `choose_token_ids`.
        etchat (`bool`): Whether it is E.T. Chat's; its frames attend both ways from here on, as D2VLM is trained,
            whichever stage the checkpoint comes from (the second has `bi_attention: false`).

    Returns:
        `D2VLMConfig`.

    Raises:
        ValueError: a setting that the original model could not be run with, or whose meaning is not known here.
    """
    for name, known in _ONLY_KNOWN_AS.items():
        if source.get(name, known) != known:
            raise ValueError(
                f"config.json has {name}={source[name]!r}: all published checkpoints have {known!r}, and another value "
                "changes what the model reads. Only checkpoints with that value can be converted."
            )
    return D2VLMConfig(
        vision_config=_vision_config(source),
        qformer_config=_qformer_config(source),
        text_config=_resized(_text_config(source), ids.vocab_size),
        num_query_tokens=source.get("tiny_qformer", {}).get("num_query_tokens", 32),
        video_token_id=ids.video,
        evidence_token_id=ids.evidence,
        evidence_end_token_id=ids.evidence_end,
        evidence_decay=float(source.get("alpha", 2.0)),
        consistency_weight=10.0 if source.get("consistency_loss", True) else 0.0,
        frame_attention="bidirectional" if etchat or source.get("bi_attention", True) else "causal",
        architectures=["D2VLMForConditionalGeneration"],
    )


def _resized(config: PreTrainedConfig, vocab_size: int) -> PreTrainedConfig:
    config.vocab_size = vocab_size
    return config


def choose_token_ids(
    source: Mapping[str, Any], etchat: bool, tokenizer: PreTrainedTokenizerBase | None = None
) -> TokenIds:
    """Ids of `<video>`, `<evi>` and `</evi>`.

    The tokenizer decides where there is one: tokens that it lacks are added to it. Without one, `<evi>` and `</evi>`
    are where `config.json` says, and `<video>` is the last row of the embedding matrix if that lies above them (they
    were the last tokens added, so what lies above pads the matrix), else a new row; E.T. Chat gets three new rows.

    Args:
        source: The original `config.json`.
        etchat (`bool`): Whether it is E.T. Chat's.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The checkpoint's tokenizer; what it lacks is added in place.

    Returns:
        `TokenIds`; `vocab_size` is at least that of `config.json`.

    Raises:
        ValueError: no ids in `config.json`, or others than in the tokenizer.
    """
    rows = source.get("vocab_size")
    if not rows:
        raise ValueError(
            f"config.json has vocab_size={rows}: without the rows of the embedding matrix the tokens cannot be placed. "
            "Take config.json from the folder that the trained model was saved to."
        )
    stated = (source.get("evidence_token_id"), source.get("evidence_end_token_id"))
    if not etchat and None in stated:
        raise ValueError(
            f"config.json has evidence_token_id={stated[0]} and evidence_end_token_id={stated[1]}: a checkpoint "
            "trained on evidence needs both. Take the ids of <evi>, </evi> from its tokenizer and write them there."
        )
    if tokenizer is not None:
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in EVIDENCE_TOKENS if token not in known], special_tokens=True)
        evidence, evidence_end, video = tokenizer.convert_tokens_to_ids(list(EVIDENCE_TOKENS))
        if not etchat and (evidence, evidence_end) != stated:
            raise ValueError(
                f"the tokenizer has <evi>, </evi> at {(evidence, evidence_end)} and config.json at {stated}: they are "
                "not of one checkpoint. Pass the tokenizer that was saved with the weights."
            )
    elif etchat:
        evidence, evidence_end, video = rows, rows + 1, rows + 2
    else:
        evidence, evidence_end = stated
        named = [source.get(f"{name}_token_id") for name in ("bos", "eos", "pad", "match")]
        used = {*(i for value in named for i in (value if isinstance(value, list) else [value]))}
        padded = rows - 1 > max(stated) and rows - 1 not in used
        video = rows - 1 if padded else max(rows, max(stated) + 1)
    return TokenIds(video, evidence, evidence_end, max(rows, evidence + 1, evidence_end + 1, video + 1))


__all__ = [
    "BERT_VOCABULARY",
    "EVA_DEPTH",
    "EVIDENCE_TOKENS",
    "TEXT_CONFIGS",
    "ConversionReport",
    "TokenIds",
    "choose_token_ids",
    "is_etchat",
    "reason_to_leave_out",
    "target_name",
    "text_family",
    "translate_config",
]
