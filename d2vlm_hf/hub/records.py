# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""What a card keeps of a run so that it can be repeated: the record of the run and its curves."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any


PACKAGES = ("d2vlm_hf", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "huggingface_hub")
RECORD_FILE = "run_record.json"  # beside the card of a run
HIDDEN = "TOKEN"  # stands in a shown command for a token of the user

# an absolute path inside a text: not the `//` of a URL and not the `/` of a relative path
_ABSOLUTE = re.compile(r"(?<![\w./\\-])(?:~?/(?!/)|[A-Za-z]:[\\/](?![\\/]))[^\s'\",;:=\[\]{}()]*")
_SECRET = re.compile(r"\bhf_\w{4,}")
_SECRET_OPTION = re.compile(r"^--?(?:hub[-_])?token$")


@dataclass(frozen=True)
class RunRecord:
    """One training run, as far as it is known; what is None is left out of the card.

    Args:
        stage (`str`): What was trained: "SFT", "FPO" or another name.
        command (`str`, *optional*): The command line, without machine paths and tokens.
        git_commit (`str`, *optional*): Commit of the working tree, with "-dirty" if it held changes.
        config_hash (`str`, *optional*): First 16 hex digits of the SHA-256 of the configuration.
        dataset_fingerprint (`str`, *optional*): Fingerprint of the training data.
        seed (`int`, *optional*): Random seed.
        device (`str`, *optional*): What it ran on.
        wall_time_s (`float`, *optional*): Duration in seconds.
        effective_batch (`int`, *optional*): Samples per optimizer step, over all processes and accumulation steps.
        versions (`Mapping[str, str]`): Version of Python and of each library.
        reference_free (`bool`, *optional*): For a preference run: whether it had no reference model. None for others.
    """

    stage: str
    command: str | None = None
    git_commit: str | None = None
    config_hash: str | None = None
    dataset_fingerprint: str | None = None
    seed: int | None = None
    device: str | None = None
    wall_time_s: float | None = None
    effective_batch: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    reference_free: bool | None = None

    def rows(self) -> list[tuple[str, str]]:
        """Return name and value of every known fact, in the order in which a card lists them."""
        facts = {
            "Commit": self.git_commit and f"`{self.git_commit}`",
            "Configuration (SHA-256)": self.config_hash and f"`{self.config_hash}`",
            "Data fingerprint": self.dataset_fingerprint and f"`{self.dataset_fingerprint}`",
            "Seed": self.seed,
            "Device": self.device,
            "Wall time": None if self.wall_time_s is None else describe_seconds(self.wall_time_s),
            "Effective batch": self.effective_batch,
            "Versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
        }
        return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


@dataclass(frozen=True)
class CurveLog:
    """One curve of a run, such as a loss.

    Args:
        name (`str`): What the curve shows.
        steps (`Sequence[int]`): Optimizer steps.
        values (`Sequence[float]`): One value per step.

    Raises:
        ValueError: If there are not as many values as steps.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(
                f"Curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; every value belongs "
                "to one step. Log both together."
            )


def write_run_record(record: RunRecord, folder: str | os.PathLike[str]) -> Path:
    """Keep what is known of a run beside its card, as `run_record.json`.

    Args:
        record (`RunRecord`): The run.
        folder (`str`): Folder of the card.

    Returns:
        `Path`: The file; what is not known is left out of it.
    """
    known = {name: value for name, value in asdict(record).items() if value not in (None, {})}
    path = Path(folder) / RECORD_FILE
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_run_record(facts: Mapping[str, Any]) -> RunRecord:
    """Return the record of a run from the content of its file.

    Args:
        facts (`Mapping`): What `run_record.json` holds.

    Returns:
        `RunRecord`: The record.

    Raises:
        ValueError: If a fact is none that a record has, or the stage is missing.
    """
    known = [item.name for item in fields(RunRecord)]
    if not isinstance(facts, Mapping) or "stage" not in facts or set(facts) - set(known):
        raise ValueError(f"{facts!r} is no record of a run: it has a stage, and of other facts only {known[1:]}.")
    return RunRecord(**facts)


def describe_seconds(seconds: float) -> str:
    """Return a duration as people say it.

    Args:
        seconds (`float`): Duration in seconds.

    Returns:
        `str`: Such as "1 h 02 min" or "12.5 s".
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def strip_paths(text: str, root: str | os.PathLike[str] | None = None) -> str:
    """Take machine paths and tokens out of a text: paths under `root` become relative, others keep their last part.

    Args:
        text (`str`): A command, or any value of a configuration.
        root (`str`, *optional*): Folder that stands for the project.

    Returns:
        `str`: The text without absolute paths; URLs are left as they are.
    """

    def shorten(path: str) -> str:
        kind = PureWindowsPath if re.match(r"[A-Za-z]:", path) else PurePosixPath
        if root is not None and kind is PurePosixPath and PurePosixPath(path).is_relative_to(Path(root).as_posix()):
            return str(PurePosixPath(path).relative_to(Path(root).as_posix()))
        return kind(path).name or path

    text = _SECRET.sub(HIDDEN, text.replace("file:///", "/"))
    head, separator, tail = text.partition("=")
    for before, whole in (("", text), (head + separator, tail)):  # all of it is one path, perhaps with spaces
        if re.match(r"~?/(?!/)|[A-Za-z]:[\\/]", whole) and not re.search(r"[\s,;:=]~?/", whole):
            return before + shorten(whole)
    return _ABSOLUTE.sub(lambda match: shorten(match[0]), text)


def collect_run_record(
    stage: str,
    *,
    command: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    root: str | os.PathLike[str] | None = None,
    device: str | None = None,
    packages: Sequence[str] = PACKAGES,
    **facts: Any,
) -> RunRecord:
    """Collect what is known of the run of this process.

    Args:
        stage (`str`): "SFT", "FPO" or another name.
        command (`Sequence[str]`, *optional*): Command line in words, by default that of this process.
        config (`Mapping`, *optional*): Configuration of the run, to be hashed.
        root (`str`, *optional*): Working tree of the project, by default the current folder.
        device (`str`, *optional*): Type of the device ("cpu", "cuda", "mps"), by default the best that torch finds.
        packages (`Sequence[str]`): Libraries whose versions are noted, where installed.
        **facts: Further fields of [`RunRecord`]: `seed`, `wall_time_s`, `effective_batch`, `dataset_fingerprint`,
            `reference_free`.

    Returns:
        `RunRecord`: The record; it names no path of this machine and no token.
    """
    root = Path(root or Path.cwd())
    command = _own_command() if command is None else command
    return RunRecord(
        stage=stage,
        command=describe_command(command, root),
        git_commit=_git_commit(root),
        config_hash=None if config is None else hash_config(config, root),
        device=describe_device(device),
        versions=_versions(packages),
        **facts,
    )


def _own_command() -> list[str]:
    """Command line of this process; empty for `python -c` and an interactive session, which nobody could repeat."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and sys.argv[:1] == [module.origin]:  # `python -m`, whose `sys.argv` has the path of a file
        return ["python", "-m", module.name.removesuffix(".__main__"), *sys.argv[1:]]
    return [] if sys.argv[:1] in (["-c"], [""]) else sys.argv


def describe_command(words: Sequence[str], root: str | os.PathLike[str] | None = None) -> str | None:
    """Return a command line that can be shown: no machine paths, no tokens.

    Args:
        words (`Sequence[str]`): Program and arguments.
        root (`str`, *optional*): Folder that stands for the project.

    Returns:
        `str`: The command, quoted for a shell, or None if there are no words.
    """
    shown, secret = [], False
    for word in words:
        option, separator, _ = word.partition("=")
        if _SECRET_OPTION.match(option) and separator:
            word = f"{option}={HIDDEN}"
        shown.append(HIDDEN if secret else strip_paths(word, root))
        secret = bool(_SECRET_OPTION.match(word))
    if shown and PurePath(shown[0]).suffix == ".py":
        shown.insert(0, "python")
    elif shown and PurePath(shown[0]).parent.name in ("bin", "Scripts"):  # installed, in whatever environment
        shown[0] = PurePath(shown[0]).name
    return shlex.join(shown) or None


def hash_config(config: Mapping[str, Any], root: str | os.PathLike[str] | None = None) -> str:
    """Return a hash that is the same for equal configurations, whatever the order of keys and the machine's paths.

    Args:
        config (`Mapping`): The configuration; values that JSON does not know count as their text.
        root (`str`, *optional*): Folder that stands for the project.

    Returns:
        `str`: 16 hex digits.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        return strip_paths(str(value), root)

    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]


def describe_device(device: str | None = None) -> str:
    """Return what a run has for a device.

    Args:
        device (`str`, *optional*): "cpu", "cuda" or "mps"; by default the best that torch finds.

    Returns:
        `str`: Such as "1 x NVIDIA H100 80GB HBM3" or "CPU (x86_64, 2 cores)".
    """
    import torch

    kind = (device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0]
    if kind == "cuda":
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return f"{count} x {torch.cuda.get_device_name(0)}"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)" if kind == "cpu" else kind


def _git_commit(root: Path) -> str | None:
    """Commit of the working tree, or None outside of one and where git is not installed."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changed = commit and git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:
        return None
    return f"{commit}-dirty" if changed else commit


def _versions(packages: Sequence[str]) -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def plot_curves(curves: Sequence[CurveLog], path: str | os.PathLike[str]) -> Path | None:
    """Draw curves over steps into a picture, if matplotlib is installed.

    Args:
        curves (`Sequence[CurveLog]`): The curves; those without values are left out.
        path (`str`): The picture, PNG or SVG by its ending.

    Returns:
        `Path`: The picture, or None if there is nothing to draw or nothing to draw with.
    """
    drawn = [curve for curve in curves if len(curve.steps)]
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for curve in drawn:
        axes.plot(curve.steps, curve.values, label=curve.name, marker="o" if len(curve.steps) == 1 else None)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return Path(path)


__all__ = [
    "RECORD_FILE",
    "CurveLog",
    "RunRecord",
    "collect_run_record",
    "describe_command",
    "describe_device",
    "describe_seconds",
    "hash_config",
    "plot_curves",
    "read_run_record",
    "strip_paths",
    "write_run_record",
]
