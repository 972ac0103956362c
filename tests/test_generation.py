# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Generation: every `<evi>` gets the span that a full recomputation would give it, for each row on its own."""

import copy
import math
import threading

import pytest
import tiny_models as tiny
import torch
from test_evidence import slow_sigmoid, slow_span
from tiny_models import (
    CONNECTORS,
    EOS,
    EVIDENCE,
    EVIDENCE_END,
    SAMPLES,
    TEXT_MODELS,
    VIDEO,
    Sample,
    prompt_batch,
    tiny_model,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CompileConfig, DynamicCache, LogitsProcessor, PreTrainedTokenizerFast, TextStreamer

from d2vlm_hf.model.generation_d2vlm import EvidenceStreamer, EvidenceTrace


every_text_model = pytest.mark.parametrize("text", TEXT_MODELS)

# The shape of a response: two events, the end of the grounding part, free words, a reference, free words.
PLAN = {0: EVIDENCE, 1: EVIDENCE, 2: EVIDENCE_END, 5: EVIDENCE}
STEPS = 9
NEVER = [EVIDENCE, EOS, VIDEO]  # unless forced


class Force(LogitsProcessor):
    """Chooses the token of some steps: one for all rows, or one for each (`None`: free)."""

    def __init__(self, prompt: int, plan: dict[int, int | list[int | None]]):
        self.prompt, self.plan = prompt, plan

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, NEVER] = -math.inf
        wanted = self.plan.get(input_ids.shape[1] - self.prompt)
        for row in range(len(scores)):
            token = wanted[row] if isinstance(wanted, list) else wanted
            if token is not None:
                scores[row] = -math.inf
                scores[row, token] = 0.0
        return scores


def generate(model, batch, plan=None, steps: int = STEPS, **options):
    """`generate` with forced tokens; logits and the trace come along."""
    prompt = 0 if "inputs_embeds" in batch else batch["input_ids"].shape[1]
    settings = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": tiny.PAD, "eos_token_id": EOS}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    force = Force(prompt, PLAN if plan is None else plan)
    return model.generate(**{"logits_processor": [force], **settings, **batch, **options})


def answers(output, batch) -> list[list[int]]:
    return output.sequences[:, 0 if "inputs_embeds" in batch else batch["input_ids"].shape[1] :].tolist()


def recompute(model, sample: Sample, plan=None, steps: int = STEPS):
    """Greedy decoding without a cache: the whole sequence again for each token, with the spans decoded so far."""
    plan, tokens = PLAN if plan is None else plan, []
    spans, role = sample.evidence(None)
    scores, curves, logits = [], [], []
    for step in range(steps):
        extra = {}
        if spans:
            extra = {"evidence_spans": torch.tensor([spans]), "evidence_role": torch.tensor([role])}
        with torch.no_grad():
            state = model(input_ids=torch.tensor([sample.prompt + tokens]), **extra, **tiny.video_inputs([sample]))
        logits.append(state.logits[0, -1])
        free = state.logits[0, -1].clone()
        free[NEVER] = -math.inf
        tokens.append(plan.get(step, free.argmax().item()))
        if tokens[-1] == EVIDENCE:
            keys, query = state.frame_keys[0], state.next_query[0]
            curve = [(query @ key).item() / tiny.HIDDEN**0.5 for key in keys]
            span, score = slow_span(curve, model.config.evidence_threshold)
            role.append(2 if EVIDENCE_END in tokens else 1)
            spans = [*spans, span]
            scores.append(score)
            curves.append([slow_sigmoid(x) for x in curve])
    return tokens, spans[len(sample.given) :], scores, curves, torch.stack(logits)


def assert_is_recomputed(output, batch, row: int, expected, tolerance: float = 3e-5):
    tokens, spans, scores, curves, logits = expected
    trace = output.evidence_trace
    assert answers(output, batch)[row] == tokens
    assert trace.spans[row] == spans
    assert trace.scores[row] == pytest.approx(scores, abs=1e-5)
    assert [c.tolist() for c in trace.curves[row]] == [pytest.approx(c, abs=1e-5) for c in curves]
    got = torch.stack([step[row] for step in output.logits])
    assert torch.allclose(got, logits, rtol=0, atol=tolerance), (got - logits).abs().max()


# ---- one row ----------------------------------------------------------------------------------------------------


@every_text_model
@pytest.mark.parametrize("connector", CONNECTORS)
def test_greedy_decoding_equals_a_full_recomputation_for_each_token(text, connector):
    model = tiny_model(text, connector)
    for sample in (SAMPLES[0], SAMPLES[1]):  # with and without a moment in the question
        batch, expected = prompt_batch([sample]), recompute(model, sample)
        assert_is_recomputed(generate(model, batch), batch, 0, expected)


def test_capture_is_felt_by_the_tokens_that_follow():
    one, other = tiny_model(), tiny_model(visual_capture=False)
    batch = prompt_batch(SAMPLES[:1])
    with_capture, without = generate(one, batch), generate(other, batch)
    assert torch.equal(with_capture.logits[0], without.logits[0])
    assert not torch.allclose(with_capture.logits[1], without.logits[1], atol=1e-2)
    assert with_capture.evidence_trace.spans[0][0] == without.evidence_trace.spans[0][0]
    assert_is_recomputed(without, batch, 0, recompute(other, SAMPLES[0]))


def test_a_response_without_events():
    model, batch = tiny_model(), prompt_batch(SAMPLES)
    output = generate(model, batch, plan={0: EVIDENCE_END})
    trace = output.evidence_trace
    assert trace.spans == trace.scores == trace.curves == [[], [], []]
    for row, sample in enumerate(SAMPLES):
        assert_is_recomputed(output, batch, row, recompute(model, sample, plan={0: EVIDENCE_END}))


def test_a_response_can_be_taken_up_in_the_middle():
    """`<evi>` tokens that stand in the prompt with their spans are read, and not reported again."""
    model, sample = tiny_model(), SAMPLES[0]
    tokens, spans, _, _, logits = recompute(model, sample)
    batch = prompt_batch([sample])
    batch["input_ids"] = torch.tensor([sample.prompt + tokens[:4]])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["evidence_spans"] = torch.tensor([[*sample.given, *spans[:2]]])
    batch["evidence_role"] = torch.tensor([[0, 1, 1]])
    output = generate(model, batch, plan={1: EVIDENCE}, steps=STEPS - 4)
    assert answers(output, batch) == [tokens[4:]]
    assert output.evidence_trace.spans == [spans[2:]]
    assert torch.allclose(torch.cat(output.logits), logits[4:], rtol=0, atol=3e-5)


@pytest.mark.parametrize("text", ["llama", "gemma", "qwen2-sliding"])
def test_embeddings_instead_of_ids(text):
    model = tiny_model(text)
    batch = prompt_batch(SAMPLES)
    expected = generate(model, batch)
    embeds = {k: v for k, v in batch.items() if k != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    output = generate(model, embeds)
    assert answers(output, embeds) == answers(expected, batch)
    assert output.evidence_trace.spans == expected.evidence_trace.spans


def test_text_without_a_video():
    model = tiny_model()
    batch = {"input_ids": torch.tensor([[1, 5, 9], [1, 4, 8]])}
    output = generate(model, batch)
    assert answers(output, batch)[0][:3] == [EVIDENCE, EVIDENCE, EVIDENCE_END]
    assert output.evidence_trace.spans == [[], []]  # there is nothing to see


# ---- batches ----------------------------------------------------------------------------------------------------


@every_text_model
def test_three_videos_of_different_length_with_two_sequences_each_equal_the_single_runs(text):
    model, batch = tiny_model(text), prompt_batch(SAMPLES)
    expected = [recompute(model, sample) for sample in SAMPLES]
    greedy = generate(model, batch)
    sampled = generate(model, batch, do_sample=True, temperature=1e-3, num_return_sequences=2)
    assert len(sampled.sequences) == 6
    for row in range(3):
        assert_is_recomputed(greedy, batch, row, expected[row])
        for copy_of_row in (2 * row, 2 * row + 1):
            assert_is_recomputed(sampled, batch, copy_of_row, expected[row])


def test_sampled_rows_have_their_own_evidence():
    """Hot sampling: rows of one video part ways, and each is what its own tokens say."""
    model = tiny_model()
    batch = prompt_batch(SAMPLES[:2])
    plan = {0: EVIDENCE, 1: EVIDENCE_END, 3: EVIDENCE, 6: [EVIDENCE, None] * 4}
    torch.manual_seed(3)
    output = generate(model, batch, plan=plan, do_sample=True, temperature=5.0, num_return_sequences=4)
    trace, rows = output.evidence_trace, answers(output, batch)
    assert len({tuple(row) for row in rows}) > 4
    assert [len(s) for s in trace.spans] == [3, 2] * 4
    for row, tokens in enumerate(rows):
        forced = dict(enumerate(tokens))
        assert_is_recomputed(output, batch, row, recompute(model, SAMPLES[row // 4], plan=forced))


@every_text_model
def test_a_static_cache_gives_the_same(text):
    model, batch = tiny_model(text), prompt_batch(SAMPLES)
    expected = generate(model, batch)
    output = generate(model, batch, cache_implementation="static", disable_compile=True)
    assert answers(output, batch) == answers(expected, batch)
    assert output.evidence_trace.spans == expected.evidence_trace.spans
    assert torch.allclose(torch.stack(output.logits), torch.stack(expected.logits), rtol=0, atol=3e-5)


def test_a_compiled_step_has_no_graph_break():
    model, batch = tiny_model(), prompt_batch(SAMPLES)
    expected = generate(model, batch, steps=4)
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True  # by default only accelerators compile
    output = generate(model, batch, steps=4, cache_implementation="static", compile_config=settings)
    assert answers(output, batch) == answers(expected, batch)
    assert output.evidence_trace.spans == expected.evidence_trace.spans


def test_as_many_spans_as_evidence_tokens_in_every_row_also_after_its_end():
    model, batch = tiny_model(), prompt_batch(SAMPLES)
    plan = {
        0: [EVIDENCE, EOS, EVIDENCE_END],
        1: [EVIDENCE, None, None],
        2: [EVIDENCE_END, None, EOS],
        3: [EVIDENCE, EVIDENCE, EVIDENCE],  # two rows have ended: they are padded, whatever is forced
    }
    output = generate(model, batch, plan=plan, steps=6)
    rows = answers(output, batch)
    assert rows[1] == [EOS] + [tiny.PAD] * 5
    assert rows[2][2:] == [EOS] + [tiny.PAD] * 3
    trace = output.evidence_trace
    for row, tokens in enumerate(rows):
        counts = {len(trace.spans[row]), len(trace.scores[row]), len(trace.curves[row])}
        assert counts == {tokens.count(EVIDENCE)}
        assert all(curve.shape == (SAMPLES[row].frames,) for curve in trace.curves[row])
    assert [len(spans) for spans in trace.spans] == [3, 0, 0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7])
def test_as_many_spans_as_evidence_tokens_wherever_the_limit_cuts(steps):
    model, batch = tiny_model(), prompt_batch(SAMPLES)
    plan = {0: EVIDENCE, 1: [EVIDENCE, EVIDENCE_END, EVIDENCE], 2: EVIDENCE_END, 4: [None, EVIDENCE, None], 6: EVIDENCE}
    whole = generate(model, batch, plan=plan, steps=9).evidence_trace
    output = generate(model, batch, plan=plan, steps=steps)
    for row, tokens in enumerate(answers(output, batch)):
        count = tokens.count(EVIDENCE)
        assert output.evidence_trace.spans[row] == whole.spans[row][:count]
        assert output.evidence_trace.scores[row] == pytest.approx(whole.scores[row][:count])
        assert len(output.evidence_trace.curves[row]) == count


def test_scores_are_the_means_of_the_curves_over_the_spans():
    trace = generate(tiny_model(), prompt_batch(SAMPLES)).evidence_trace
    for spans, scores, curves in zip(trace.spans, trace.scores, trace.curves, strict=True):
        for (first, last), score, curve in zip(spans, scores, curves, strict=True):
            assert score == pytest.approx(curve[first : last + 1].mean().item(), rel=1e-5)
            assert curve.dtype == torch.float32


# ---- ways to bring the video ------------------------------------------------------------------------------------


def stored(model, batch, kind: str) -> dict:
    """The same prompts with patches or features in place of pixels."""
    names = ("pixel_values_videos", "num_frames", "qformer_input_ids", "qformer_attention_mask")
    with torch.no_grad():
        if kind == "patch_features":
            patches = model.model.encode_patches(batch["pixel_values_videos"])
            return {k: v for k, v in batch.items() if k != "pixel_values_videos"} | {"patch_features": patches}
        features = model.get_video_features(**{name: batch[name] for name in names})
    return {k: v for k, v in batch.items() if k not in names} | {"mm_encoder_outputs": {"video": features}}


@pytest.mark.parametrize("kind", ["patch_features", "mm_encoder_outputs"])
@pytest.mark.parametrize("copies", [1, 2])
def test_stored_features_give_the_same_as_often_as_they_are_used(kind, copies):
    model, batch = tiny_model(), prompt_batch(SAMPLES)
    expected = generate(model, batch)
    inputs = stored(model, batch, kind)
    for _ in range(2):
        output = generate(model, inputs, num_return_sequences=copies, do_sample=copies > 1, top_k=1)
        assert answers(output, batch) == [tokens for tokens in answers(expected, batch) for _ in range(copies)]
        assert output.evidence_trace.spans == [s for s in expected.evidence_trace.spans for _ in range(copies)]
    if kind == "mm_encoder_outputs":
        assert len(inputs["mm_encoder_outputs"]["video"].pooler_output) == len(SAMPLES)


def test_two_questions_about_one_video():
    model = tiny_model()
    one, other = Sample(5, seed=1), Sample(5, seed=6, after=6, given=[(1, 1)])
    other.pixels = one.pixels
    batch = prompt_batch([one, other])
    expected, frames = generate(model, batch), []
    shared = {**batch, "pixel_values_videos": one.pixels, "num_frames": torch.tensor([5])}
    shared["video_index"] = torch.tensor([0, 0])
    model.model.vision_tower.get_input_embeddings().register_forward_pre_hook(
        lambda m, args: frames.append(len(args[0]))
    )
    output = generate(model, shared)
    assert frames == [5]
    assert answers(output, batch) == answers(expected, batch)
    assert output.evidence_trace.spans == expected.evidence_trace.spans


# ---- what comes back --------------------------------------------------------------------------------------------


def test_plain_ids_fill_the_trace_that_was_passed():
    model, batch = tiny_model(), prompt_batch(SAMPLES)
    expected, trace = generate(model, batch), EvidenceTrace()
    ids = generate(model, batch, return_dict_in_generate=False, output_logits=False, evidence_trace=trace)
    assert torch.equal(ids, expected.sequences)
    assert trace.spans == expected.evidence_trace.spans
    assert trace.scores == expected.evidence_trace.scores


def test_a_trace_that_is_used_again_starts_empty():
    model, trace = tiny_model(), EvidenceTrace()
    generate(model, prompt_batch(SAMPLES), steps=12, evidence_trace=trace)
    short = prompt_batch(SAMPLES[2:])
    generate(model, short, steps=1, evidence_trace=trace)
    assert [len(spans) for spans in trace.spans] == [1]
    generate(model, {"input_ids": torch.tensor([[1, 5, 9]])}, steps=3, evidence_trace=trace)
    assert trace.spans == [[]]


def test_states_attentions_and_scores_on_request():
    model, batch = tiny_model(attention="eager"), prompt_batch(SAMPLES)
    output = generate(model, batch, steps=3, output_hidden_states=True, output_attentions=True, output_scores=True)
    assert len(output.hidden_states) == len(output.attentions) == len(output.scores) == 3
    assert len(output.hidden_states[0]) == tiny.LAYERS + 1
    assert output.evidence_trace.spans == generate(model, batch, steps=3).evidence_trace.spans


def test_bfloat16():
    output = generate(tiny_model().bfloat16(), prompt_batch(SAMPLES))
    trace = output.evidence_trace
    assert [len(s) for s in trace.spans] == [3, 3, 3]
    assert all(curve.dtype == torch.float32 for curves in trace.curves for curve in curves)


# ---- streaming --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(tiny.VIDEO)} | {"<video>": tiny.VIDEO, "<evi>": EVIDENCE, "</evi>": EVIDENCE_END}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"additional_special_tokens": ["<video>", "<evi>", "</evi>"]})
    return fast


@pytest.mark.parametrize("seconds", [True, False])
def test_the_streamer_prints_spans_where_their_tokens_stand(tokenizer, capsys, seconds):
    model, batch = tiny_model(), prompt_batch(SAMPLES[:1])
    times = [0.0, 0.52, 1.04, 1.56, 2.08]
    streamer = EvidenceStreamer(tokenizer, times=times if seconds else None)
    output = generate(model, batch, streamer=streamer)
    trace, tokens = output.evidence_trace, answers(output, batch)[0]
    places = []
    for (first, last), score in zip(trace.spans[0], trace.scores[0], strict=True):
        span = f"{times[first]:.1f}s - {times[last]:.1f}s" if seconds else f"frames {first}-{last}"
        places.append(f"[{span}, {score:.2f}]")
    # two spans, the end, two words, a span, words
    words = [tokenizer.decode([t]) for t in tokens]
    expected = " ".join([*places[:2], *words[3:5], places[2], *words[6:]])
    assert capsys.readouterr().out.split() == expected.split()


def test_the_streamer_prints_a_span_before_the_next_token_is_chosen(tokenizer):
    model, batch, events = tiny_model(), prompt_batch(SAMPLES[:1]), []

    class Log(EvidenceStreamer):
        def put(self, value):
            events.append(value.tolist())

        def end(self):
            events.append("end")

        def put_evidence(self, span, score):
            events.append((span, round(score, 4)))

    output = generate(model, batch, streamer=Log(tokenizer))
    trace = output.evidence_trace
    spans = iter(zip(trace.spans[0], [round(s, 4) for s in trace.scores[0]], strict=True))
    expected = [batch["input_ids"].tolist()]
    for token in answers(output, batch)[0]:
        expected += [[token]] + ([next(spans)] if token == EVIDENCE else [])
    assert events == [*expected, "end"]


def test_a_streamer_that_knows_nothing_of_evidence_works_too(tokenizer, capsys):
    model, batch = tiny_model(), prompt_batch(SAMPLES[:1])
    output = generate(model, batch, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(answers(output, batch)[0]).split()


# ---- nothing stays on the module --------------------------------------------------------------------------------


def state_of(model) -> dict:
    """Every attribute of every module, by identity, and the entries of those that are dicts."""
    tree = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            tree[f"{name}.{key}"] = id(value)
            if isinstance(value, dict):
                tree |= {f"{name}.{key}[{k}]": id(v) for k, v in value.items()}
    return tree


def test_nothing_about_a_request_is_left_on_the_module():
    model = tiny_model()
    generate(model, prompt_batch(SAMPLES))  # transformers installs its output hooks once
    before, settings = state_of(model), model.generation_config.to_dict()
    config = copy.deepcopy(model.config.to_dict())
    for options in ({}, {"cache_implementation": "dynamic"}, {"num_return_sequences": 2, "do_sample": True}):
        generate(model, prompt_batch(SAMPLES), **options)
        with pytest.raises(ValueError, match="num_beams=2"):
            generate(model, prompt_batch(SAMPLES), num_beams=2)
    assert state_of(model) == before
    assert model.generation_config.to_dict() == settings
    assert model.config.to_dict() == config


def test_two_threads_get_what_one_after_the_other_gets():
    model = tiny_model()
    batches = [prompt_batch([SAMPLES[0]]), prompt_batch([SAMPLES[1], SAMPLES[2]])]
    expected = [generate(model, batch) for batch in batches]
    found, faults = [[], []], []

    def work(index):
        try:
            found[index] += [generate(model, batches[index]) for _ in range(5)]
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    for outputs, single in zip(found, expected, strict=True):
        for output in outputs:
            assert torch.equal(output.sequences, single.sequences)
            assert output.evidence_trace.spans == single.evidence_trace.spans
            for row, scores in enumerate(single.evidence_trace.scores):
                assert output.evidence_trace.scores[row] == pytest.approx(scores)


# ---- what cannot work -------------------------------------------------------------------------------------------


def a_used_cache(model):
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([[1, 5, 9]]), past_key_values=DynamicCache(), use_cache=True
        ).past_key_values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, r"generation mode 'beam_search' \(num_beams=3\) cannot carry evidence"),
        ({"num_beams": 2, "do_sample": True}, r"generation mode 'beam_sample' \(num_beams=2\) cannot carry evidence"),
        ({"prompt_lookup_num_tokens": 2}, "generation mode 'assisted_generation'"),
        ({"assistant_model": lambda model: model}, "generation mode 'assisted_generation'"),
        ({"use_cache": False}, "use_cache=False cannot carry evidence"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size=4 would split the frames"),
        ({"past_key_values": a_used_cache}, "past_key_values already holds 3 tokens: a cache from another call"),
        ({"num_frames": torch.tensor([6])}, r"num_frames=\[6\] adds up to 6 frames, but 5 were given"),
        ({"evidence_spans": torch.tensor([[[0, 5]]])}, r"evidence_spans\[0\]=\[\[0, 5\]\] does not fit a video of 5"),
        ({"evidence_spans": None, "evidence_role": None}, r"\[1\] <evi> tokens but \[0\] evidence spans"),
        ({"evidence_span": torch.tensor([[[0, 5]]])}, "evidence_span"),  # a slip of the pen is not swallowed
    ],
)
def test_what_cannot_work_is_named_and_harmless(options, message):
    model = tiny_model()
    batch = prompt_batch(SAMPLES[:1])
    expected = generate(model, batch)
    options = {k: v(model) if callable(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        generate(model, {**batch, **options})
    output = generate(model, batch)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.evidence_trace.spans == expected.evidence_trace.spans
