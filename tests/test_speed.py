# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The scripts of `speed/` on tiny sizes: both sides must compute the same thing. No time is ever asserted."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import largest_difference


SPEED = Path(__file__).resolve().parent.parent / "speed"
TINY = {"frames": 12, "layers": 3, "batch": 2, "hidden": 32, "vocabulary": 64, "prompt": 8, "response": 10}
NAMES = ("common", "sft_step", "fpo_step", "batch_generation", "linear_in_frames")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts, imported as they import each other: their folder is on the path."""
    monkeypatch.syspath_prepend(str(SPEED))
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def setting(scripts):
    return scripts["common"].Setting(**TINY, evidence_layer=1, repeats=1)


def gradients(model, loss):
    """One side's loss, and its gradient by parameter name."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["sft_step", "fpo_step"])
def test_both_sides_have_equal_losses_and_gradients(scripts, setting, name):
    model = scripts["common"].build_model(setting)
    found = {side: gradients(model, loss) for side, loss in scripts[name].losses(model, setting).items()}
    ours, baseline = found["ours"], found["baseline"]
    torch.testing.assert_close(ours[0], baseline[0], rtol=1e-5, atol=1e-6)
    assert largest_difference(ours[1], baseline[1]) < 1e-5
    assert all(gradient is not None for gradient in ours[1].values())


def test_losses_can_differ(scripts, setting):
    # A baseline without visual capture is another loss: the check must see it.
    common, sft_step = scripts["common"], scripts["sft_step"]
    model = common.build_model(setting)
    ours = sft_step.losses(model, setting)["ours"]
    filled = ours().item()
    model.config.visual_capture = False
    assert abs(ours().item() - filled) > common.TOLERANCE


@pytest.mark.parametrize("name", ["sft_step", "fpo_step"])
def test_steps_are_timed(scripts, setting, name):
    sides = scripts[name].measure(setting)
    assert list(sides) == ["ours", "baseline"]
    assert all(timing.wall > 0 and timing.cpu >= 0 for timing in sides.values())


def test_peak_memory_is_taken_in_processes_of_their_own(scripts, setting):
    found = scripts["sft_step"].measure_memory(setting)
    assert all(side["peak"] >= side["before"] > 0 for side in found.values())


def test_batched_answers_are_the_single_ones(scripts, setting):
    batch_generation = scripts["batch_generation"]
    model, inputs = scripts["common"].build_model(setting).eval(), scripts["common"].prompts(setting)
    batched, batched_spans, _, decode = batch_generation.answer(model, inputs, setting)
    single, single_spans, _, _ = batch_generation.answer_one_by_one(model, inputs, setting)
    assert batched.tolist() == single.tolist()
    assert batched_spans == single_spans
    assert [len(spans) for spans in batched_spans] == [4, 4]  # two events, named twice
    assert batched.shape[1] == inputs["input_ids"].shape[1] + setting.response
    assert decode.wall > 0
    assert list(batch_generation.measure(setting)) == ["end to end", "decode phase"]


def test_time_over_frames(scripts, setting):
    linear = scripts["linear_in_frames"]
    assert list(linear.measure(setting, (4, 8))) == [4, 8]
    straight = linear.linearity({t: 0.5 + 0.01 * t for t in linear.LENGTHS})
    assert straight == pytest.approx({"r2": 1.0, "exponent": 0.94, "per_frame": 0.01, "curvature": 1.0}, abs=0.02)
    bent = linear.linearity({t: 1e-4 * t * t for t in linear.LENGTHS})
    assert bent["curvature"] > 5
    assert bent["exponent"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_row_is_printed(scripts, setting, name, monkeypatch, capsys):
    module = scripts[name]
    monkeypatch.setattr(sys, "argv", [name, "--repeats", "1"])
    if name == "linear_in_frames":
        monkeypatch.setattr(module, "LENGTHS", (4, 8))
    monkeypatch.setattr(module, "read_setting", lambda *_, **__: (setting, _Options()))
    module.main()
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("|") for line in printed if line)
    assert torch.__version__ in printed[-1]
    assert f"{torch.get_num_threads()} thread" in printed[-1]


class _Options:
    memory = False


def test_options(scripts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--repeats", "2", "--batch", "3", "--frames", "4", "--layers", "8"])
    setting, options = scripts["common"].read_setting("What it is.", batch=8)
    assert (setting.repeats, setting.batch, setting.frames, setting.layers) == (2, 3, 4, 8)
    assert not options.memory


def test_unequal_sides_stop_the_measurement(scripts):
    with pytest.raises(SystemExit, match=r"the two sides disagree, loss: ours 1\.000000, baseline 1\.100000"):
        scripts["common"].check_close(1.0, 1.1)
    with pytest.raises(SystemExit, match="Nothing was measured"):
        scripts["common"].check_close(float("nan"), 1.0)
