# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Bad input to the model: an error that names the value and the way out, and a model that is unharmed by it."""

import pytest
import tiny_models as tiny
import torch
from tiny_models import PAIRS, SAMPLES, Sample, tiny_model, training_batch


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def spans_with(value: list[int]) -> torch.Tensor:
    spans = training_batch(SAMPLES)["evidence_spans"]
    spans[1, 0] = torch.tensor(value)
    return spans


def role_with(row: list[int]) -> torch.Tensor:
    role = training_batch(SAMPLES)["evidence_role"]
    role[1] = torch.tensor(row)
    return role


BATCH = training_batch(SAMPLES)
PROMPT, COLUMNS = BATCH["prompt_length"], BATCH["input_ids"].shape[1]

# what is changed in a good batch -> what is said about it
CASES = {
    "frames that do not add up": (
        {"num_frames": torch.tensor([5, 8, 4])},
        r"num_frames=\[5, 8, 4\] adds up to 17 frames, but 16",
    ),
    "placeholders and frames": (
        {"num_frames": torch.tensor([8, 5, 3])},
        r"videos have \[8, 5, 3\] frames but the text has \[5, 8, 3\]",
    ),
    "placeholders without video": (
        {"pixel_values_videos": None},
        r"\[5, 8, 3\] <video> placeholders per row but no video",
    ),
    "rows and videos": (
        {
            "pixel_values_videos": torch.zeros(16, 3, tiny.IMAGE, tiny.IMAGE),
            "num_frames": torch.tensor([8, 8]),
            "qformer_input_ids": torch.ones(2, 3, dtype=torch.long),
            "qformer_attention_mask": torch.ones(2, 3, dtype=torch.long),
        },
        "3 rows of text for 2 videos: every video needs the same number of responses",
    ),
    "questions and videos": (
        {"qformer_input_ids": torch.ones(2, 3, dtype=torch.long)},
        "2 questions for 3 videos: the Q-Former reads one question",
    ),
    "video index": ({"video_index": torch.tensor([0, 3, 1])}, r"video_index=\[0, 3, 1\] names videos outside 0\.\.2"),
    "negative video index": ({"video_index": torch.tensor([0, 1, -1])}, r"names videos outside 0\.\.2"),
    "missing spans": (
        {"evidence_spans": None, "evidence_role": None},
        r"\[5, 2, 0\] <evi> tokens but \[0, 0, 0\] evidence spans",
    ),
    "fewer spans": (
        {"evidence_role": role_with([1, -1, -1, -1, -1])},
        r"\[5, 2, 0\] <evi> tokens but \[5, 1, 0\] evidence spans: every <evi> needs its span",
    ),
    "more spans": ({"evidence_role": role_with([1, 2, 2, -1, -1])}, r"\[5, 2, 0\] <evi> tokens but \[5, 3, 0\]"),
    "spans without roles": ({"evidence_role": None}, r"evidence_spans has shape \(3, 5, 2\) and evidence_role None"),
    "roles without spans": ({"evidence_spans": None}, r"evidence_spans has shape None and evidence_role \(3, 5\)"),
    "span shape": ({"evidence_spans": BATCH["evidence_spans"][..., :1]}, r"evidence_spans has shape \(3, 5, 1\)"),
    "span count": ({"evidence_spans": BATCH["evidence_spans"][:, :2]}, r"they must be \(rows, E, 2\) and \(rows, E\)"),
    "unknown role": ({"evidence_role": role_with([1, 3, -1, -1, -1])}, "is not a role for each <evi>, then padding"),
    "padding in front": (
        {"evidence_role": role_with([-1, 1, 2, -1, -1])},
        r"1 \(grounding\) or 2 \(answer\) in sequence",
    ),
    "span past the end": (
        {"evidence_spans": spans_with([3, 8])},
        r"evidence_spans\[1\]=\[\[3, 8\], \[3, 6\]\] does not fit a video of 8 frames.*0 <= first <= last <= 7",
    ),
    "negative span": ({"evidence_spans": spans_with([-1, 6])}, r"\[-1, 6\].* does not fit a video of 8 frames"),
    "reversed span": ({"evidence_spans": spans_with([6, 3])}, r"\[6, 3\].* does not fit a video of 8 frames"),
    "cut video": ({"prompt_length": PROMPT - 5}, f"prompt_length={PROMPT - 5} cuts the video"),
    "no prompt": ({"prompt_length": 0}, f"prompt_length=0 leaves no prompt or no response in {COLUMNS} columns"),
    "no response": ({"prompt_length": COLUMNS}, f"prompt_length={COLUMNS} leaves no prompt or no response"),
    "negative prompt": ({"prompt_length": -1}, "prompt_length=-1 leaves no prompt or no response"),
    "events in the prompt": (
        {"evidence_role": role_with([0, 2, -1, -1, -1])},
        r"the prompts have \[1, 0, 0\] <evi> tokens but \[1, 1, 0\] of role 0",
    ),
    "labels in the prompt": (
        {"labels": torch.where(BATCH["attention_mask"] == 1, BATCH["input_ids"], -100)},
        f"labels has targets inside the prompt, before column {PROMPT}",
    ),
}


@pytest.mark.parametrize("path", ["shared prefix", "checkpointing"])
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_and_harmless(name, path):
    changes, message = CASES[name]
    model = tiny_model()
    expected = model(**BATCH).loss.detach()
    if path == "checkpointing":
        model.train().activation_checkpointing_enable()
    with pytest.raises(ValueError, match=message):
        model(**{**BATCH, **changes})
    assert torch.allclose(model(**BATCH).loss, expected, rtol=1e-6)
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


def test_different_prompts_for_one_video(model):
    batch = training_batch(PAIRS, responses=(0, 1))
    batch["input_ids"][4, batch["prompt_length"] - 1] = 9
    with pytest.raises(ValueError, match="the 2 responses to a video have different prompts"):
        model(**batch)
    del batch["prompt_length"]
    model(**batch)  # two plain passes do not share the prompt


@pytest.mark.parametrize("path", ["shared prefix", "two passes"])
def test_attention_that_knows_no_blocks(path):
    """Flash attention would take the frames' block for a causal mask, and say nothing."""
    model, batch = tiny_model(), {k: v for k, v in BATCH.items() if path == "shared prefix" or k != "prompt_length"}
    expected = model(**batch).loss
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match="attn_implementation='flash_attention_2' cannot let frames attend to each other"
    ):
        model(**batch)
    model.config.text_config._attn_implementation = "sdpa"
    assert torch.equal(model(**batch).loss, expected)


def test_an_error_inside_the_first_pass_leaves_no_hook(model, monkeypatch):
    batch = {k: v for k, v in BATCH.items() if k != "prompt_length"}
    expected = model(**batch).loss
    layers = model.model.language_model.layers

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(layers[0].mlp, "forward", fail)
        with pytest.raises(MemoryError, match="no room"):
            model(**batch)
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert torch.equal(model(**batch).loss, expected)


def test_a_video_of_one_frame_is_no_error(model):
    output = model(**training_batch([Sample(1, [[(0, 0)]], given=[(0, 0)])]))
    assert output.loss.isfinite()
