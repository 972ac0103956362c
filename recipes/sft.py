# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
# /// script
# dependencies = ["d2vlm-hf[train]"]
# ///
"""Supervised fine-tuning from one YAML.

    python recipes/sft.py --config recipes/shapes/sft.yaml
    accelerate launch recipes/sft.py --config recipes/d2vlm-phi3/sft.yaml

Any option of the YAML can be overridden on the command line; unknown keys are errors. A killed run resumes from its
newest checkpoint when the same command is given again.
"""

from d2vlm_hf.training.run import main


if __name__ == "__main__":
    main()
