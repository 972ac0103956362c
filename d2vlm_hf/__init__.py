# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Temporally grounded video-language models (D2VLM) for the Hugging Face ecosystem.

Importing the package registers its classes with transformers' auto classes and the task "video-grounding" with
`pipeline`. Names that need `trl`, `peft`, `datasets` or `matplotlib` are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .bundled import bundled_checkpoint, bundled_clip


if TYPE_CHECKING:
    from .evaluation.run import evaluate
    from .hub.convert import convert_checkpoint
    from .model.configuration_d2vlm import D2VLMConfig
    from .model.modeling_d2vlm import D2VLMForConditionalGeneration, D2VLMModel
    from .model.pipeline_d2vlm import VideoGroundingPipeline
    from .model.processing_d2vlm import D2VLMProcessor
    from .model.video_processing_d2vlm import D2VLMVideoProcessor
    from .training.configs import D2VLMSFTConfig
    from .training.fpo_config import FPOConfig
    from .training.fpo_trainer import FPOTrainer
    from .training.sft_trainer import D2VLMSFTTrainer

__version__ = "0.1.0"

TASK = "video-grounding"

# Public name -> the module that defines it, imported at first use (PEP 562).
_LAZY = {
    "D2VLMConfig": ".model.configuration_d2vlm",
    "D2VLMForConditionalGeneration": ".model.modeling_d2vlm",
    "D2VLMModel": ".model.modeling_d2vlm",
    "D2VLMProcessor": ".model.processing_d2vlm",
    "D2VLMSFTConfig": ".training.configs",
    "D2VLMSFTTrainer": ".training.sft_trainer",
    "D2VLMVideoProcessor": ".model.video_processing_d2vlm",
    "FPOConfig": ".training.fpo_config",
    "FPOTrainer": ".training.fpo_trainer",
    "VideoGroundingPipeline": ".model.pipeline_d2vlm",
    "convert_checkpoint": ".hub.convert",
    "evaluate": ".evaluation.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}."
        )
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Registers the classes with transformers' auto classes and the "video-grounding" task; repeating it is harmless.

    Called on import. The modules it needs stand on ones that `from transformers import AutoModel, pipeline` has loaded
    already, which is why they are imported here and not at first use: the registries accept only classes.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from .model.configuration_d2vlm import D2VLMConfig
    from .model.modeling_d2vlm import D2VLMForConditionalGeneration
    from .model.pipeline_d2vlm import VideoGroundingPipeline
    from .model.processing_d2vlm import D2VLMProcessor
    from .model.video_processing_d2vlm import D2VLMVideoProcessor

    AutoConfig.register(D2VLMConfig.model_type, D2VLMConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(D2VLMConfig, D2VLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(D2VLMConfig, D2VLMProcessor, exist_ok=True)
    # One class serves both backends: it needs no torchvision and is the same where torchvision is installed.
    backends = {"torchvision": D2VLMVideoProcessor, "pil": D2VLMVideoProcessor}
    AutoVideoProcessor.register(D2VLMConfig, video_processor_classes=backends, exist_ok=True)

    if TASK in PIPELINE_REGISTRY.supported_tasks:
        return  # registering a task twice logs a warning
    PIPELINE_REGISTRY.register_pipeline(
        TASK,
        pipeline_class=VideoGroundingPipeline,
        pt_model=AutoModelForImageTextToText,
        default={"model": (bundled_checkpoint(), "main")},
        type="multimodal",
    )
    # What a saved pipeline writes into config.json; the default is a path of this machine and stays out of it.
    implementation = PIPELINE_REGISTRY.supported_tasks[TASK]
    VideoGroundingPipeline._registered_impl = {TASK: {k: v for k, v in implementation.items() if k != "default"}}


register()


__all__ = [
    "D2VLMConfig",
    "D2VLMForConditionalGeneration",
    "D2VLMModel",
    "D2VLMProcessor",
    "D2VLMSFTConfig",
    "D2VLMSFTTrainer",
    "D2VLMVideoProcessor",
    "FPOConfig",
    "FPOTrainer",
    "VideoGroundingPipeline",
    "__version__",
    "bundled_checkpoint",
    "bundled_clip",
    "convert_checkpoint",
    "evaluate",
    "register",
]
