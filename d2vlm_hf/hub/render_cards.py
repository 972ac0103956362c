# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The cards of `hub_cards/`, each rendered from the facts in its folder: `python -m d2vlm_hf.hub.render_cards`.

`facts.json` of a folder says which card it is and has the fields of its dataclass (`card_data.py`). Where a field is a
long story, it names a file beside it: `runs` and `run` records of runs, `results` evaluations, `rows` what a data set
holds, `facts` what a checkpoint is, `example_output` an answer. `--take` fetches these from what runs have written.
"""

import argparse
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from huggingface_hub import RepoCard
from safetensors import safe_open

from ..bundled import bundled_clip
from .card_data import ConvertedCardInfo, DatasetCardInfo, Example, ModelCardInfo, slug
from .cards import render_converted_card, render_dataset_card, render_model_card, write_eval_results
from .measured import results_of_evaluation, summarise
from .records import RECORD_FILE, read_run_record


logger = logging.getLogger(__name__)

CARDS = "hub_cards"
FACTS_FILE, ROWS_FILE, MODEL_FILE, RESULTS_FILE, EXAMPLE_FILE = (
    f"{name}.json" for name in ("facts", "rows", "model", "results", "example")
)
KINDS = {
    "model": (ModelCardInfo, render_model_card),
    "converted": (ConvertedCardInfo, render_converted_card),
    "dataset": (DatasetCardInfo, render_dataset_card),
}
PICTURES = ("loss_picture", "timeline_picture")
ROWS_FIELDS = ("splits", "tasks", "kinds", "examples")


def missing_files(folder: str | os.PathLike[str]) -> list[str]:
    """List the files that the facts of a card name and that are not there yet.

    Args:
        folder (`str`): Folder of the card.

    Returns:
        `list[str]`: Their names.

    Raises:
        ValueError: If the folder has no facts.
    """
    facts = _read(Path(folder) / FACTS_FILE)
    named = [*facts.get("runs", ()), *(entry["file"] for entry in facts.get("results", ()))]
    named += [facts.get(name) for name in ("run", "rows", "facts", "example_output", *PICTURES)]
    return [name for name in named if isinstance(name, str) and not (Path(folder) / name).is_file()]


def load_card(folder: str | os.PathLike[str]) -> tuple[ModelCardInfo | ConvertedCardInfo | DatasetCardInfo, RepoCard]:
    """Read the facts of a card and render it.

    Args:
        folder (`str`): Folder of the card.

    Returns:
        `tuple`: The facts, and the card.

    Raises:
        ValueError: If facts are missing, or are none that such a card has.
    """
    folder = Path(folder)
    if missing := missing_files(folder):
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its {FACTS_FILE} names. Fetch them with --take.")
    facts = _read(folder / FACTS_FILE)
    kind = facts.pop("card", None)
    if kind not in KINDS:
        raise ValueError(f"{folder / FACTS_FILE} has card={kind!r}. Use one of {', '.join(KINDS)}.")
    facts = {name: _fetched(folder, name, value) for name, value in facts.items()}
    facts |= _rows_facts(facts.pop("rows", None))
    info_class, render = KINDS[kind]
    known = {item.name: item.default is MISSING and item.default_factory is MISSING for item in fields(info_class)}
    unknown = [name for name in facts if name not in known]
    lacking = [name for name, needed in known.items() if needed and name not in facts]
    if unknown or lacking:
        raise ValueError(
            f"{folder / FACTS_FILE} has facts that no {kind} card has: {unknown}, and lacks {lacking}. There are "
            f"{', '.join(known)}."
        )
    info = info_class(**facts)
    return info, render(info)


def render(folder: str | os.PathLike[str], target: str | os.PathLike[str] | None = None) -> list[Path]:
    """Render a card into its folder, or into that of a checkpoint.

    Args:
        folder (`str`): Folder of the card.
        target (`str`, *optional*): Folder of a checkpoint; it also gets the pictures, the example video and the
            licence, so that it can be pushed.

    Returns:
        `list[Path]`: The files written.

    Raises:
        ValueError: If facts are missing, or are none that such a card has.
    """
    folder = Path(folder)
    info, card = load_card(folder)
    into = Path(target or folder)
    into.mkdir(parents=True, exist_ok=True)
    card.save(into / "README.md")
    written = [into / "README.md", *write_eval_results(into, getattr(info, "results", ()))]
    if target is not None:
        sources = [folder / name for picture in PICTURES if (name := getattr(info, picture, None))]
        clip, licence = Path(bundled_clip()), folder.parent.parent / "LICENSE"
        sources += [clip] if getattr(info, "example_video", None) == clip.name else []
        sources += [licence] if licence.is_file() and info.license == "apache-2.0" else []
        written += [Path(shutil.copy(source, into)) for source in sources]
    return written


def take(folder: str | os.PathLike[str], source: str | os.PathLike[str]) -> list[Path]:
    """Fetch facts for a card from what a run has written.

    Args:
        folder (`str`): Folder of the card.
        source (`str`): Folder of a training run, of an evaluation or of a data set that was made; a `results.json`; or
            the answer that `d2vlm ground --json` printed.

    Returns:
        `list[Path]`: The files written.

    Raises:
        ValueError: If there is nothing to take.
    """
    folder, source, written = Path(folder), Path(source), {}
    file = source / RESULTS_FILE if source.is_dir() else source
    content = _read(file) if file.is_file() else {}
    if "model" in content:
        written[RESULTS_FILE] = summarise(content)
    elif "answer" in content:
        written[EXAMPLE_FILE] = {name: value for name, value in content.items() if name not in ("video", "question")}
    pictures = {}
    if (source / RECORD_FILE).is_file():
        record = read_run_record(_read(source / RECORD_FILE))
        stage = slug(record.stage)
        written[f"run-{stage}.json"] = _read(source / RECORD_FILE)
        pictures = {"loss_curves.png": f"loss-{stage}.png", "timeline.png": "timeline.png"}
    if (source / "config.json").is_file():
        written[MODEL_FILE] = describe_checkpoint(source)
    if parquet := sorted(source.glob("data/*.parquet")):
        written[ROWS_FILE] = _describe_rows(parquet)
    if not written:
        raise ValueError(
            f"{source} has nothing for a card: neither {RECORD_FILE} of a run, nor {RESULTS_FILE} of an evaluation, "
            "nor data/*.parquet, nor is it an answer of `d2vlm ground --json`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    copied = [shutil.copy(source / name, folder / new) for name, new in pictures.items() if (source / name).is_file()]
    return [*(folder / name for name in written), *map(Path, copied)]


def describe_checkpoint(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Say of what size and parts a checkpoint is, without loading it.

    Args:
        folder (`str`): Folder of the checkpoint.

    Returns:
        `dict[str, str]`: Name and value, as a card lists them.
    """
    folder, count = Path(folder), 0
    config, processor = _read(folder / "config.json"), _read(folder / "processor_config.json")
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "np") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    text, vision = config["text_config"], config["vision_config"]
    return {
        "Parameters": f"{count / 1e6:,.2f} M",
        "Language model": f"{text['model_type']}, {text['num_hidden_layers']} layers",
        "Vision tower": vision["model_type"],
        "Connector": config["connector_type"],
        "Sampling": f"{processor['video_processor']['fps']:g} fps",
    }


def _describe_rows(files: Sequence[Path]) -> dict[str, Any]:
    """Count the rows of parquet files and show one of each kind; the videos are not read."""
    import pyarrow.parquet

    splits: dict[str, list[dict]] = {}
    for file in files:
        names = [name for name in pyarrow.parquet.read_schema(file).names if name != "video"]
        table = pyarrow.parquet.read_table(file, columns=names)
        splits.setdefault(file.name.split("-")[0], []).extend(table.to_pylist())
    return describe_rows(DatasetCardInfo.from_rows("", splits, license=""))


def describe_rows(info: DatasetCardInfo) -> dict[str, Any]:
    """Return what a data set holds in a form that JSON can keep.

    Args:
        info (`DatasetCardInfo`): From [`DatasetCardInfo.from_rows`].

    Returns:
        `dict`: `splits`, `tasks`, `kinds` and `examples`.
    """
    kinds = [[*kind, count] for kind, count in info.kinds.items()]
    return {"splits": info.splits, "tasks": info.tasks, "kinds": kinds, "examples": [asdict(e) for e in info.examples]}


def _rows_facts(rows: Mapping[str, Any] | None) -> dict[str, Any]:
    if rows is None:
        return {}
    kinds = {(factor, kind): count for factor, kind, count in rows["kinds"]}
    examples = [Example(example["title"], [tuple(line) for line in example["lines"]]) for example in rows["examples"]]
    return {**{name: rows[name] for name in ROWS_FIELDS}, "kinds": kinds, "examples": examples}


def _fetched(folder: Path, name: str, value: Any) -> Any:
    """The value of a fact, from the file that it names if it names one."""
    if name == "runs":
        return [read_run_record(_content(folder, run)) for run in value]
    if name == "run":
        return read_run_record(_content(folder, value))
    if name == "results":
        return [
            result
            for entry in value
            for result in results_of_evaluation(
                _read(folder / entry["file"]), **{key: kept for key, kept in entry.items() if key != "file"}
            )
        ]
    return _content(folder, value) if name in ("rows", "facts", "example_output") else value


def _content(folder: Path, value: Any) -> Any:
    return _read(folder / value) if isinstance(value, str) else value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: a card is rendered from what it says. Write it, or name another folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Correct it, or fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} where a JSON object with names and values is needed.")
    return content


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch facts if asked to, then render; a card whose facts are not there yet is named and left as it is.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments, by default those of the process.

    Raises:
        ValueError: If there is no card, or `--take` or `--into` is given for several.
    """
    parser = argparse.ArgumentParser(prog="python -m d2vlm_hf.hub.render_cards", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=f"folders of cards (default: all of {CARDS}/)")
    parser.add_argument("--take", nargs="+", default=[], metavar="SOURCE", help="fetch facts from these first")
    parser.add_argument("--into", metavar="DIR", help="also render into the folder of a checkpoint")
    arguments = parser.parse_args(argv)
    folders = [Path(folder) for folder in arguments.folders]
    folders = folders or sorted(path.parent for path in Path(CARDS).glob(f"*/{FACTS_FILE}"))
    if not folders or (len(folders) > 1 and (arguments.take or arguments.into)):
        raise ValueError(
            f"there are {len(folders)} folders of cards: --take and --into need one, and to render needs one at least. "
            f"Name it, or go to the folder that holds {CARDS}/."
        )
    written = [path for source in arguments.take for path in take(folders[0], source)]
    for folder in folders:
        if missing := missing_files(folder):
            logger.warning("%s: not rendered, there is no %s yet", folder, ", ".join(missing))
            continue
        written += render(folder)
        if arguments.into:
            written += render(folder, arguments.into)
    for path in written:
        logger.warning("wrote %s", path)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()


__all__ = ["describe_checkpoint", "describe_rows", "load_card", "main", "missing_files", "render", "take"]
