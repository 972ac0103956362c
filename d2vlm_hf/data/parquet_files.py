# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Rows as parquet files, the bytes of their videos in them: what is published needs no code of this package."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as parquet
from datasets.table import embed_table_storage

from .schema import features


_WRITE_BATCH = 64  # rows whose videos are in memory at a time


def write_parquet(
    rows: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike,
    shard_size: int = 1000,
    embed_video: bool = True,
    split: str = "train",
) -> list[str]:
    """Writes rows as parquet files that `load_dataset(folder)` reads, streaming or not, without this package.

    Args:
        rows (iterable of rows):
            SFT rows or preference rows, all of the same columns; read once, a few at a time.
        folder (`str` or `PathLike`):
            Folder of the data set; the files go to its `data/`.
        shard_size (`int`, *optional*, defaults to 1000):
            Rows per file.
        embed_video (`bool`, *optional*, defaults to `True`):
            Whether the files hold the bytes of the videos, or only their paths.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.

    Returns:
        `list[str]`: the files written.

    Raises:
        ValueError: If there are no rows, a video is missing, `shard_size` is less than 1, or the folder already has
            files of this split.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}: a file needs rows. Pass 1 or more.")
    data = Path(folder) / "data"
    if list(data.glob(f"{split}-*.parquet")):
        raise ValueError(f"{str(data)!r} has files of the split {split!r} already. Remove them, or use another folder.")
    data.mkdir(parents=True, exist_ok=True)
    rows, parts = iter(rows), []
    batch = _WRITE_BATCH if embed_video else shard_size
    while True:
        shard = itertools.islice(rows, shard_size)
        block = list(itertools.islice(shard, batch))
        if not block:
            break
        parts.append(data / f".{split}-{len(parts):05d}.part")
        schema = features(preference="rejected" in block[0])
        with parquet.ParquetWriter(parts[-1], schema.arrow_schema) as writer:
            while block:
                writer.write_table(_table(block, schema, embed_video))
                block = list(itertools.islice(shard, batch))
    if not parts:
        raise ValueError("There are no rows to write: nothing could be loaded from it. Check where they come from.")
    files = [data / f"{split}-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
    for part, file in zip(parts, files, strict=True):
        os.replace(part, file)
    return [str(file) for file in files]


def _table(rows: list[Mapping[str, Any]], schema: datasets.Features, embed_video: bool) -> Any:
    """An arrow table of rows, the bytes of their videos in it."""
    table = datasets.Dataset.from_list(rows, features=schema).data.table
    if not embed_video:
        return table
    for row, video in zip(rows, table["video"].to_pylist(), strict=True):
        if video["bytes"] is None and not os.path.isfile(video["path"]):
            raise ValueError(
                f"Row (id {row['id']!r}), column 'video', value {video['path']!r}: is not a file, so it cannot be "
                "embedded. Correct the path, or pass embed_video=False."
            )
    return embed_table_storage(table)


def read_texts(folder: str | os.PathLike) -> dict[str, Iterator[dict[str, Any]]]:
    """The rows that a folder holds, all columns but the video.

    Args:
        folder (`str` or `PathLike`):
            Folder that [`write_parquet`] wrote to.

    Returns:
        `dict[str, Iterator[dict]]`: the rows of each split, read a few at a time.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted((Path(folder) / "data").glob("*-of-*.parquet")):
        files.setdefault(file.name.rsplit("-", 3)[0], []).append(file)
    return {split: itertools.chain.from_iterable(map(_texts, parts)) for split, parts in files.items()}


def _texts(file: Path) -> Iterator[dict[str, Any]]:
    with parquet.ParquetFile(file) as opened:
        names = [name for name in opened.schema_arrow.names if name != "video"]
        for batch in opened.iter_batches(columns=names):
            yield from batch.to_pylist()


__all__ = ["read_texts", "write_parquet"]
