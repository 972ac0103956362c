# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder: what must be in it, what of it belongs on the Hub, and how it is saved whole or not at all."""

import errno
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports


# what this folder was last pushed to; stays on this machine
RECORD = ".d2vlm_push.json"
# left on this machine: records, caches, videos, and what only resuming a training run needs (pickles among them)
LOCAL_ONLY = (
    RECORD,
    ".git/*",
    ".cache/*",
    "*__pycache__/*",
    "*.pyc",
    ".DS_Store",
    "checkpoint-*/*",
    "eval-shapes/*",
    "warmup-*",
    "*events.out.tfevents.*",
    "global_step*/*",
    "optimizer.*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "training_args.bin",
    "trainer_state.json",
)
# files that would be loaded instead of, or beside, those of a newer save or push
STALE = ("model*.safetensors", "adapter_model*", "*.safetensors.index.json", "pytorch_model*.bin*", "*.py")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PIPELINE_TASK = "video-grounding"


def check_folder(folder: str | os.PathLike[str]) -> list[str]:
    """Check that a folder is a checkpoint that a stranger can load.

    Args:
        folder (`str`): Folder of the checkpoint, or of a PEFT adapter.

    Returns:
        `list[str]`: What is missing, though it keeps nobody from loading.

    Raises:
        ValueError: If something is missing or broken, naming all of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder, so there is nothing to push. Give the folder of a saved checkpoint.")
    adapter = (folder / "adapter_config.json").is_file()
    faults = _adapter_faults(folder) if adapter else _model_faults(folder)
    card = _card_metadata(folder, faults)
    if faults:
        raise ValueError(
            f"{folder} is no complete checkpoint: {'; '.join(faults)}. Who downloads it could not use it. Save model, "
            "processor and pipeline into the folder (`pipeline.save_pretrained`) and write its card to README.md."
        )
    warnings = []
    if not any((folder / name).is_file() for name in ("LICENSE", "LICENSE.txt", "LICENSE.md")):
        warnings.append(f"there is no LICENSE file; the card says {card.get('license')!r}")
    return warnings


def list_files(folder: str | os.PathLike[str]) -> list[str]:
    """List the files of a checkpoint folder that belong on the Hub.

    Args:
        folder (`str`): Folder of the checkpoint.

    Returns:
        `list[str]`: Sorted relative paths, without records, caches and the state of the trainer.
    """
    folder = Path(folder)
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(fnmatch.fnmatch(path, kind) for kind in LOCAL_ONLY))


def is_stale(path: str) -> bool:
    """Tell whether a file that an older save or push left would be loaded instead of, or beside, the new ones.

    Args:
        path (`str`): Relative path.

    Returns:
        `bool`: True for weights and code.
    """
    return any(fnmatch.fnmatch(path, kind) for kind in STALE)


def known_licence(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Read the licence from the card of a checkpoint folder.

    Args:
        folder (`str`): The folder; a Hub id counts as a folder that is not there.

    Returns:
        `dict`: `license`, `license_name` and `license_link`, as far as the card names them.
    """
    card = _card_metadata(Path(folder), [])
    names = ("license", "license_name", "license_link")
    return {name: card[name] for name in names if card.get(name)} if card.get("license") else {}


def safe_save(save: Callable[[Path], Any], folder: str | os.PathLike[str]) -> Path:
    """Save into a folder so that it holds either all of the new files or the old ones.

    The files are written to a folder beside it, which then takes its place. What the old folder held beside them (such
    as earlier checkpoints of a run) is kept, but no old weights and code. One process at a time may save to a folder.

    Args:
        save (`Callable[[Path], Any]`): Writes the files into the folder that it is given, such as `save_pretrained`.
        folder (`str`): Where they shall be.

    Returns:
        `Path`: The folder.

    Raises:
        OSError: If the disk is full; the old folder is as it was.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    previous = folder.with_name(f".{folder.name}.previous")
    _settle(folder, previous)
    with _Partial(folder) as partial:
        save(partial)
        if folder.exists():
            os.replace(folder, previous)
        os.replace(partial, folder)
    _settle(folder, previous)
    return folder


class _Partial:
    """The folder beside `folder` that is written first; it is gone afterwards, whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.with_name(f".{folder.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.path, ignore_errors=True)  # of a process that was killed
        self.path.mkdir()
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        # safetensors and tokenizers name the error of the system in their text only
        full = [errno.ENOSPC, errno.EDQUOT, errno.EFBIG]
        if getattr(error, "errno", None) in full or re.search(rf"os error ({'|'.join(map(str, full))})\)", str(error)):
            free = shutil.disk_usage(self.folder.parent).free
            raise OSError(
                errno.ENOSPC,
                f"{self.folder} could not be saved: there is no room for it ({free:,} bytes are free, and a limit on "
                "the size of files may be lower). What was there before is unchanged. Make room and save again",
            ) from error


def _settle(folder: Path, previous: Path) -> None:
    """Take what the new folder has no file for out of the old one; also after a save that was killed in between."""
    if not previous.exists():
        return
    if not folder.exists():
        os.replace(previous, folder)
        return
    for entry in previous.iterdir():
        if not (folder / entry.name).exists() and not is_stale(entry.name):
            os.replace(entry, folder / entry.name)
    shutil.rmtree(previous)


def _model_faults(folder: Path) -> list[str]:
    """List what a model folder lacks."""
    faults: list[str] = []
    config = _read_json(folder / "config.json", faults)
    processor = _read_json(folder / "processor_config.json", faults)
    _read_json(folder / "tokenizer_config.json", faults)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        faults.append("there is no tokenizer (tokenizer.json)")
    index = folder / "model.safetensors.index.json"
    shards = set(_read_json(index, faults).get("weight_map", {}).values()) if index.exists() else {"model.safetensors"}
    for name in sorted(shards):
        _check_weights(folder / name, faults)
    for name, part in (("config.json", config), ("processor_config.json", processor)):
        if part and not part.get("auto_map"):
            faults.append(f"{name} has no auto_map, so it would load with the package only")
    if config and PIPELINE_TASK not in (config.get("custom_pipelines") or {}):
        faults.append(f"config.json has no custom_pipelines entry for {PIPELINE_TASK!r}")
    for name in sorted(_code_files(folder, config, processor)):
        if not (folder / name).is_file():
            faults.append(f"the code file {name} is missing")
    return faults


def _adapter_faults(folder: Path) -> list[str]:
    """List what a folder with a PEFT adapter lacks."""
    faults: list[str] = []
    base = _read_json(folder / "adapter_config.json", faults).get("base_model_name_or_path") or ""
    if Path(base).is_absolute() or (base and Path(base).exists()):
        faults.append(f"adapter_config.json names {base!r} on this machine as its base model; put its Hub id there")
    _check_weights(folder / "adapter_model.safetensors", faults)
    return faults


def _read_json(path: Path, faults: list[str]) -> dict[str, Any]:
    value = None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            faults.append(f"{path.name} holds no JSON object")
    except FileNotFoundError:
        faults.append(f"{path.name} is missing")
    except ValueError as error:  # no JSON, or no text
        faults.append(f"{path.name} is no JSON ({error})")
    return value if isinstance(value, dict) else {}


def _check_weights(path: Path, faults: list[str]) -> None:
    """Read the header of a safetensors file, which knows how long the file must be."""
    try:
        with safe_open(path, "np"):
            return
    except FileNotFoundError:
        faults.append(f"{path.name} is missing")
    except SafetensorError as error:
        faults.append(f"{path.name} is broken ({error})")


def _code_files(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> set[str]:
    """Name the code files that the configurations point at, and the siblings that those import."""
    parts = [config, processor, *(part for part in processor.values() if isinstance(part, dict))]
    maps = [part.get("auto_map") or {} for part in parts]
    maps += [{"impl": task["impl"]} for task in (config.get("custom_pipelines") or {}).values()]
    values = [value for found in maps for value in found.values()]
    classes = [name for value in values for name in ([value] if isinstance(value, str) else value)]
    # "owner/name--module.Class" lies in another repository
    waiting = [name.split(".")[0] for name in classes if name and "--" not in name]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen and (folder / f"{name}.py").is_file():
            waiting += get_relative_imports(folder / f"{name}.py")
        seen.add(name)
    return {f"{name}.py" for name in seen}


def _card_metadata(folder: Path, faults: list[str]) -> dict[str, Any]:
    """Read the metadata of the card, which must name a licence."""
    path = folder / "README.md"
    if not path.is_file():
        faults.append("the card README.md is missing")
        return {}
    try:
        metadata = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        faults.append(f"the metadata of README.md cannot be read ({' '.join(str(error).split())})")
        return {}
    if not metadata.get("license"):
        faults.append("the card README.md names no licence")
    return metadata


__all__ = ["RECORD", "STALE", "check_folder", "is_stale", "known_licence", "list_files", "safe_save"]
