# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["d2vlm-hf[train,eval]"]
# ///
"""Evaluation from one YAML: predictions, metrics, blind controls, a table.

    python recipes/evaluate.py --config recipes/shapes/evaluate.yaml
    python recipes/evaluate.py --compare sft/results.json fpo/results.json

A killed run continues where it stopped. Any option of the YAML can be overridden on the command line.
"""

from d2vlm_hf.evaluation.run import main


if __name__ == "__main__":
    main()
