# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What the larger commands of the command line do; `cli.py` reads their arguments and prints what they return."""
