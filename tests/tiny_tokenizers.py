# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers of the kinds that text models have, trained on a few sentences; the same at every call.

Each knows `<video>`, `<evi>`, `</evi>` and the turn tokens of Phi-3 as special tokens, after its words.
"""

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, BertTokenizer, LlamaTokenizer, PreTrainedTokenizerFast


EVIDENCE_TOKENS = ("<video>", "<evi>", "</evi>")
TURN_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SPECIAL_TOKENS = (*TURN_TOKENS, *EVIDENCE_TOKENS)
SENTENCES = (
    "You are a helpful AI assistant.",
    "When does the man open the door?",
    "What happens in the video, and when does it happen?",
    "The man opens the door at 12.0s - 15.0s and again at 40.0s - 43.0s.",
    "A red ball appears, moves to the left and touches the blue square.",
    "The green circle grows; the yellow triangle shrinks and disappears.",
    "How many times does the person jump? Answer with a number: 1, 2, 3, 4, 5, 6, 7, 8, 9 or 0.",
    "Describe all events of the video, one after the other (with their times).",
)


def _add_special_tokens(tokenizer, tokens: Sequence[str], rstrip: bool = False):
    """Phi-3's own turn tokens swallow the white space behind them (`rstrip`)."""
    added = [AddedToken(t, rstrip=rstrip and t in TURN_TOKENS, normalized=False, special=True) for t in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


def build_sentencepiece_tokenizer(
    folder: Path, add_prefix_space: bool, special_tokens: Sequence[str] = SPECIAL_TOKENS, rstrip: bool = False
) -> LlamaTokenizer:
    """A Llama-style tokenizer from a SentencePiece model that is trained in `folder`; it begins texts with `<s>`.

    Args:
        folder (`Path`): Where `tokenizer.model` is written.
        add_prefix_space (`bool`): Whether a text that begins with a word is read as if a space stood before it.
        special_tokens (sequence of `str`): Added after the words.
        rstrip (`bool`): Whether the turn tokens swallow the white space behind them, as Phi-3's do.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for sentence in SENTENCES for line in (sentence, f"{sentence}\n")]),
        model_prefix=str(Path(folder) / "tokenizer"),
        model_type="bpe",
        vocab_size=220,
        hard_vocab_limit=False,
        user_defined_symbols=["\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # In a BPE model every piece is a merge of two earlier ones; the order of the pieces is the order of the merges.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[3:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=add_prefix_space, pad_token="</s>")
    return _add_special_tokens(tokenizer, special_tokens, rstrip)


def build_bpe_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS, end_token: str = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as Qwen and Phi have: no begin token, no prefix space, every text can be written."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=360, initial_alphabet=alphabet, special_tokens=[end_token], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end_token, pad_token=end_token)
    return _add_special_tokens(wrapped, special_tokens)


def build_wordpiece_qformer_tokenizer(vocabulary: Path | Sequence[str] | None = None) -> BertTokenizer:
    """An uncased BERT tokenizer for the Q-Former's text, which is cut on the left at 256 tokens.

    Args:
        vocabulary (`Path` or sequence of `str`, *optional*): Words by id; default: those of `SENTENCES`.
    """
    if vocabulary is None:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!:;()-"
        words = sorted({word for s in SENTENCES for word in s.lower().replace("?", " ").replace(".", " ").split()})
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
        vocabulary += [word for word in words if word.isalpha() and len(word) > 1]
    elif isinstance(vocabulary, Path):
        vocabulary = vocabulary.read_text().splitlines()
    ids = {word: i for i, word in enumerate(vocabulary)}
    return BertTokenizer(vocab=ids, truncation_side="left", model_max_length=256)
