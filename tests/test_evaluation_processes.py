# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluation in real processes: killed by the system and resumed, and shared out by accelerate (gloo)."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import sft_rows, tiny

from d2vlm_hf.evaluation.run import main
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint


RECIPE = Path(__file__).parent.parent / "recipes" / "evaluate.py"
PREDICTIONS = "predictions-model-000.jsonl"


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """12 rows about 4 videos, asked in 4 batches."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_checkpoint(folder / "checkpoint", *tiny())
    rows = sft_rows(folder, videos=4)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = {"dataset": folder / "rows.jsonl", "model": folder / "checkpoint", "batch_size": 3, "max_new_tokens": 8}
    return [*(str(word) for pair in given.items() for word in (f"--{pair[0]}", pair[1])), "--figures", "false"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options) -> Path:
    """One undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    main([*options, "--output_dir", str(folder)])
    return folder


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def test_a_killed_process_is_resumed_to_the_same_bytes(tmp_path, options, whole):
    command = [sys.executable, str(RECIPE), *options, "--output_dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(lines(tmp_path / PREDICTIONS)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = lines(tmp_path / PREDICTIONS)
    assert 3 <= len(written) < len(lines(whole / PREDICTIONS))
    assert not (tmp_path / "results.json").exists()
    main([*options, "--output_dir", str(tmp_path)])
    assert lines(tmp_path / PREDICTIONS)[: len(written) - 1] == written[:-1]  # only a cut line is written again
    for name in (PREDICTIONS, "results.json", "card.yaml"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_processes_answer_every_row_once_and_alike(tmp_path, options, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launch, str(RECIPE), *options, "--output_dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shares = [lines(tmp_path / f"predictions-model-{rank:03d}.jsonl") for rank in range(2)]
    header, *single = lines(whole / PREDICTIONS)
    assert [share[0] for share in shares] == [header, header]
    assert all(len(share) > 3 for share in shares)
    assert sorted(line for share in shares for line in share[1:]) == sorted(single)  # each row once, the same bytes
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()
