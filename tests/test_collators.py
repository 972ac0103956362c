# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Collators: literal tensors, TRL's order, videos read once, broken rows."""

import numpy as np
import pytest
import torch
from tiny_runs import sft_rows, tiny

from d2vlm_hf.data.collators import PreferenceCollator, SFTCollator, without_evidence
from d2vlm_hf.data.schema import make_row


@pytest.fixture(scope="module")
def processor():
    return tiny()[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sft_rows(tmp_path_factory.mktemp("videos"))


def frames(count: int) -> dict:
    return {"frames": np.zeros((count, 16, 16, 3), np.uint8), "timestamps": np.arange(count, dtype=float)}


def row(**columns):
    columns = {"id": "r", "video": frames(3), "duration": 3.0, "question": "When?", "answer": "At <evi>.", **columns}
    return {**make_row(**{k: v for k, v in columns.items() if k != "video"}, video="x"), "video": columns["video"]}


def test_expected_tensors_written_out(processor):
    batch = SFTCollator(processor)(
        [
            row(spans=[[1.0, 2.0]]),
            row(id="s", video=frames(2), question="Red <evi>?", question_spans=[[0.0, 1.0]], answer="No.", spans=[]),
        ]
    )
    token = processor.tokenizer.convert_tokens_to_ids
    plain = lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    user, video, end, assistant = (token(t) for t in ("<|user|>", "<video>", "<|end|>", "<|assistant|>"))
    evi, evi_end, pad = token("<evi>"), token("</evi>"), processor.pad_token_id
    prompts = [
        [user, *[video] * 3, *plain("When?"), end, assistant],
        [user, *[video] * 2, *plain("Red "), evi, *plain("?"), end, assistant],
    ]
    responses = [[evi, evi_end, *plain("At "), evi, *plain("."), end], [evi_end, *plain("No."), end]]
    left, right = max(map(len, prompts)), max(map(len, responses))
    expected = [
        [pad] * (left - len(p)) + p + r + [pad] * (right - len(r)) for p, r in zip(prompts, responses, strict=True)
    ]
    assert batch["input_ids"].tolist() == expected
    assert batch["labels"].tolist() == [[-100] * left + r + [-100] * (right - len(r)) for r in responses]
    assert batch["attention_mask"].tolist() == [
        [0] * (left - len(p)) + [1] * (len(p) + len(r)) + [0] * (right - len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    assert batch["prompt_length"] == left
    assert batch["evidence_spans"].tolist() == [[[1, 2], [1, 2]], [[0, 1], [-1, -1]]]
    assert batch["evidence_role"].tolist() == [[1, 2], [0, -1]]
    assert batch["num_frames"].tolist() == [3, 2]
    assert batch["video_index"].tolist() == [0, 1]
    assert batch["pixel_values_videos"].shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("stages", "tokens", "roles"),
    [("both", 2, [1, 2]), ("answer", 1, [2]), ("grounding", 1, [1]), ("text", 0, [])],
)
def test_stages_of_the_ladder(processor, stages, tokens, roles):
    batch = SFTCollator(processor, stages=stages)([row(answer="It moves at <evi>.", spans=[[1.0, 2.0]])])
    labels = batch["labels"][0][batch["labels"][0] != -100]
    assert (labels == processor.evidence_token_id).sum() == tokens
    assert batch["evidence_role"].tolist() == [roles]
    assert (processor.evidence_end_token_id in labels.tolist()) == (stages in ("both", "grounding"))
    text = processor.tokenizer.decode(labels, skip_special_tokens=True).strip()
    assert text == ("It moves." if stages in ("grounding", "text") else text)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("At <evi> and <evi>: blue (B).", "Blue (B)."),
        ("At <evi>, the red star moves.", "The red star moves."),
        ("First, the star moves at <evi>. Finally, it flashes during <evi>, <evi> and <evi>.",
         "First, the star moves. Finally, it flashes."),
        ("This never happens.", "This never happens."),
    ],
)  # fmt: skip
def test_an_answer_without_its_evidence(answer, left):
    assert without_evidence(answer) == left


def test_a_video_asked_about_twice_is_read_once(processor, rows, monkeypatch):
    read = []
    original = type(processor.video_processor).preprocess

    def counting(self, videos, **kwargs):
        read.append(videos)
        return original(self, videos, **kwargs)

    monkeypatch.setattr(type(processor.video_processor), "preprocess", counting)
    first = [r for r in rows if r["video"] == rows[0]["video"]]
    other = next(r for r in rows if r["video"] != rows[0]["video"])
    batch = SFTCollator(processor)([*first, other])
    assert len(read) == 2
    assert batch["video_index"].tolist() == [0] * len(first) + [1]
    assert len(batch["num_frames"]) == 2


def test_several_rows_of_one_item(processor):
    video = frames(4)
    item = {"rows": [row(video=video, spans=[[0.0, 1.0]]), row(video=video, answer="No.", spans=[])]}
    batch = SFTCollator(processor)([item])
    assert batch["num_frames"].tolist() == [4]
    assert batch["video_index"].tolist() == [0, 0]


def test_preferences_come_in_trls_order(processor):
    def conversation(text):
        return [{"role": "assistant", "content": text}]

    base = {
        "video": frames(4),
        "id": "p",
        "prompt": [{"role": "user", "content": "When?"}],
        "question_spans": [],
        "factor": "grounding",
        "perturbation": "shift",
    }
    items = [
        {**base, "chosen": conversation("At <evi>."), "rejected": conversation("No."), "chosen_spans": [[0.0, 1.0]],
         "rejected_spans": []},
        {**base, "chosen": conversation("By <evi>."), "rejected": conversation("Up <evi>."),
         "chosen_spans": [[1.0, 2.0]], "rejected_spans": [[2.0, 3.0]]},
    ]  # fmt: skip
    batch = PreferenceCollator(processor)(items)
    texts = [processor.tokenizer.decode(ids[ids != -100], skip_special_tokens=True).strip() for ids in batch["labels"]]
    assert [t.split()[0] for t in texts] == ["At", "By", "No.", "Up"]
    assert batch["evidence_spans"][:, 0].tolist() == [[0, 1], [1, 2], [-1, -1], [2, 3]]
    assert batch["input_ids"].shape[0] == 4
    assert batch["qformer_input_ids"].shape[0] == 2
    assert batch["perturbation"] == ["shift", "shift"]
    assert batch["frame_times"].tolist() == [[0.0, 1.0, 2.0, 3.0]] * 2
    assert batch["frame_period"].tolist() == [1.0, 1.0]
    assert batch["chosen_seconds"].tolist() == [[[0.0, 1.0]], [[1.0, 2.0]]]
    assert torch.equal(batch["input_ids"][0, : batch["prompt_length"]], batch["input_ids"][2, : batch["prompt_length"]])


def test_a_broken_row_stops_with_its_name(processor, rows):
    broken = {**rows[0], "id": "broken-7", "video": "missing.mp4"}
    with pytest.raises(ValueError, match=r"row 'broken-7' \(video missing.mp4\).*on_error='skip'"):
        SFTCollator(processor)([rows[0], broken])
    collator = SFTCollator(processor, on_error="skip")
    batch = collator([rows[0], broken, {**rows[1], "spans": [[90.0, 99.0]] * len(rows[1]["spans"])}])
    assert batch["input_ids"].shape[0] == 1
    assert len(collator.skipped) == 2


def test_a_batch_without_a_usable_row_teaches_nothing(processor, rows):
    """The other processes of a run must not wait for one that has nothing to do, as with one row per device."""
    collator = SFTCollator(processor, on_error="skip")
    for unusable in ({**rows[0], "video": "missing.mp4"}, {**rows[0], "question": " "}):
        batch = collator([unusable])
        assert batch["num_frames"].tolist() == [1]
        assert (batch["labels"] == -100).all()
        assert batch["evidence_role"].shape == (1, 0)
    assert len(collator.skipped) == 2
    model, _ = tiny()
    outputs = model(**batch, num_items_in_batch=1, num_evidence_samples=1)
    outputs.loss.backward()
    assert outputs.loss == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_stored_patch_features_stand_for_a_video(processor):
    """The tower has run before: the batch has its output in place of pixels, and the loss is the same."""
    model, _ = tiny()
    items = [row(spans=[[1.0, 2.0]]), row(id="s", video=frames(5), answer="No.")]
    plain = SFTCollator(processor)(items)
    with torch.no_grad():
        patches = model.model.encode_patches(plain["pixel_values_videos"]).split(plain["num_frames"].tolist())
    stored = [
        {**item, "video": {"patch_features": own.half(), "timestamps": item["video"]["timestamps"]}}
        for item, own in zip(items, patches, strict=True)
    ]
    batch = SFTCollator(processor)(stored)
    assert "pixel_values_videos" not in batch
    for name in ("input_ids", "labels", "evidence_spans", "num_frames", "video_index"):
        assert torch.equal(batch[name], plain[name]), name
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, model(**plain).loss, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="some videos of the batch are stored patch features and others are not"):
        SFTCollator(processor)([items[0], stored[1]])
    wrong = {**stored[0], "video": {"patch_features": patches[0], "timestamps": [0.0]}}
    with pytest.raises(ValueError, match=r"patch_features of shape \(3, 4, 16\) come with 1 timestamps"):
        SFTCollator(processor)([wrong])


def test_options_are_checked(processor):
    with pytest.raises(ValueError, match=r"on_error=.ignore. is unknown: a broken row is either"):
        SFTCollator(processor, on_error="ignore")
    with pytest.raises(ValueError, match="stages='all' is unknown"):
        SFTCollator(processor, stages="all")
    with pytest.raises(ValueError, match="room for 8"):
        SFTCollator(processor, max_context=8)([row(spans=[[1.0, 2.0]])])
