# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Preference data sets: rows from anywhere, perturbed, as a `datasets` builder.

What comes out depends on the rows, the seed and the settings alone: not on the number of processes, the order in which
they finish, or whether a run was interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets

from .importers import import_rows
from .parquet_files import write_parquet
from .perturb import KINDS, Impossible, PerturbConfig, choice_preference, perturb
from .rewriting import Rewriter
from .schema import PERTURBATIONS, features, validate_row
from .vocabulary import Vocabulary


_VOCABULARY_ROWS = 5000  # of a stream that can be read only once
CHOICE = "mcqa"
"""Under this name the rows are counted that ask which answer is right."""


def row_seed(seed: int, row_id: str, kind: str) -> int:
    """A seed for one kind of perturbation of one row, the same on every machine and in every process.

    Args:
        seed (`int`): Of the data set.
        row_id (`str`): Id of the row.
        kind (`str`): Kind of perturbation.

    Returns:
        `int`: between 0 and 2^63 - 1.
    """
    digest = hashlib.blake2b(f"{seed}\0{row_id}\0{kind}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class PreferenceRows:
    """Preference rows, made while one goes through them, and what became of the rows they are made from.

    Attributes:
        rows (`int`): SFT rows read in the last pass.
        made (`Counter`): Kind (or "mcqa") -> preference rows made.
        impossible (`Counter`): (kind, reason) -> how often there was none.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        make: Callable[..., Any],
        kinds: Sequence[str],
        per_row: int | None,
        choose: Callable[..., Any] | None = None,
    ):
        self._rows, self._make, self._kinds, self._per_row, self._choose = rows, make, tuple(kinds), per_row, choose
        self.rows, self.made, self.impossible = 0, Counter(), Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.rows, self.made, self.impossible = 0, Counter(), Counter()
        for row in self._rows:
            self.rows += 1
            rejected = []
            for kind, result in self._make(row):
                if not self._counted(kind, result):
                    continue
                yield result
                rejected.append(result)
                if self._per_row is not None and len(rejected) == self._per_row:
                    break
            if self._choose is not None:
                choice = self._choose(row, rejected)
                if self._counted(CHOICE, choice):
                    yield choice

    def _counted(self, kind: str, result: Any) -> bool:
        """Count a result; whether it is a row."""
        if isinstance(result, Impossible):
            self.impossible[kind, result.reason] += 1
            return False
        self.made[kind] += 1
        return True

    def counts(self) -> dict[str, Any]:
        """Counts of the last pass, fit for JSON: rows read, rows made by factor and kind, and reasons by kind."""
        factors = {factor: sum(self.made[kind] for kind in kinds) for factor, kinds in PERTURBATIONS.items()}
        factors["text"] += self.made[CHOICE]  # another option is named, the spans stay
        names = (*self._kinds, *((CHOICE,) if self._choose is not None else ()))
        reasons = {
            kind: {reason: n for (other, reason), n in sorted(self.impossible.items()) if other == kind}
            for kind in names
        }
        made = {kind: self.made[kind] for kind in names}
        return {"rows": self.rows, "factors": factors, "made": made, "impossible": reasons}


def _check_kinds(kinds: Sequence[str], per_row: int | None) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"kinds is {list(kinds)!r}: these are no perturbations: {unknown}. Use some of {list(KINDS)}.")
    if per_row is not None and per_row < 1:
        raise ValueError(f"per_row is {per_row}: no rejected answer would be made. Pass 1 or more, or None for all.")


def make_preferences(
    rows: Iterable[Mapping[str, Any]],
    kinds: Sequence[str] = KINDS,
    per_row: int | None = None,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    rewriter: Rewriter | None = None,
    config: PerturbConfig | None = None,
    choices: bool = False,
) -> PreferenceRows:
    """Makes preference rows of SFT rows (paper, factorized preference data).

    Args:
        rows (iterable of rows):
            Valid SFT rows.
        kinds (`Sequence[str]`, *optional*, defaults to all six):
            Kinds of perturbation.
        per_row (`int`, *optional*):
            Most rejected answers per row, of kinds drawn at random among those that are possible; by default one of
            each possible kind.
        seed (`int`, *optional*, defaults to 0):
            With the row's id and the kind it fixes the result.
        vocabulary (`Vocabulary`, *optional*):
            By default mined from the rows: from all of them in a first pass, or from the first 5,000 if they can be
            read only once.
        rewriter (`Rewriter`, *optional*):
            A text-generation model for "tamper".
        config (`PerturbConfig`, *optional*):
            IoU bands and limits.
        choices (`bool`, *optional*, defaults to `False`):
            Whether to add a multiple-choice row to every row that has rejected answers: which answer is right, the
            rejected ones being the wrong options (the paper's "mcqa" variant). It does not count for `per_row`.

    Returns:
        `PreferenceRows`: an iterable of preference rows, with counts after a pass.

    Raises:
        ValueError: If a kind is unknown or `per_row` is less than 1; while iterating, if a row is not valid.
    """
    _check_kinds(kinds, per_row)
    if vocabulary is None and iter(rows) is rows:
        first = list(itertools.islice(rows, _VOCABULARY_ROWS))
        rows = itertools.chain(first, rows)
        vocabulary = Vocabulary.from_rows(_valid(first), seed=seed)
    elif vocabulary is None:
        vocabulary = Vocabulary.from_rows(_valid(rows), seed=seed)

    def make(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        order = list(kinds)
        if per_row is not None:
            random.Random(row_seed(seed, row["id"], "order")).shuffle(order)
        for kind in order:
            yield kind, perturb(row, kind, row_seed(seed, row["id"], kind), vocabulary, config, rewriter)

    def choose(row: Mapping[str, Any], rejected: Sequence[Mapping[str, Any]]) -> Any:
        return choice_preference(row, rejected, row_seed(seed, row["id"], CHOICE))

    return PreferenceRows(rows, make, kinds, per_row, choose if choices else None)


def _valid(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for index, row in enumerate(rows):
        validate_row(row, index)
        yield row


# --- builder ---------------------------------------------------------------------------------------------------------


@dataclass
class D2VLMPreferenceConfig(datasets.BuilderConfig):
    """Where the rows come from and how they are perturbed.

    Args:
        source: Rows (a list, a `datasets.Dataset`, an `ImportResult`, or a function that returns an iterable of rows),
            or a path: of a JSON lines file of rows, or of an annotation file if `importer` is given.
        importer (`str`, *optional*): Name of the format of the annotation file, one of `importers.IMPORTERS`.
        importer_options (`dict`, *optional*): Its further arguments, e.g. `video_root`.
        kinds (`Sequence[str]`): Kinds of perturbation; set by the name of the configuration.
        per_row (`int`, *optional*): Most rejected answers per row; one of each possible kind by default.
        seed (`int`): Of the perturbations.
        perturbation (`PerturbConfig`): IoU bands and limits.
        rewriter (`Rewriter`, *optional*): A text-generation model for "tamper".
        rows_per_shard (`int`): SFT rows per unit of work: what a process takes, and what an interrupted run keeps.
        source_id (`str`, *optional*): Stands for the source in the name of the cache, where it cannot be hashed.
        choices (`bool`): Whether to add multiple-choice rows, see [`make_preferences`].
    """

    source: Any = None
    importer: str | None = None
    importer_options: dict[str, Any] | None = None
    kinds: Sequence[str] = KINDS
    per_row: int | None = None
    seed: int = 0
    perturbation: PerturbConfig = field(default_factory=PerturbConfig)
    rewriter: Any = None
    rows_per_shard: int = 1000
    source_id: str | None = None
    choices: bool = False

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Names the cache by the settings and by what the source is now: a changed file is read again."""
        identity = {**config_kwargs, "settings": self.settings()}
        source = identity.pop("source", None)
        if self.source_id is not None:
            source = self.source_id
        elif isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
            status = os.stat(source)
            source = [os.path.abspath(source), status.st_size, status.st_mtime_ns]
        identity["source"] = source
        return super().create_config_id({"identity": datasets.fingerprint.Hasher.hash(identity)}, custom_features)

    def settings(self) -> dict[str, Any]:
        """Everything but the rows that decides what comes out."""
        rewriter = None
        if self.rewriter is not None:
            rewriter = [type(self.rewriter).__name__, str(getattr(self.rewriter, "model", ""))]
        settings = {"kinds": list(self.kinds), "per_row": self.per_row, "seed": self.seed, "rewriter": rewriter}
        settings["choices"] = self.choices
        return settings | {"perturbation": asdict(self.perturbation), "rows_per_shard": self.rows_per_shard}

    def read(self) -> Iterable[Mapping[str, Any]]:
        """The SFT rows of the source.

        Raises:
            ValueError: If there is no source, or its path is no file.
        """
        source = self.source
        if source is None:
            raise ValueError("source is None: there are no rows to perturb. Pass source=rows, or a path.")
        if self.importer is not None:
            return import_rows(self.importer, source, **(self.importer_options or {}))
        if isinstance(source, (str, os.PathLike)):
            if not os.path.isfile(source):
                raise ValueError(
                    f"source is {os.fspath(source)!r}, which is no file. Pass a JSON lines file of rows, or an "
                    "annotation file together with importer=..."
                )
            return _json_lines(source)
        if isinstance(source, datasets.Dataset):
            videos = [name for name, kind in source.features.items() if isinstance(kind, datasets.Video)]
            for name in videos:
                source = source.cast_column(name, datasets.Video(decode=False))
            return source
        return source() if callable(source) else source


def _json_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in filter(str.strip, file):
            yield json.loads(line)


class D2VLMPreference(datasets.GeneratorBasedBuilder):
    """Builds a preference data set: `D2VLMPreference(config_name="grounding", source=rows, cache_dir=...)`.

    Configurations are "all", the factors "grounding" and "text", and each of the six kinds. Rows are perturbed in
    shards of `rows_per_shard`; a finished shard survives an interrupted run, and `num_proc` processes share them.
    """

    BUILDER_CONFIG_CLASS = D2VLMPreferenceConfig
    DEFAULT_CONFIG_NAME = "all"
    BUILDER_CONFIGS = [
        D2VLMPreferenceConfig(name="all"),
        *(D2VLMPreferenceConfig(name=factor, kinds=kinds) for factor, kinds in PERTURBATIONS.items()),
        *(D2VLMPreferenceConfig(name=kind, kinds=(kind,)) for kind in KINDS),
    ]
    VERSION = datasets.Version("1.0.0")

    _work: Path | None = None

    def _info(self) -> datasets.DatasetInfo:
        _check_kinds(self.config.kinds, self.config.per_row)
        return datasets.DatasetInfo(features=features(preference=True))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        """Reads the source once: mines the vocabulary and puts the rows aside in shards."""
        root = Path(self._cache_dir_root) / "d2vlm_preference_work"
        root.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=root, prefix="stage-"))
        digest = hashlib.blake2b(json.dumps(self.config.settings(), sort_keys=True).encode(), digest_size=16)
        try:
            vocabulary = Vocabulary.from_rows(self._staged(stage, digest), seed=self.config.seed)
            work = root / digest.hexdigest()
            if not work.exists():
                stage.rename(work)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        shards = sorted(str(path) for path in work.glob("rows-*.jsonl"))
        if not shards:
            raise ValueError("The source has no rows: there is nothing to perturb. Check the source and its filters.")
        self._work = work
        arguments = {"shards": shards, "vocabulary": vocabulary}
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs=arguments)]

    def _staged(self, stage: Path, digest: Any) -> Iterator[dict[str, Any]]:
        """Writes the rows to shards, and hands them on."""
        videos = Path(self._cache_dir_root) / "d2vlm_preference_videos"
        rows = _valid(self.config.read())
        for number in itertools.count():
            block = list(itertools.islice(rows, self.config.rows_per_shard))
            if not block:
                return
            with open(stage / f"rows-{number:05d}.jsonl", "w", encoding="utf-8") as file:
                for row in block:
                    row = {**row, "video": _video_path(row["video"], videos)}
                    line = json.dumps(row) + "\n"
                    digest.update(line.encode())
                    file.write(line)
                    yield row

    def _generate_examples(self, shards: list[str], vocabulary: Vocabulary) -> Iterator[tuple[str, dict[str, Any]]]:
        for shard in shards:
            done = Path(shard).with_name(Path(shard).name.replace("rows-", "done-"))
            if not done.exists():
                self._perturb_shard(shard, done, vocabulary)
            for row in _json_lines(done):
                yield row["id"], row

    def _perturb_shard(self, shard: str, done: Path, vocabulary: Vocabulary) -> None:
        config = self.config
        made = make_preferences(
            _json_lines(shard),
            config.kinds,
            config.per_row,
            config.seed,
            vocabulary,
            config.rewriter,
            config.perturbation,
            config.choices,
        )
        partial = done.with_name(f".{done.name}.{os.getpid()}")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        counts = done.with_name(done.name.replace("done-", "counts-"))
        counts.write_text(json.dumps(made.counts()), encoding="utf-8")
        os.replace(partial, done)  # last, so that a shard is done or not there

    def download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        """As in `datasets`; a run that was interrupted goes on with the shards that are missing."""
        super().download_and_prepare(*args, **kwargs)
        if self._work is not None:
            parts = [json.loads(path.read_text("utf-8")) for path in sorted(self._work.glob("counts-*"))]
            with open(self._counts_path(), "w", encoding="utf-8") as file:
                json.dump(_sum(parts), file, indent=2)
            shutil.rmtree(self._work)
            self._work = None

    def _counts_path(self) -> str:
        return os.path.join(self._output_dir or self.cache_dir, "preference_counts.json")

    def counts(self) -> dict[str, Any]:
        """Counts of the prepared data set, as [`PreferenceRows.counts`] gives them.

        Raises:
            ValueError: If it is not prepared.
        """
        if not os.path.isfile(self._counts_path()):
            raise ValueError(f"There are no counts at {self._counts_path()!r}: call download_and_prepare() first.")
        with open(self._counts_path(), encoding="utf-8") as file:
            return json.load(file)


def _sum(parts: Sequence[Any]) -> Any:
    """Adds nested mappings of numbers."""
    if not isinstance(parts[0], Mapping):
        return sum(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _sum([part[name] for part in parts if name in part]) for name in names}


def _video_path(video: Any, folder: Path) -> str:
    """Path of a row's video; bytes are put into a file named by their content."""
    if not isinstance(video, Mapping):
        return os.fspath(video)
    if not video.get("bytes"):
        return video["path"]
    suffix = os.path.splitext(video.get("path") or "")[1] or ".mp4"
    path = folder / (hashlib.blake2b(video["bytes"], digest_size=16).hexdigest() + suffix)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(video["bytes"])
        os.replace(partial, path)
    return str(path)


__all__ = [
    "CHOICE",
    "D2VLMPreference",
    "D2VLMPreferenceConfig",
    "PreferenceRows",
    "make_preferences",
    "row_seed",
    "write_parquet",
]
