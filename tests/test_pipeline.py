# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The pipeline: real H.264 files and a tiny model; whatever it is called with, each answer is that of its own video."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_processor import Scripted, assert_same, model_for, tiny_processor
from torch.utils.data import Dataset
from transformers import GenerationConfig, pipeline
from transformers.utils import logging
from video_files import numbered_frames, write_video

import d2vlm_hf
from d2vlm_hf.model.answers_d2vlm import format_span
from d2vlm_hf.model.generation_d2vlm import EvidenceStreamer
from d2vlm_hf.model.pipeline_d2vlm import MAX_NEW_TOKENS, VideoGroundingPipeline
from d2vlm_hf.model.requests_d2vlm import join_inputs
from d2vlm_hf.model.spans_d2vlm import temporal_iou


QUESTION = "When does the man open the door?"
OTHER = "How many times does the person jump?"
ANSWER = "The man opens the door at <evi> and again at <evi>."


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """4.0, 2.5 and 0.4 s at 10 frames a second: 8, 5 and 1 sampled frames."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{count}.mp4", count) for count in (40, 25, 4)]


@pytest.fixture(scope="module")
def pipe() -> VideoGroundingPipeline:
    processor = tiny_processor()
    model = model_for(processor, evidence_threshold=0.97)
    return VideoGroundingPipeline(model=model, processor=processor, device="cpu", max_new_tokens=10)


def script(pipe, *answers: str) -> dict:
    """Options that make the model say the answers, one per row, each with its grounding part."""
    rows = [pipe.processor.encode_response(text, text.count("<evi>"))[:-1] for text in answers]
    return {
        "generate_kwargs": {"logits_processor": [Scripted(rows, pipe.processor.end_of_turn_id)]},
        "max_new_tokens": 64,
    }


# ---- one video ------------------------------------------------------------------------------------------------------


def test_an_answer_is_what_generate_says(pipe, videos):
    options = script(pipe, ANSWER)
    result = pipe(videos[0], question=QUESTION, return_curves=True, **options)
    inputs = pipe.processor.ask(QUESTION, videos[0], return_metadata=True)
    video = inputs.pop("video_metadata")[0]
    with torch.no_grad():
        output = pipe.model.generate(
            **inputs, **script(pipe, ANSWER)["generate_kwargs"], max_new_tokens=64, return_dict_in_generate=True,
            eos_token_id=pipe.processor.end_of_turn_id,
        )  # fmt: skip
    trace = output.evidence_trace
    times = video["timestamps"]
    entries = []
    for (first, last), score in zip(trace.spans[0], trace.scores[0], strict=True):
        end = times[last] if last > first else times[first] + 0.5
        entries.append({"start": times[first], "end": end, "score": score})
    assert len(entries) == 4
    assert_same(result["evidence"], entries[:2])
    stamps = [format_span(entry["start"], entry["end"]) for entry in entries[2:]]
    assert result["answer"] == "The man opens the door at {} and again at {}.".format(*stamps)
    for k, (entry, reference) in enumerate(zip(entries[2:], result["references"], strict=True)):
        assert_same({key: reference[key] for key in entry}, entry)
        assert reference["evidence"] == k
        assert result["answer"][reference["char_start"] : reference["char_end"]] == stamps[k]
    assert result["times"] == times.tolist()
    assert_same(result["curves"], [curve.tolist() for curve in trace.curves[0][:2]])
    assert (result["fps"], result["duration"]) == (2.0, 4.0)
    json.dumps(result)


def test_no_event_and_one_frame(pipe, videos):
    none = pipe(videos[0], question=QUESTION, return_curves=True, **script(pipe, "That does not happen."))
    assert none["answer"] == "That does not happen."
    assert none["evidence"] == none["references"] == none["curves"] == []
    one = pipe(videos[2], question=QUESTION, **script(pipe, "At <evi>."))
    assert one["answer"] == "At 0.0s - 0.5s."
    assert [(e["start"], e["end"]) for e in one["evidence"]] == [(0.0, 0.5)]


def test_an_answer_cut_off_behind_a_span_keeps_it(pipe, videos):
    options = {**script(pipe, ANSWER), "max_new_tokens": 1}
    result = pipe(videos[0], question=QUESTION, **options)
    assert result["answer"] == ""
    assert len(result["evidence"]) == 1


def test_sampling_options(pipe, videos):
    options = {"question": QUESTION, **script(pipe, "At <evi>."), "return_curves": True}
    assert len(pipe(videos[0], fps=5.0, **options)["times"]) == 20
    assert len(pipe(videos[0], max_frames=4, **options)["times"]) == 4
    assert pipe(videos[0], max_frames=4, **options)["fps"] == 1.0


def test_given_moments_are_read(pipe, videos):
    question = "What happens in <evi>?"
    results = [
        pipe(videos[0], question=question, question_spans=[spans], return_curves=True, **script(pipe, "At <evi>."))
        for spans in ([0.0, 1.0], [2.0, 3.0])
    ]
    assert results[0]["curves"] != results[1]["curves"]
    item = {"video": videos[0], "question": question, "question_spans": [[2.0, 3.0]]}
    assert_same(pipe(item, return_curves=True, **script(pipe, "At <evi>.")), results[1])


def test_frames_of_every_kind(pipe, videos, tmp_path):
    frames = numbered_frames(20)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    expected = pipe(tensor, question=QUESTION, video_fps=4.0)
    assert expected["duration"] == 5.0
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    seconds = (np.arange(20) / 4).tolist()
    for same in (
        pipe(frames, question=QUESTION, timestamps=seconds),
        pipe(pictures, question=QUESTION, video_fps=4.0),
        pipe(tmp_path, question=QUESTION, video_fps=4.0),
        pipe({"video": tensor, "question": QUESTION, "timestamps": seconds}),
        pipe(tensor[None], question=QUESTION, video_fps=4.0)[0],
    ):
        assert_same(same, expected)
    mixed = [{"video": videos[1]}, {"video": tensor, "video_fps": 4.0}, {"video": frames, "timestamps": seconds}]
    results = pipe(mixed, question=QUESTION, batch_size=3)
    assert_same(results[1:], [expected, expected])
    with open(videos[1], "rb") as file:
        content = file.read()
        for same in (content, {"bytes": content, "path": None}, {"path": videos[1], "bytes": None}, file):
            assert_same(pipe(same, question=QUESTION), results[0])


# ---- several questions, several videos ------------------------------------------------------------------------------


def test_several_questions_encode_the_video_once(pipe, videos, monkeypatch):
    seen = []
    encode = pipe.model.model.encode_patches
    monkeypatch.setattr(pipe.model.model, "encode_patches", lambda frames: seen.append(len(frames)) or encode(frames))
    questions = [QUESTION, OTHER, "What is in <evi>?"]
    together = pipe(video=videos[0], question=questions, question_spans=[None, [], [[1.0, 2.0]]])
    assert seen == [8]
    single = [pipe(videos[0], question=q) for q in questions[:2]]
    single.append(pipe(videos[0], question=questions[2], question_spans=[[1.0, 2.0]]))
    assert seen == [8] * 4
    assert_same(together, single)
    assert len({result["answer"] for result in together}) > 1
    assert_same(pipe(videos[0], question=[OTHER]), [single[1]])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_batch_is_its_single_runs(pipe, videos, batch_size):
    inputs = [{"video": v, "question": q} for v, q in zip(videos, (QUESTION, OTHER, "Where?"), strict=True)]
    inputs += [
        {"video": videos[1], "question": [QUESTION, OTHER]},
        {"video": videos[0], "question": "What is <evi>?", "question_spans": [[0.5, 1.5]]},
    ]
    single = [pipe(item, return_curves=True) for item in inputs]
    assert isinstance(single[3], list)
    assert_same(pipe(inputs, batch_size=batch_size, return_curves=True), single)


def test_batches_in_which_every_row_grounds(pipe, videos):
    answers = ["At <evi>.", "At <evi>, then at <evi>.", "It does not happen."]
    single = [pipe(v, question=QUESTION, **script(pipe, a)) for v, a in zip(videos, answers, strict=True)]
    assert [len(result["evidence"]) for result in single] == [1, 2, 0]
    assert_same(pipe(videos, question=QUESTION, batch_size=3, **script(pipe, *answers)), single)


class Rows(Dataset):
    """A data set that can be indexed and does not say when it ends."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i % len(self.rows)]


def test_lists_data_sets_and_generators(pipe, videos):
    expected = [pipe(v, question=QUESTION) for v in videos]
    rows = [{"video": v, "question": QUESTION, "answer": "?", "spans": [[0, 1]], "id": "1"} for v in videos]
    assert_same(pipe(videos, question=QUESTION), expected)
    assert_same(pipe(tuple(videos), question=[QUESTION] * 3, batch_size=2), expected)
    assert_same(pipe(rows), expected)
    for stream in (Rows(rows), iter(rows), (row for row in rows)):
        results = pipe(stream, batch_size=2)
        assert iter(results) is results
        assert_same(list(results), expected)
    assert_same(list(pipe((v for v in videos), question=QUESTION)), expected)
    assert pipe([], question=QUESTION) == []


def test_generators_are_read_batch_by_batch(pipe, videos):
    read = []

    def stream():
        for video in videos * 2:
            read.append(video)
            yield video

    results = pipe(stream(), question=QUESTION, batch_size=2)
    next(results)
    assert len(read) <= 3


def test_columns_of_a_data_set_are_rows(videos, pipe):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"video": videos[:2], "question": [QUESTION, OTHER], "question_spans": [[], []]})
    expected = [pipe(videos[0], question=QUESTION), pipe(videos[1], question=OTHER)]
    assert_same(list(pipe(rows, batch_size=2)), expected)


def test_questions_of_lists_and_of_their_items():
    items = join_inputs(["a.mp4", {"video": "b.mp4", "question": "Own?"}], "All?", [[0, 1]])
    assert items == [
        {"video": "a.mp4", "question": "All?", "question_spans": [[0, 1]]},
        {"video": "b.mp4", "question": "Own?"},
    ]
    (item,) = join_inputs([{"bytes": b"", "path": "c.mp4"}], ["What?"], None)
    assert item == {"video": {"bytes": b"", "path": "c.mp4"}, "question": "What?", "question_spans": None}


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def messages(caplog):
    """What transformers says aloud."""
    logging.enable_propagation()
    yield lambda: [record.message for record in caplog.records if record.levelname != "INFO"]
    logging.disable_propagation()


def test_greedy_whatever_the_checkpoint_says(pipe, videos, monkeypatch, messages):
    expected = pipe(videos[0], question=QUESTION)
    wild = GenerationConfig(do_sample=True, temperature=5.0, top_p=0.9, top_k=7, num_beams=4, max_length=30)
    monkeypatch.setattr(pipe.model, "generation_config", wild)
    assert_same(pipe(videos[0], question=QUESTION), expected)
    assert messages() == []


def test_sampling_where_it_is_asked_for(pipe, videos):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return pipe(videos[0], question=QUESTION, **options)

    options = {"generate_kwargs": {"do_sample": True, "temperature": 2.0}}
    assert_same(sample(0, **options), sample(0, **options))
    assert sample(0, **options) != sample(1, **options)
    config = GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=10)
    before = copy.deepcopy(config).to_dict()
    assert_same(sample(0, generate_kwargs={"generation_config": config}), sample(0, **options))
    assert config.to_dict() == before
    greedy = pipe(videos[0], question=QUESTION, generate_kwargs={"generation_config": GenerationConfig()})
    assert_same(greedy, pipe(videos[0], question=QUESTION))


def test_several_answers_per_question(pipe, videos):
    options = {"generate_kwargs": {"do_sample": True, "num_return_sequences": 2}, "batch_size": 2}
    first, second = pipe(
        [{"video": videos[0], "question": [QUESTION, OTHER]}, {"video": videos[1], "question": OTHER}], **options
    )
    assert [len(answers) for answers in first] == [2, 2]
    assert [answer["duration"] for answers in first for answer in answers] == [4.0] * 4
    assert [answer["duration"] for answer in second] == [2.5, 2.5]


def test_length_of_answers(pipe, videos):
    never = Scripted([[300] * 40], 300)
    result = pipe(videos[2], question=QUESTION, max_new_tokens=7, generate_kwargs={"logits_processor": [never]})
    (word,) = pipe.processor.tokenizer.convert_ids_to_tokens([300])
    assert result["answer"] == word * 7
    lengths = [
        pipe._generate_options(*options)["max_new_tokens"]
        for options in ((None, {}), (9, {}), (9, {"max_new_tokens": 8}))
    ]
    assert lengths == [MAX_NEW_TOKENS, 9, 8] == [256, 9, 8]


def test_stops_at_the_end_of_the_turn_and_of_the_text(pipe, videos, monkeypatch):
    monkeypatch.setattr(pipe.model.generation_config, "eos_token_id", 17)
    ids = pipe.processor.encode_response("At last.", 0)[:-1]
    for stop in (pipe.processor.end_of_turn_id, pipe.processor.tokenizer.eos_token_id):
        options = {"generate_kwargs": {"logits_processor": [Scripted([[*ids, stop, *ids]], stop)]}}
        assert pipe(videos[0], question=QUESTION, max_new_tokens=64, **options)["answer"] == "At last."
    assert pipe._generate_options(None, {})["eos_token_id"] == [*pipe.processor.stop_token_ids, 17]


def test_a_streamer_hears_words_and_spans(pipe, videos, capsys):
    streamer = EvidenceStreamer(pipe.processor.tokenizer)
    result = pipe(videos[1], question=QUESTION, streamer=streamer, **script(pipe, "The door at <evi>."))
    printed = capsys.readouterr().out
    evidence, reference = result["evidence"][0], result["references"][0]
    for span in (evidence, reference):
        assert f"[{span['start']:.1f}s - " in printed
    assert "The door at" in printed
    assert streamer.times is None
    with pytest.raises(ValueError, match="a streamer was given for 2 questions at once: their words would be mixed"):
        pipe(videos[1], question=[QUESTION, OTHER], streamer=streamer)


def test_low_scores_are_left_out(pipe, videos):
    options = script(pipe, ANSWER)
    result = pipe(videos[0], question=QUESTION, **options)
    scores = [entry["score"] for entry in result["evidence"]]
    assert scores[0] != scores[1]
    kept = pipe(videos[0], question=QUESTION, min_score=max(scores), **options)
    assert [entry["score"] for entry in kept["evidence"]] == [max(scores)]
    assert [r["evidence"] for r in kept["references"]] == ([0, None] if scores[0] > scores[1] else [None, 0])
    assert kept["answer"] == result["answer"]


# ---- what cannot be done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"question": QUESTION}, r"no video was given: answers are found in one\. Call pipe\(video, question="),
        ({"video": "a"}, "question=None asks nothing: it must be words"),
        ({"video": "a", "question": []}, r"question=\[\] asks nothing"),
        ({"video": "a", "question": [1]}, r"question=\[1\] asks nothing"),
        ({"video": {"question": QUESTION}}, r"the input has the keys \['question'\] but no 'video'"),
        ({"video": {"video": ["a", "b"], "question": "c"}}, "'video' holds 2 videos: a question is about one"),
        (
            {"video": ["a", "b"], "question": ["c"]},
            "1 questions for a list of 2 videos: in a list each video has its own",
        ),
        (
            {"video": ["a"], "question": ["c"], "question_spans": [[], []]},
            "2 lists of question_spans for a list of 1 vid",
        ),
        ({"video": iter("ab"), "question": ["c"]}, "1 questions beside a stream of videos: nothing says which"),
        ({"video": "a", "question": ["b", "c"], "question_spans": [[]]}, "1 lists of question_spans for 2 questions"),
        ({"video": "a", "question": "Is <evi> it?"}, "holds <evi> without a span: it stands for a moment of the video"),
        ({"video": "a", "question": "Is <video> it?"}, "holds <video>, the token that frames stand in for"),
        ({"video": "gone.mp4", "question": QUESTION}, r"gone\.mp4 does not exist"),
    ],
)
def test_what_cannot_be_asked(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, r"unknown option temperature: it would have no effect.*generate_kwargs"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 leaves no answer"),
        ({"min_score": 50}, "min_score=50 is no score: scores are mean probabilities"),
        ({"generate_kwargs": {"max_length": 99}}, "max_length=99 counts the frames and the padding of a batch too"),
        ({"generate_kwargs": {"generation_config": GenerationConfig(max_length=9)}}, "max_length=9 counts the frames"),
        ({"generate_kwargs": {"num_beams": 2}}, "cannot carry evidence: beams and drafts are reordered"),
        ({"question": " "}, "the question is empty"),
        ({"question_spans": [[1, 2]]}, "has 0 <evi> for 1 given spans"),
        ({"question": "Is <evi> it?", "question_spans": [[3.0, 9.0]]}, "it ends after the video"),
        ({"fps": -1.0}, r"fps=-1\.0 is no sampling rate"),
        ({"max_frames": 0}, "max_frames=0 leaves nothing to look at"),
        (
            {"fps": 10.0, "max_new_tokens": 450},
            r"the prompt has 77 tokens, .* has room for 62\. Lower fps or set max_f",
        ),
    ],
)
def test_options_that_make_no_sense(pipe, videos, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"video": videos[0], "question": QUESTION, **options})


def test_of_many_inputs_the_one_that_fails_is_named(pipe, videos, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for batch_size in (1, 2, 4):
        with pytest.raises(ValueError, match=r"^input 2: .*broken\.mp4"):
            pipe([videos[0], videos[1], broken, videos[2]], question=QUESTION, batch_size=batch_size)
        with pytest.raises(ValueError, match=r"^input 1: question=None asks nothing"):
            pipe([{"video": videos[0], "question": QUESTION}, {"video": videos[1]}], batch_size=batch_size)
    results = pipe(iter([videos[0], broken]), question=QUESTION)
    assert next(results)["duration"] == 4.0
    with pytest.raises(ValueError, match=r"^input 1: "):
        next(results)
    with pytest.raises(ValueError, match="batch_size=0 is no number of videos"):
        pipe(videos, question=QUESTION, batch_size=0)


def test_nothing_about_a_request_stays_behind(pipe, videos):
    def state():
        objects = (pipe, pipe.model, pipe.processor, pipe.processor.tokenizer, pipe.processor.qformer_tokenizer)
        return (
            [set(vars(item)) for item in objects],
            pipe.model.generation_config.to_dict(),
            pipe.model.config.to_dict(),
        )

    expected, before = pipe(videos[0], question=QUESTION), state()
    item = {"video": videos[1], "question": "What is <evi>?", "question_spans": [[0.0, 1.0]]}
    pipe([item, item], batch_size=2, min_score=1.0, fps=5.0, **script(pipe, ANSWER))
    for wrong in (
        {"question": ""},
        {"question": QUESTION, "fps": -1.0},
        {"question": QUESTION, "generate_kwargs": {"num_beams": 3}},
    ):
        with pytest.raises(ValueError):
            pipe(videos[0], **wrong)
    assert state() == before
    assert_same(pipe(videos[0], question=QUESTION), expected)


def test_model_and_processor_must_belong_together(pipe):
    with pytest.raises(ValueError, match="the pipeline has no processor"):
        VideoGroundingPipeline(model=pipe.model)
    other = tiny_processor(qformer=False)
    with pytest.raises(
        ValueError, match="the model's Q-Former reads the question, but the processor has no qformer_tok"
    ):
        VideoGroundingPipeline(model=pipe.model, processor=other)
    model = copy.deepcopy(pipe.model)
    model.config.evidence_token_id = 3
    with pytest.raises(ValueError, match=r"as tokens \(364, 3, 366\) and the processor as \(364, 365, 366\)"):
        VideoGroundingPipeline(model=model, processor=pipe.processor)


# ---- the shipped checkpoint -----------------------------------------------------------------------------------------


def test_the_shipped_checkpoint_is_the_default(videos):
    result = pipeline("video-grounding")(videos[0], question=QUESTION)
    assert set(result) == {"answer", "evidence", "references", "fps", "duration"}


def test_the_shipped_checkpoint_grounds_the_shipped_clip():
    clip = Path(d2vlm_hf.bundled_clip())
    known = json.loads(clip.with_suffix(".json").read_text())
    result = pipeline("video-grounding")(str(clip), question=known["question"])
    (moment,) = result["evidence"]
    assert float(temporal_iou([[moment["start"], moment["end"]]], known["spans"])[0, 0]) >= 0.75
    assert "red circle" in result["answer"].lower()  # `appears`, `becomes visible` and the like: the wording is its own
    assert result["references"][0]["evidence"] == 0


def test_the_shipped_checkpoint_is_small_and_tells_no_path():
    folder = Path(d2vlm_hf.bundled_checkpoint())
    assert (folder / "model.safetensors").stat().st_size < 15e6
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    texts = [path.read_text() for path in folder.rglob("*config.json")]
    assert not any(place in text for text in texts for place in ('"/', "/home/", "site-packages"))
