# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["d2vlm-hf[train]"]
# ///
"""Factorized preference optimization from one YAML.

    python recipes/fpo.py --config recipes/shapes/fpo.yaml

Any option of the YAML can be overridden on the command line; unknown keys are errors.
"""

from d2vlm_hf.training.run_fpo import main


if __name__ == "__main__":
    main()
