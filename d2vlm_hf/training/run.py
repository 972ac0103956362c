# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A supervised run from one YAML: `d2vlm sft --config X.yaml`, `python recipes/sft.py --config X.yaml`."""

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import TrlParser

from ..data.shapes import ShapesConfig, generate
from ..data.sources import RenderedShapes, load_rows, shapes_corpus
from ..hub.checkpoint_folder import safe_save
from ..model.pipeline_d2vlm import save_checkpoint
from .configs import D2VLMSFTConfig, DataArguments, ModelArguments
from .scratch import build_from_scratch
from .sft_trainer import D2VLMSFTTrainer
from .warmup import warm_up


logger = logging.getLogger(__name__)

ATTENTION_PROJECTIONS = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")
FULLY_TRAINED = ("connector", "evidence_head", "frame_head", "embed_tokens", "lm_head")


def last_checkpoint(folder: str) -> str | None:
    """The newest complete checkpoint of an earlier run, if there is one.

    The trainer writes its state last: a checkpoint without it is of a run that was killed while it saved.
    """
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-[0-9]*/{TRAINER_STATE_NAME}") if _readable(path)]
    newest = max(complete, key=lambda path: int(path.name.partition("-")[2]), default=None)
    return newest and str(newest)


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        logger.warning("%s is cut off: the checkpoint is passed over.", path)
        return False
    return True


def load_model(arguments: ModelArguments, config):
    """The model and processor that a run starts from; one from nothing goes on with what it saved itself."""
    options = {"revision": arguments.revision, "trust_remote_code": config.trust_remote_code}
    source = arguments.model_name_or_path
    if arguments.scratch is not None:
        source = last_checkpoint(config.output_dir)
        if source is None:
            return build_from_scratch(arguments.scratch, shapes_corpus())
    processor = AutoProcessor.from_pretrained(source, **options)
    if arguments.dtype is not None:
        options["dtype"] = arguments.dtype
    return AutoModelForImageTextToText.from_pretrained(source, **options), processor


def lora_config(model, arguments: ModelArguments):
    """LoRA on the language model's attention, everything the paper trains in full beside it.

    Targets are anchored at the language model: a bare `q_proj` would also hit a vision tower's. Tied output embeddings
    follow the input embeddings and are not listed twice.
    """
    from peft import LoraConfig

    wanted = arguments.lora_target_modules or ATTENTION_PROJECTIONS
    names = [name for name, _ in model.named_modules()]
    present = [p for p in wanted if any(name.endswith(f".{p}") and "language_model" in name for name in names)]
    if not present:
        raise ValueError(
            f"lora_target_modules={list(wanted)} name no projection of {type(model.model.language_model).__name__}. "
            f"Name some of {sorted({n.split('.')[-1] for n in names if 'language_model' in n and n.endswith('proj')})}."
        )
    in_full = [name for name in FULLY_TRAINED if not (name == "lm_head" and model.config.tie_word_embeddings)]
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(map(re.escape, present))})",
        modules_to_save=in_full,
        ensure_weight_tying=model.config.tie_word_embeddings,
    )


def load_training_rows(data: DataArguments, config: D2VLMSFTConfig):
    """The training set of a run: rows, or shapes rendered on the way."""
    if data.shapes is None:
        return load_rows(data.dataset, data.dataset_split, data.video_root)
    if config.max_steps < 1:
        raise ValueError(
            f"max_steps={config.max_steps}: rendered shapes never end, so the run must say when it does. Set it."
        )
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return RenderedShapes(length=config.max_steps * batch, **data.shapes)


def load_evaluation_rows(data: DataArguments, config: D2VLMSFTConfig):
    """The evaluation set of a run, or `None`."""
    if data.eval_shapes is not None:
        folder = Path(config.output_dir) / "eval-shapes"
        generate(ShapesConfig(**data.eval_shapes), folder, num_proc=os.cpu_count() or 1)
        return load_rows(str(folder))
    return load_rows(data.eval_dataset, "validation", data.video_root) if data.eval_dataset else None


def effective_batch(config: D2VLMSFTConfig) -> int:
    """Videos (or rows) that one optimizer step sees, over all processes and accumulation steps."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size


def run_sft(model_arguments: ModelArguments, data: DataArguments, config: D2VLMSFTConfig) -> dict[str, Any]:
    """Train, resuming from the newest checkpoint in the output folder, and save a complete checkpoint folder.

    Returns:
        The metrics of the run: `train_runtime` in seconds, `train_loss`, and those of the last evaluation.
    """
    set_seed(config.seed)
    model, processor = load_model(model_arguments, config)
    if model_arguments.attn_implementation is not None:
        model.set_attn_implementation(model_arguments.attn_implementation)
    if model_arguments.warmup is not None and last_checkpoint(config.output_dir) is None:
        warm_up(model, processor, model_arguments.warmup, config.output_dir, config.seed, config.bf16)
    if model_arguments.use_lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, model_arguments))
    trainer = D2VLMSFTTrainer(
        model=model,
        args=config,
        processing_class=processor,
        train_dataset=load_training_rows(data, config),
        eval_dataset=load_evaluation_rows(data, config),
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.warning("training %.2f M parameters, effective batch %d", trainable / 1e6, effective_batch(config))
    return finish_run(trainer, processor, config, model_arguments.license)


def finish_run(trainer, processor, config, license: str | None = None) -> dict[str, Any]:  # noqa: A002
    """Train from the newest checkpoint if there is one, evaluate, save adapter, merged model, card and metrics."""
    started = time.time()
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or last_checkpoint(config.output_dir))
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    metrics["wall_seconds"] = time.time() - started
    if trainer.is_world_process_zero():
        final = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(final, "merge_and_unload"):
            final.save_pretrained(Path(config.output_dir) / "adapter")
            final = final.merge_and_unload()
        safe_save(lambda folder: save_checkpoint(folder, final, processor), config.output_dir)
        trainer.save_metrics("all", metrics)
        trainer.save_state()
        trainer.create_model_card(**({} if license is None else {"license": license}))
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """`--config X.yaml` and options that override it; unknown keys are errors."""
    logging.basicConfig(format="%(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    parser = TrlParser((ModelArguments, DataArguments, D2VLMSFTConfig), prog="d2vlm sft")
    run_sft(*parser.parse_args_and_config(args=argv))


if __name__ == "__main__":
    main()


__all__ = ["effective_batch", "finish_run", "load_model", "lora_config", "main", "run_sft"]
