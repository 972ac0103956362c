# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["d2vlm-hf[train]"]
# ///
"""Factorized preference data from one YAML.

    python recipes/make_preferences.py --config recipes/shapes/preferences.yaml

Any option of the YAML can be overridden on the command line; unknown keys are errors.
"""

from d2vlm_hf.data.build import main


if __name__ == "__main__":
    main()
