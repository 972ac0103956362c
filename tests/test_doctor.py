# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The doctor: it reports what works on a real file, and whatever is broken it reports instead of raising."""

import builtins
import subprocess
from importlib import metadata

import av
import numpy as np
import pytest
import torch
from transformers.utils import is_torchcodec_usable

from d2vlm_hf import doctor
from d2vlm_hf.doctor import Check, diagnose


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A real H.264 file of 12 frames."""
    path = tmp_path_factory.mktemp("doctor") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for value in range(0, 240, 20):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def by_name(checks):
    return {check.name: check for check in checks}


def break_import(monkeypatch, module, error):
    """Makes `import module` raise, as a build for another torch or a missing FFmpeg does."""
    original = builtins.__import__

    def failing(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)


def test_decoders_are_tried_on_a_real_file(clip):
    checks = by_name(diagnose(clip))
    assert checks["PyAV decodes"] == Check("PyAV decodes", "ok", "12 frames of clip.mp4", required=False)
    if is_torchcodec_usable("video"):
        assert checks["torchcodec decodes"].status == "ok"
        assert checks["video"].detail == "read with torchcodec"
    else:
        assert checks["torchcodec decodes"].status == "broken"
        assert checks["video"].detail == "read with PyAV"


def test_report_holds_what_is_needed_and_no_remedy_for_what_works(clip):
    checks = by_name(diagnose(clip))
    assert checks["python"].status == checks["device"].status == "ok"
    assert checks["torch"].detail == metadata.version("torch")
    assert checks["trl"].required is False
    assert checks["trl"].detail.endswith("(for training)")
    wanted = "transformers trl datasets torchcodec av numpy ffmpeg gradio video"
    assert set(wanted.split()) <= set(checks)
    assert "pytest" not in checks, "the tools for developing are nobody's concern"
    for check in checks.values():
        assert bool(check.remedy) == (check.status != "ok"), check


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError("libnvrtc.so.13: cannot open shared object file\nand more"), "broken"),
        (RuntimeError("Could not load libtorchcodec"), "broken"),
        (ModuleNotFoundError("No module named 'torchcodec'"), "missing"),
    ],
)
def test_a_torchcodec_that_cannot_load_is_reported(monkeypatch, clip, error, status):
    break_import(monkeypatch, "torchcodec", error)
    checks = by_name(diagnose(clip))
    found = checks["torchcodec decodes"]
    assert found.status == status
    assert found.detail == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert "PyAV is used meanwhile" in found.remedy
    assert checks["video"] == Check("video", "ok", "read with PyAV")


def test_without_any_decoder_video_is_broken(monkeypatch, tmp_path):
    text = tmp_path / "clip.mp4"
    text.write_text("not a video")
    checks = by_name(diagnose(str(text)))
    assert checks["PyAV decodes"].detail.startswith(f"RuntimeError: PyAV cannot decode {text}: ")
    assert checks["PyAV decodes"].detail.endswith("; see whether another player can.")
    assert checks["video"].status == "broken"
    assert checks["video"].required


def test_a_missing_clip_is_named(tmp_path):
    path = str(tmp_path / "gone.mp4")
    checks = by_name(diagnose(path))
    assert checks["PyAV decodes"].detail == f"{path} is not there to be decoded"


def test_wrong_and_missing_versions(monkeypatch, clip):
    original = metadata.version

    def version(name):
        if name == "gradio":
            raise metadata.PackageNotFoundError(name)
        return {"transformers": "4.57.1", "trl": "1.17.0"}.get(name) or original(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    checks = by_name(diagnose(clip))
    assert checks["transformers"].status == "broken"
    assert checks["transformers"].detail.startswith("4.57.1, wanted ")
    assert checks["transformers"].remedy.startswith("pip install 'transformers")
    assert checks["trl"].status == "broken"
    assert checks["gradio"].status == "missing"
    assert checks["gradio"].remedy == "pip install 'd2vlm-hf[demo]'"


def test_a_package_that_was_not_installed_is_reported(monkeypatch, clip):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", requires)
    assert by_name(diagnose(clip))["d2vlm-hf"].status == "broken"


def test_ffmpeg_missing_and_broken(monkeypatch, clip):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert by_name(diagnose(clip))["ffmpeg"].status == "missing"

    def run(*args, **kwargs):
        raise subprocess.CalledProcessError(127, args[0])

    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor.subprocess, "run", run)
    found = by_name(diagnose(clip))["ffmpeg"]
    assert found.status == "broken"
    assert "returned non-zero exit status 127" in found.detail


def test_a_device_that_fails_is_reported(monkeypatch, clip):
    def fail():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    found = by_name(diagnose(clip))["device"]
    assert found == Check(
        "device", "broken", "RuntimeError: CUDA driver initialization failed", "reinstall torch for this machine"
    )
