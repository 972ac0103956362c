# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Data: the row schema, the embedded world of moving shapes, importers, perturbations and collators."""
