# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Predictions on disk: JSON lines, a header with the settings first, then one row a sample, appended as they come."""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)


class PredictionFile:
    """An append-only file of predictions that a killed run continues.

    Each line is written in one call and flushed to disk, so that a kill can only cut the last line, which is dropped.

    Args:
        path (`str` or `os.PathLike`): The file; made with its header if missing.
        settings (`Mapping`): Whatever decides the predictions. A file with other settings is not continued.

    Raises:
        ValueError: If the file holds predictions of other settings.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
        self.path = Path(path)
        wanted = json.loads(json.dumps({"settings": dict(settings)}))
        whole = self._whole_lines()
        if not whole:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self._append(wanted)
            return
        header, _ = _read(self.path)
        if header != wanted:
            differing = sorted(
                key
                for key in {*header.get("settings", {}), *wanted["settings"]}
                if header.get("settings", {}).get(key) != wanted["settings"].get(key)
            )
            raise ValueError(
                f"{self.path} holds predictions made with other settings ({', '.join(differing)} differ). Use another "
                "output folder, or delete the file."
            )
        os.truncate(self.path, whole)

    def _whole_lines(self) -> int:
        """Number of bytes of the file up to the end of its last whole line."""
        return self.path.read_bytes().rfind(b"\n") + 1 if self.path.exists() else 0

    def _append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, row_id: str, prediction: Mapping[str, Any]) -> None:
        """Append one prediction."""
        self._append({"id": row_id, **prediction})

    def read(self) -> dict[str, dict[str, Any]]:
        """Predictions so far, by row id."""
        return _read(self.path)[1]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line.strip()]
    try:  # a last line without its end was cut by a kill, unless another program just left the end out
        records += [json.loads(last)] if last.strip() else []
    except json.JSONDecodeError:
        logger.warning("%s ends in a line that was cut off; it is left out", path)
    header = records[0] if records and "settings" in records[0] else {}
    return header, {str(record["id"]): record for record in records if "id" in record}


def read_predictions(paths: Iterable[str | os.PathLike]) -> dict[str, dict[str, Any]]:
    """Predictions of several files (shards of one run, or another system's), by row id.

    Raises:
        ValueError: a file that is missing or holds none.
    """
    merged: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: it should hold predictions. Check the path.")
        found = _read(path)[1]
        if not found:
            raise ValueError(
                f'{path} holds no predictions: each line should be an object with an "id" and the prediction. Mend it.'
            )
        merged |= found
    return merged


__all__ = ["PredictionFile", "read_predictions"]
