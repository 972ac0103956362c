# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the entry-point group `lmms_eval.models` loads: the name of the model and where its class is."""

from typing import Any


def manifest() -> Any:
    """Describe the model for the harness, without importing it.

    Returns:
        `lmms_eval.models.registry_v2.ModelManifest`: the model `d2vlm`.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="d2vlm", simple_class_path="d2vlm_hf.lmms_plugin.wrapper.D2VLM")


__all__ = ["manifest"]
