# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""From the original checkpoints of D2VLM and E.T. Chat to this package's format, with every tensor accounted for."""

import copy
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..model.chat_templates_d2vlm import CHAT_TEMPLATES
from ..model.configuration_d2vlm import D2VLMConfig
from ..model.modeling_d2vlm import D2VLMForConditionalGeneration
from ..model.pipeline_d2vlm import complete_checkpoint
from ..model.processing_d2vlm import D2VLMProcessor
from ..model.video_processing_d2vlm import D2VLMVideoProcessor
from .card_data import ConvertedCardInfo
from .cards import render_converted_card
from .key_maps import (
    ConversionReport,
    choose_token_ids,
    is_etchat,
    reason_to_leave_out,
    target_name,
    text_family,
    translate_config,
)
from .original_weights import Weights, fetch, open_weights
from .records import collect_run_record, strip_paths


logger = logging.getLogger(__name__)

SHARD_BYTES = 10**9
"""Size of a written shard; at most one is in memory, and none where dtypes stay as they are stored."""

QFORMER_VOCABULARY = "qformer_vocab.txt"
"""WordPiece vocabulary beside a checkpoint, used when no `qformer_tokenizer` is given."""

_EMBEDDINGS, _LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_OLD_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will write.

    Attributes:
        config: The model's configuration.
        sources: Every tensor to write -> the original tensors it is made from; none: it is initialised.
        shapes: Shape of every tensor to write.
        new_rows: Token ids whose rows of the embeddings and the head are set to the mean of the rows before them.
        report: What becomes of every tensor.
    """

    config: D2VLMConfig
    sources: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    new_rows: tuple[int, ...]
    report: ConversionReport


def plan_conversion(
    source: Mapping[str, Any], weights: Weights, tokenizer: PreTrainedTokenizerBase | None = None
) -> ConversionPlan:
    """Decide what becomes of every tensor, from names and shapes alone.

    Args:
        source: The original `config.json`.
        weights (`Weights`): The original tensors; none is loaded.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The checkpoint's tokenizer; special tokens that it lacks are
            added in place.

    Returns:
        `ConversionPlan`; look at `report.missing` and `report.misshaped` before using it.

    Raises:
        ValueError: a `config.json` that cannot be translated.
    """
    etchat = is_etchat(source, weights.shapes)
    report = ConversionReport(family="etchat" if etchat else "d2vlm", text_model=text_family(source))
    rows = source["vocab_size"]
    ids = choose_token_ids(source, etchat, tokenizer)
    config = translate_config(source, ids, etchat)
    new_rows = set(range(rows, ids.vocab_size)) | ({ids.evidence, ids.evidence_end} if etchat else set())
    with torch.device("meta"):
        state = D2VLMForConditionalGeneration(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tied = config.tie_word_embeddings
    if tied:
        del shapes[_LM_HEAD]
    sources = _match_tensors(weights, shapes, tied, report)
    _check_shapes(weights, sources, shapes, rows, report)
    _initialise_the_rest(sources, shapes, etchat, report)
    for name in (_EMBEDDINGS, _LM_HEAD):
        if new_rows and name in shapes:
            report.initialised[name] = f"rows {_ranges(new_rows)}: the mean of the rows before them (new tokens)"
    report.left_out |= {f"{name} (base model)": "the adapter's folder has a newer one" for name in weights.replaced}
    report.notes += _notes(source, ids, etchat, config)
    return ConversionPlan(config, sources, shapes, tuple(sorted(new_rows)), report)


def _match_tensors(
    weights: Weights, shapes: Mapping, tied: bool, report: ConversionReport
) -> dict[str, tuple[str, ...]]:
    """Every original tensor finds its place, or is listed with the reason why it has none."""
    found: dict[str, list[str]] = {}
    for name in weights.shapes:
        reason, target = reason_to_leave_out(name), target_name(name)
        if reason is None and tied and name == _LM_HEAD:
            reason = "tied to the embeddings"
        if reason:
            report.left_out[name] = reason
        elif target is None:
            report.unexpected.append(name)
        elif target not in shapes:
            report.misshaped.append(f"{name}: config.json describes a model without such a part")
        else:
            found.setdefault(target, []).append(name)
    # q_bias comes before v_bias, as in the fused bias
    sources = {target: tuple(sorted(names)) for target, names in found.items()}
    for target, names in sources.items():
        parts = tuple(part for name in names for part in weights.origin(name))
        if len(parts) > 1:
            report.merged[target] = parts
        elif names[0] == target:
            report.kept.append(target)
        else:
            report.renamed[names[0]] = target
    return sources


def _check_shapes(weights: Weights, sources: Mapping, shapes: Mapping, rows: int, report: ConversionReport) -> None:
    for target, names in sources.items():
        wanted = shapes[target]
        if target in (_EMBEDDINGS, _LM_HEAD):
            wanted = (rows, *wanted[1:])
        elif target.endswith(".qkv.bias"):
            wanted = (wanted[0] // 3,)
            absent = {"attn.q_bias", "attn.v_bias"} - {".".join(name.split(".")[-2:]) for name in names}
            report.missing += [f"{names[0].rsplit('.attn.', 1)[0]}.{name}" for name in sorted(absent)]
        for name in names:
            if weights.shapes[name] != wanted:
                report.misshaped.append(f"{name}: {weights.shapes[name]}, where config.json says {wanted}")


def _initialise_the_rest(sources: dict, shapes: Mapping, etchat: bool, report: ConversionReport) -> None:
    for target in shapes:
        if target in sources:
            continue
        if target.startswith("model.vision_tower.post_layernorm."):
            report.initialised[target] = "identity; the original has no such norm, and its place is never reached"
        elif etchat and target.startswith(("evidence_head.", "frame_head.")):
            report.initialised[target] = "as in a new model; E.T. Chat has no such head"
        else:
            report.missing.append(target)
            continue
        sources[target] = ()


def _notes(source: Mapping[str, Any], ids, etchat: bool, config: D2VLMConfig) -> list[str]:
    notes = [f"<video> is token {ids.video}, <evi> {ids.evidence}, </evi> {ids.evidence_end}, of {ids.vocab_size} rows"]
    if config.tie_word_embeddings:
        notes.append("lm_head.weight is the embedding matrix (tied)")
    window = source.get("sliding_window") if source.get("use_sliding_window", True) else None
    if window and getattr(config.text_config, "sliding_window", None) is None:
        notes.append(
            f"the sliding window of {window} tokens is off: the original attends to everything (eager attention of "
            "transformers 4.44 knew no window for this model)"
        )
    if etchat:
        notes.append("an E.T. Chat checkpoint: nothing in it was trained on evidence, so fine-tune it before use")
        if not source.get("bi_attention", True):
            notes.append("its frames attended backwards only (bi_attention); from here on they attend both ways")
        if source.get("match_token_id") is not None:
            notes.append(f"its <vid> (token {source['match_token_id']}) keeps its row and has no meaning here")
    return notes


def _ranges(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"


def convert_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    qformer_tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    base_model: str | Path | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """Convert a checkpoint of the D2VLM or E.T. Chat authors into a folder that `from_pretrained` loads.

    Their Phi-3, Llama, Qwen2 and Gemma2 models are known, whole or in shards, as safetensors or pickled, or as a LoRA
    adapter, which is merged. Everything is checked before anything is written, and written shard by shard.

    Args:
        src (`str` or `Path`): Folder or repo id of the original.
        dst (`str` or `Path`): Folder to write.
        tokenizer (tokenizer, `str` or `Path`, *optional*): The text model's; default: what `src` has.
        qformer_tokenizer (tokenizer, `str` or `Path`, *optional*):
            The Q-Former's (BERT-base, uncased); default: the `qformer_vocab.txt` that `src` may have.
        dtype (`torch.dtype` or `str`, *optional*): Of the written weights; default: as they are stored.
        base_model (`str` or `Path`, *optional*): What an adapter was trained on; default: the folder that it names.
        overwrite (`bool`, defaults to `False`): Replace a model in `dst`.

    Returns:
        `ConversionReport`; print it to see what became of every tensor.

    Raises:
        ValueError: a checkpoint that is incomplete, damaged or of another model; a folder that is in use.
    """
    folder, dst = fetch(src), Path(dst)
    _check_destination(folder, dst, overwrite)
    dtype = _as_dtype(dtype)
    source, weights = open_weights(folder, base_model)
    tokenizer, qformer_tokenizer = _load_tokenizers(folder, tokenizer, qformer_tokenizer)
    plan = plan_conversion(source, weights, tokenizer)
    report = plan.report
    report.source = str(src)
    _check_complete(report)
    _check_tied(plan, weights)
    if report.unexpected:
        logger.warning("%d tensors are known to no rule and were not converted: %s", *_listed(report.unexpected))
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=f".{dst.name}-") as staging:
        plan.config.dtype = _write_weights(plan, weights, Path(staging), dtype)
        plan.config.save_pretrained(staging)
        processor = _save_processor(Path(staging), source, plan, tokenizer, qformer_tokenizer)
        _save_generation_config(Path(staging), folder, plan.config, processor)
        if processor is not None:
            complete_checkpoint(staging, processor)
            write_card(Path(staging), dst.name, report)
        _move_into(Path(staging), dst)
    return report


def _check_destination(folder: Path, dst: Path, overwrite: bool) -> None:
    if dst.exists() and (not dst.is_dir() or dst.resolve() == folder.resolve()):
        raise ValueError(
            f"{dst} is the source or no folder: the converted model needs one of its own. Pass another dst."
        )
    if dst.is_dir() and any(dst.iterdir()) and not overwrite:
        raise ValueError(f"{dst} already holds files, so nothing was written. Pass another dst, or overwrite=True.")


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is None or dtype in known.values():
        return dtype
    if dtype not in known:
        raise ValueError(f"dtype={dtype!r} is none that weights are kept in here. Pass one of {', '.join(known)}.")
    return known[dtype]


def _listed(names: list[str], limit: int = 30) -> tuple[int, str]:
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return len(names), ", ".join(names[:limit]) + rest


def _check_complete(report: ConversionReport) -> None:
    problems = []
    if report.missing:
        problems.append("{} tensors are missing: {}".format(*_listed(report.missing)))
    if report.misshaped:
        problems.append("{} tensors do not fit: {}".format(*_listed(report.misshaped)))
    if problems:
        unknown = "; {} are known to no rule: {}".format(*_listed(report.unexpected)) if report.unexpected else ""
        raise ValueError(
            f"{report.source} does not hold the model that its config.json describes: {'; '.join(problems)}{unknown}. "
            "Nothing was written. Download the whole checkpoint, and check that config.json belongs to it."
        )


def _check_tied(plan: ConversionPlan, weights: Weights) -> None:
    if not plan.config.tie_word_embeddings or _LM_HEAD not in weights.shapes:
        return
    (embeddings,) = plan.sources[_EMBEDDINGS]
    if not torch.equal(weights.load(embeddings), weights.load(_LM_HEAD)):
        raise ValueError(
            "lm_head.weight differs from the embeddings, but config.json ties them (tie_word_embeddings): only one of "
            "the two can be meant. Set tie_word_embeddings to false there, or remove lm_head.weight."
        )


def _load_tokenizers(folder: Path, tokenizer, qformer_tokenizer) -> tuple:
    """Tokenizers as objects, or `None`; the text model's is a copy, since tokens may be added to it."""
    if tokenizer is None and any((folder / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer = folder
    if isinstance(tokenizer, str | Path):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    vocabulary = folder / QFORMER_VOCABULARY
    if isinstance(qformer_tokenizer, str | Path):
        qformer_tokenizer = AutoTokenizer.from_pretrained(qformer_tokenizer)
    elif qformer_tokenizer is None and vocabulary.is_file():
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        qformer_tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    return copy.deepcopy(tokenizer), qformer_tokenizer


def _write_weights(plan: ConversionPlan, weights: Weights, folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    """Write `model.safetensors`, or shards and their index; returns the dtype of the embeddings."""
    generator = torch.Generator().manual_seed(0)
    (embeddings,) = plan.sources[_EMBEDDINGS]
    main_dtype = dtype or weights.load(embeddings).dtype
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for target in tqdm(plan.shapes, desc="Converting", unit="tensor"):
        tensor = _make_tensor(plan, target, weights, generator)
        tensor = tensor.to(dtype or (tensor.dtype if plan.sources[target] else main_dtype)).contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[target] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(names) > 1 else ["model.safetensors"]
    for index, name in enumerate(names):
        (folder / f"{index}.safetensors").rename(folder / name)
    if len(names) > 1:
        index = {target: name for name, targets in zip(names, shards, strict=True) for target in targets}
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return main_dtype


def _make_tensor(plan: ConversionPlan, target: str, weights: Weights, generator: torch.Generator) -> torch.Tensor:
    names = plan.sources[target]
    if not names:
        return _initial(target, plan, generator)
    if target.endswith(".qkv.bias"):
        query, value = (weights.load(name) for name in names)
        return torch.cat([query, torch.zeros_like(query), value])
    tensor = weights.load(names[0])
    if target in (_EMBEDDINGS, _LM_HEAD) and plan.new_rows:
        grown = tensor.new_empty(plan.shapes[target])
        grown[: len(tensor)] = tensor
        grown[list(plan.new_rows)] = tensor[: plan.new_rows[0]].float().mean(0).to(tensor.dtype)
        return grown
    return tensor


def _initial(target: str, plan: ConversionPlan, generator: torch.Generator) -> torch.Tensor:
    """Values of a new tensor, as transformers initialises: normal matrices, zero biases, norms that change nothing."""
    shape = plan.shapes[target]
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * plan.config.text_config.initializer_range
    return torch.zeros(shape) if target.endswith("bias") else torch.ones(shape)


def _save_processor(folder: Path, source: Mapping, plan: ConversionPlan, tokenizer, qformer_tokenizer):
    """The processor, where both tokenizers are there; else what there is of it."""
    if tokenizer is None or qformer_tokenizer is None:
        lacking = "tokenizer" if tokenizer is None else "qformer_tokenizer (BERT-base uncased)"
        plan.report.notes.append(f"no processor was written: pass {lacking}")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if qformer_tokenizer is not None:
            qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
        return None
    size = plan.config.vision_config.image_size
    processor = D2VLMProcessor(
        D2VLMVideoProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer,
        qformer_tokenizer,
        chat_template=CHAT_TEMPLATES.get(source.get("conv_type")),
    )
    return processor


def _save_generation_config(
    folder: Path, original: Path, config: D2VLMConfig, processor: D2VLMProcessor | None
) -> None:
    """Greedy decoding that stops where the original stops, at the end of the turn too."""
    file = original / "generation_config.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    text = config.text_config
    ends = stored.get("eos_token_id", text.eos_token_id)
    ends = list(ends) if isinstance(ends, list) else [ends]
    if processor is not None and processor.chat_template:
        ends.append(processor.end_of_turn_id)
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    pad = text.pad_token_id if text.pad_token_id is not None else next(iter(ends), None)
    end = ends[0] if len(ends) == 1 else ends or None
    GenerationConfig(bos_token_id=text.bos_token_id, pad_token_id=pad, eos_token_id=end).save_pretrained(folder)


def write_card(folder: Path, name: str, report: ConversionReport) -> None:
    """Write the card, without which nothing can be pushed; the paper's figures stand beside D2VLM-Phi3 alone.

    Args:
        folder (`Path`): Folder of the converted checkpoint.
        name (`str`): What the checkpoint is called.
        report (`ConversionReport`): Of the conversion.
    """
    record = collect_run_record("conversion", command=["d2vlm", "convert", report.source, name])
    card = render_converted_card(
        ConvertedCardInfo(
            repo_id=name,
            source=f"`{strip_paths(report.source)}`",
            base_model=report.source,
            run=replace(record, git_commit=None, device=None),
            notes=[re.sub(r"</?\w+>", r"`\g<0>`", note) for note in report.notes],  # tokens are no HTML
            figures=(report.family, report.text_model) == ("d2vlm", "phi3"),
        )
    )
    card.save(folder / "README.md")


def _move_into(staging: Path, dst: Path) -> None:
    dst.mkdir(exist_ok=True)
    for pattern in _OLD_WEIGHTS:
        for old in dst.glob(pattern):
            old.unlink()
    for file in staging.iterdir():
        target = dst / file.name
        if target.is_dir():
            shutil.rmtree(target)
        shutil.move(file, target)


__all__ = ["ConversionPlan", "ConversionReport", "convert_checkpoint", "plan_conversion", "write_card"]
