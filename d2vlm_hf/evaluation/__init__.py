# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics, answer parsing under three protocols, and the benchmarks."""
