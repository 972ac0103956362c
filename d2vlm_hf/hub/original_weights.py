# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the original checkpoints tensor by tensor: whole or in shards, safetensors or pickled, or a LoRA over a base.

Nothing is loaded before it is asked for: safetensors and pickled files are memory-mapped, and a LoRA is merged into one
weight at a time.
"""

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open


ADAPTER_CONFIG = "adapter_config.json"
_WHOLE = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_PARTIAL = ("pytorch_model.safetensors", "non_lora_trainables.bin")
"""Beside an adapter: the parts that were trained in full. The first is the authors' name, the second is LLaVA's."""

_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_PLAIN = {"peft_type": "LORA", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
"""Settings of a LoRA that is `W + alpha / r * B A` and nothing else."""


class Weights(Protocol):
    """Tensors by their original names.

    Attributes:
        shapes: Shape of every tensor.
        replaced: Tensors of a base model that the adapter's folder has a newer version of.
    """

    shapes: dict[str, tuple[int, ...]]
    replaced: list[str]

    def load(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored."""

    def origin(self, name: str) -> tuple[str, ...]:
        """What a tensor was put together from: its own name, and those of a LoRA that was merged into it."""


class FileWeights:
    """The tensors of some safetensors or pickled files.

    Args:
        files (`list[Path]`): Together they hold every tensor once.

    Raises:
        ValueError: a file that cannot be read, or that holds something else than tensors by name.
    """

    def __init__(self, files: list[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.replaced: list[str] = []
        self._holders: dict[str, Any] = {}
        for file in files:
            holder = self._open(file)
            for name in holder.keys():  # noqa: SIM118 - a safetensors handle is no dict
                is_dict = isinstance(holder, dict)
                self.shapes[name] = tuple(holder[name].shape if is_dict else holder.get_slice(name).get_shape())
                self._holders[name] = holder

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            if file.suffix == ".safetensors":
                return safe_open(file, framework="pt")
            holder = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{file} cannot be read as weights ({str(error).splitlines()[0][:200]}): it is damaged, or holds more "
                "than tensors, which is never loaded. Download it again, or save its tensors as safetensors."
            ) from error
        holder = holder.get("state_dict", holder) if isinstance(holder, dict) else holder
        if not isinstance(holder, dict) or not all(isinstance(value, torch.Tensor) for value in holder.values()):
            raise ValueError(
                f"{file} does not hold tensors by name: weights are expected, not a training state. Pass the folder "
                "that the trained model was saved to."
            )
        return holder

    def load(self, name: str) -> torch.Tensor:
        holder = self._holders[name]
        return holder[name] if isinstance(holder, dict) else holder.get_tensor(name)

    def origin(self, name: str) -> tuple[str, ...]:
        return (name,)


class AdapterWeights:
    """A base model under a LoRA adapter and the parts that were trained in full: `W + alpha / r * B A`.

    Args:
        base (`Weights`): The model that was adapted.
        trained (`list[Weights]`): Adapter and fully trained parts; a later one wins.
        config: The adapter's `adapter_config.json`; empty without a LoRA.

    Raises:
        ValueError: an adapter of another kind, or one for weights that the base lacks.
    """

    def __init__(self, base: Weights, trained: list[Weights], config: Mapping[str, Any]):
        self._check_kind(config)
        self._config = config
        self.shapes = dict(base.shapes)
        self._homes = {name: (base, name) for name in base.shapes}
        self.replaced: list[str] = []
        factors: dict[str, dict[str, tuple[Weights, str]]] = {}
        for weights in trained:
            for stored in weights.shapes:
                name = plain_name(stored)
                part = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
                if part:
                    factors.setdefault(f"{part[1]}.weight", {})[part[2]] = (weights, stored)
                elif "lora_" in name:
                    raise ValueError(
                        f"the adapter holds {stored!r}: only pairs lora_A, lora_B of linear layers can be merged here. "
                        "Merge it with peft's merge_and_unload() and convert the merged model."
                    )
                else:
                    if name in base.shapes:
                        self.replaced.append(name)
                    self.shapes[name], self._homes[name] = weights.shapes[stored], (weights, stored)
        self._factors = {name: (pair["A"], pair["B"]) for name, pair in factors.items() if len(pair) == 2}
        wrong = [name for name in factors if name not in self._factors or not self._fits(name)]
        if wrong:
            raise ValueError(
                f"the adapter changes {len(wrong)} weights that the base model does not have in that shape, such as "
                f"{', '.join(wrong[:5])}: it belongs to another base. Pass the model it was trained on as base_model."
            )

    @staticmethod
    def _check_kind(config: Mapping[str, Any]) -> None:
        wrong = {name: config[name] for name, plain in _PLAIN.items() if config.get(name) not in (plain, None)}
        if wrong:
            raise ValueError(
                f"{ADAPTER_CONFIG} has {wrong}: only plain LoRA can be merged here. Merge it with peft's "
                "merge_and_unload() and convert the merged model."
            )

    def _fits(self, name: str) -> bool:
        (a, a_name), (b, b_name) = self._factors[name]
        rank, columns = a.shapes[a_name]
        return self.shapes.get(name) == (b.shapes[b_name][0], columns) and b.shapes[b_name][1] == rank

    def load(self, name: str) -> torch.Tensor:
        weights, stored = self._homes[name]
        tensor = weights.load(stored)
        if name not in self._factors:
            return tensor
        a, b = (source.load(factor).float() for source, factor in self._factors[name])
        rank = a.shape[0]
        scale = self._config["lora_alpha"] / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
        return (tensor.float() + scale * (b @ a)).to(tensor.dtype)

    def origin(self, name: str) -> tuple[str, ...]:
        weights, stored = self._homes[name]
        return (*weights.origin(stored), *(factor for _, factor in self._factors.get(name, ())))


def plain_name(name: str) -> str:
    """A tensor's name in the model itself, without what peft puts around it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _shards(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json"):
        return [file]
    shards = [file.parent / name for name in sorted(set(json.loads(file.read_text())["weight_map"].values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise ValueError(
            f"{file} lists {', '.join(absent)}, not found beside it: the checkpoint is incomplete. Download the rest."
        )
    return shards


def fetch(source: str | Path) -> Path:
    """The local folder of a checkpoint; a repo id is downloaded, and its pickled weights only if it has no others.

    Args:
        source (`str` or `Path`): A folder, or an id such as `owner/name`.

    Raises:
        ValueError: neither a folder nor a repository that can be had.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=[*_SIDE_FILES, "*.safetensors", _PARTIAL[1]]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(source), allow_patterns=["*model*.bin"])
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{source} is no folder here, and no repository that can be had from the Hub: there is nothing to convert. "
            "Pass the folder that holds config.json and the weights, or an id such as owner/name."
        ) from error
    return folder


def open_weights(folder: Path, base_model: str | Path | None = None) -> tuple[dict[str, Any], Weights]:
    """`config.json` and the weights of a checkpoint folder, a LoRA merged.

    Args:
        folder (`Path`): Holds a whole model, or an adapter and the parts that were trained in full.
        base_model (`str` or `Path`, *optional*): What an adapter was trained on; default: the folder that it names.

    Raises:
        ValueError: no weights, no `config.json`, or a base that is not there.
    """
    whole, adapter, partial = (_first(folder, names) for names in (_WHOLE, _ADAPTER, _PARTIAL))
    config_file, adapter_config_file = folder / "config.json", folder / ADAPTER_CONFIG
    absent = None
    if not (whole or adapter or partial):
        absent = f"none of {', '.join((*_WHOLE, *_ADAPTER, *_PARTIAL))}"
    elif adapter and not adapter_config_file.is_file():
        absent = f"{adapter.name} without {ADAPTER_CONFIG}"
    elif not (adapter or partial or config_file.is_file()):
        absent = "no config.json"
    if absent:
        raise ValueError(
            f"{folder} holds {absent}: it is no checkpoint that can be converted. Pass the folder that the trained "
            "model was saved to."
        )
    own = json.loads(config_file.read_text()) if config_file.is_file() else {}
    if not (adapter or partial):
        return own, FileWeights(_shards(whole))
    adapter_config = json.loads(adapter_config_file.read_text()) if adapter else {}
    named = base_model or own.get("model_name_or_path") or adapter_config.get("base_model_name_or_path")
    if base_model is None and not (named and Path(named).is_dir()):
        raise ValueError(
            f"{folder} was trained from {named!r}, which is no folder here: its adapter cannot be merged without the "
            "base model. Pass base_model, a folder or a repo id."
        )
    base_config, base = open_weights(fetch(named))
    trained = [FileWeights([file]) for file in (adapter, partial) if file is not None]
    return own or base_config, AdapterWeights(base, trained, adapter_config)


__all__ = ["ADAPTER_CONFIG", "AdapterWeights", "FileWeights", "Weights", "fetch", "open_weights", "plain_name"]
