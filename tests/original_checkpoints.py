# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layout of the original's authors, for the tests of the conversion.

All stand on the golden tiny checkpoint (`tests/golden/phi3_tiny`): its vision tower, Q-Former and heads, and either its
own Phi-3 text model or a random one of another family, of the same width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from golden_batches import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM, LlamaForCausalLM, Phi3ForCausalLM, PreTrainedModel, Qwen2ForCausalLM


VOCABULARY, HIDDEN, LAYERS = 120, 64, 8
TEXT_PREFIXES = ("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")

# Text settings as transformers 4.44 writes them into config.json.
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "phi3": (Phi3ForCausalLM, {"sliding_window": 8, "tie_word_embeddings": False}),
    "llama": (LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "qwen2": (Qwen2ForCausalLM, {"sliding_window": 8, "use_sliding_window": False, "tie_word_embeddings": True}),
    "gemma2": (
        Gemma2ForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "hidden_activation": "gelu_pytorch_tanh",
        },  # tied, which 4.44 does not write where it is the default
    ),
}


def golden_config() -> dict[str, Any]:
    return json.loads((GOLDEN / "checkpoint" / "config.json").read_text())


def golden_tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "checkpoint" / "model.safetensors")


def write_original(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """Write `model.safetensors` and `config.json`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(golden_config() if config is None else config))
    return folder


def text_model(family: str) -> PreTrainedModel:
    """A random text model of transformers with eager attention; matrices large enough to be felt."""
    model_class, own = FAMILIES[family]
    settings = {**TEXT, **own, "sliding_window": own.get("sliding_window") if family == "gemma2" else None}
    model = model_class._from_config(model_class.config_class(**settings), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def family_checkpoint(folder: Path, family: str) -> tuple[Path, PreTrainedModel]:
    """A checkpoint of a family in the authors' layout, and the text model inside it."""
    text = text_model(family)
    tensors = {name: t for name, t in golden_tensors().items() if not name.startswith(TEXT_PREFIXES)}
    own = {name: t for name, t in text.state_dict().items() if name.startswith(TEXT_PREFIXES)}
    if text.config.tie_word_embeddings:
        del own["lm_head.weight"]
    config = {k: v for k, v in golden_config().items() if k not in ("sliding_window", "tie_word_embeddings")}
    config |= {**TEXT, **FAMILIES[family][1]}
    config |= {
        "model_type": f"etchat_{family}",
        "language_model": family,
        "architectures": [f"ETChat{family.capitalize()}ForCausalLM"],
    }
    return write_original(folder, tensors | own, config), text


def etchat_parts(stage: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The golden checkpoint as E.T. Chat's: stage 2 has no heads, stage 3 has the two of its matching."""
    tensors = golden_tensors()
    config = {k: v for k, v in golden_config().items() if not k.startswith("evidence_")}
    config |= {"use_evidence": False, "use_matching": stage == 3, "bi_attention": stage == 3}
    config = {k: v for k, v in config.items() if k not in ("consistency_loss", "arch_module", "use_evidence")}
    for name in [name for name in tensors if name.startswith(("evi_head.", "frm_head."))]:
        tensor = tensors.pop(name)
        if stage == 3:
            tensors[name.replace("evi_head.", "vid_head.")] = tensor
    if stage == 3:
        config["match_token_id"] = 110
    return tensors, config
