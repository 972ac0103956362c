# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Plug-in for the harness lmms-eval: the model `d2vlm`, found by its entry point, and a task on shapes."""
