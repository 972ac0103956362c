# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The files that travel with a checkpoint: one flat folder, sibling imports only."""
