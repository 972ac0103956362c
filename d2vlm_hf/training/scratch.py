# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A model from nothing: small tokenizers learned from a corpus, and weights drawn at random."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..model.configuration_d2vlm import D2VLMConfig
from ..model.modeling_d2vlm import D2VLMForConditionalGeneration
from ..model.processing_d2vlm import D2VLMProcessor
from ..model.video_processing_d2vlm import D2VLMVideoProcessor


PAD, END = "<|endoftext|>", "<|end|>"
SPECIAL_TOKENS = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<video>", "<evi>", "</evi>"]
SYSTEM_FREE_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'video' -%}{{ '<video>' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
"""The Phi-3 turns without system text and line breaks: a small model need not learn to skip them."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the text model; any text can be written with it.

    Args:
        texts (iterable of `str`): Corpus.
        vocab_size (`int`): Tokens at most, 256 bytes and the special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((text.replace("<evi>", "") for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens=SPECIAL_TOKENS[2:]
    )


def train_qformer_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer for the Q-Former, `[CLS] text [SEP]`: words, and letters to fall back on;
    punctuation is left out.

    The vocabulary is counted here: the library's WordPiece trainer gives other ids at every run.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
    # letters of options and punctuation name nothing that could be seen, and every token costs time in every frame
    unseen = normalizers.Replace(Regex(r"\([A-D]\)|[^\w\s]"), " ")
    normalizer = normalizers.Sequence([unseen, normalizers.BertNormalizer(lowercase=True)])
    splitter = pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)) if len(word) > 1
    )
    ranked = sorted(words, key=lambda word: (-words[word], word))
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *ranked][:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


QUIET = 0.1  # of what tokens hold, as long as their places decide


def add_neighbour_heads(
    model: D2VLMForConditionalGeneration, layers: int, offsets: Sequence[int] = (-1, 1, -2, 2), strength: float = 5.0
) -> None:
    """Let heads of the first layers attend to the token `offset` places away, through the biases of queries and keys.

    Which way something moves is the difference of two frames. With rotary positions and random weights attention does
    not know its neighbours, and finding that out takes a small model longer than all the rest.

    Args:
        model (`D2VLMForConditionalGeneration`): Changed in place.
        layers (`int`): So many layers of the text model, from the first.
        offsets (`Sequence[int]`): One head for each, from the first.
        strength (`float`): Of the biases; 0 changes nothing.

    Raises:
        ValueError: If the text model has no such biases, or fewer heads than offsets.
    """
    text = model.config.text_config
    angles = model.model.language_model.rotary_emb.inv_freq.float()  # (D / 2,), per place
    if len(offsets) > text.num_attention_heads:
        raise ValueError(
            f"neighbour_heads has {len(offsets)} offsets for {text.num_attention_heads} heads: each takes one. Give "
            "fewer offsets."
        )
    half, shared = len(angles), text.num_attention_heads // text.num_key_value_heads
    for layer in model.model.language_model.layers[:layers]:
        query, key = layer.self_attn.q_proj, layer.self_attn.k_proj
        if query.bias is None or key.bias is None:
            raise ValueError(
                f"neighbour_heads needs biases of queries and keys, which {text.model_type!r} has not. Use 'qwen2', or "
                "leave it out."
            )
        with torch.no_grad():  # the score of places m, n is the sum of strength^2 * cos(angle * (m + offset - n))
            key.bias.view(-1, 2, half)[:, 0] = strength
            for head, offset in enumerate(offsets):
                turn = torch.stack([(offset * angles).cos(), (offset * angles).sin()])
                query.bias.view(-1, 2, half)[head] = strength * turn
                query.weight.view(-1, 2 * half, text.hidden_size)[head] *= QUIET
            key.weight.view(-1, 2 * half, text.hidden_size)[: -(-len(offsets) // shared)] *= QUIET


def build_from_scratch(
    spec: Mapping[str, Any], corpus: Iterable[str]
) -> tuple[D2VLMForConditionalGeneration, D2VLMProcessor]:
    """A model with random weights and its processor.

    Args:
        spec: Options of the parts: `vision`, `qformer`, `text` (with `model_type`), `model` (of `D2VLMConfig`),
            `processor` (of `D2VLMVideoProcessor`), `vocab_size`, `qformer_vocab_size`, `neighbour_heads` (of
            [`add_neighbour_heads`]).
        corpus (iterable of `str`): Texts that the tokenizers learn from.

    Raises:
        ValueError: an unknown part, naming it.
    """
    known = {"vision", "qformer", "text", "model", "processor", "vocab_size", "qformer_vocab_size", "neighbour_heads"}
    if unknown := set(spec) - known:
        raise ValueError(
            f"scratch has unknown parts {sorted(unknown)}: it describes a model to build. Use {sorted(known)}."
        )
    texts = list(corpus)
    tokenizer = train_tokenizer(texts, spec.get("vocab_size", 1024))
    qformer_tokenizer = (
        train_qformer_tokenizer(texts, spec.get("qformer_vocab_size", 512)) if "qformer" in spec else None
    )
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    text = {"model_type": "qwen2", "vocab_size": len(tokenizer), "pad_token_id": ids[PAD], "bos_token_id": None}
    config = D2VLMConfig(
        vision_config={"model_type": "instructblip_vision_model", **spec["vision"]},
        qformer_config={"vocab_size": len(qformer_tokenizer), **spec["qformer"]} if "qformer" in spec else None,
        text_config={**text, "eos_token_id": ids[END], **spec["text"]},
        connector_type="qformer" if "qformer" in spec else "mlp",
        video_token_id=ids["<video>"],
        evidence_token_id=ids["<evi>"],
        evidence_end_token_id=ids["</evi>"],
        **spec.get("model", {}),
    )
    model = D2VLMForConditionalGeneration(config)
    if "neighbour_heads" in spec:
        add_neighbour_heads(model, **spec["neighbour_heads"])
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = ids[PAD]
    size = config.vision_config.image_size
    video_processor = D2VLMVideoProcessor(
        **{"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, **spec.get("processor", {})}
    )
    return model, D2VLMProcessor(video_processor, tokenizer, qformer_tokenizer, chat_template=SYSTEM_FREE_TEMPLATE)


__all__ = [
    "SYSTEM_FREE_TEMPLATE",
    "add_neighbour_heads",
    "build_from_scratch",
    "train_qformer_tokenizer",
    "train_tokenizer",
]
