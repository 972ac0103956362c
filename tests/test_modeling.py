# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The model: what a row is does not depend on its neighbours, its padding, its cache or where it was stored."""

import pytest
import tiny_models as tiny
import torch
from tiny_models import CONNECTORS, SAMPLES, TEXT_MODELS, Sample, tiny_config, tiny_model, whole_sequence_batch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from d2vlm_hf.model.configuration_d2vlm import D2VLMConfig
from d2vlm_hf.model.connector_d2vlm import frame_codes
from d2vlm_hf.model.evidence_d2vlm import pool_spans
from d2vlm_hf.model.modeling_d2vlm import MASKED_LOGIT, D2VLMForConditionalGeneration, D2VLMModel


every_text_model = pytest.mark.parametrize("text", TEXT_MODELS)
every_connector = pytest.mark.parametrize("connector", CONNECTORS)


@pytest.fixture(scope="module", autouse=True)
def auto_classes():
    """What `import d2vlm_hf` registers, here for the model alone."""
    AutoConfig.register("d2vlm", D2VLMConfig, exist_ok=True)
    AutoModel.register(D2VLMConfig, D2VLMForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(D2VLMConfig, D2VLMForConditionalGeneration, exist_ok=True)


def run(model, batch, **changes):
    with torch.no_grad():
        return model(**{**batch, **changes})


def assert_close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5):
    assert one.shape == other.shape
    assert torch.allclose(one, other, rtol=0, atol=tolerance), (one - other).abs().max().item()


# ---- shapes and modes -------------------------------------------------------------------------------------------


@every_text_model
@every_connector
def test_shapes_and_the_parts_of_the_loss(text, connector):
    model, batch = tiny_model(text, connector), whole_sequence_batch(SAMPLES)
    output = run(model, batch, logits_to_keep=0)
    rows, columns = batch["input_ids"].shape
    events, frames = batch["evidence_role"].shape[1], max(s.frames for s in SAMPLES)
    assert output.logits.shape == (rows, columns, tiny.VOCABULARY)
    assert output.token_logps.shape == (rows, columns)
    assert output.evidence_logits.shape == (rows, events, frames)
    assert output.evidence_queries.shape == (rows, events, tiny.HIDDEN)
    assert output.frame_states.shape == output.frame_keys.shape == (rows, frames, tiny.HIDDEN)
    assert output.next_query.shape == (rows, tiny.HIDDEN)
    assert output.frame_mask.sum(1).tolist() == [s.frames for s in SAMPLES]
    assert output.hidden_states is None
    assert output.past_key_values is None
    weights = model.config.grounding_weight, model.config.consistency_weight
    assert weights == (10.0, 10.0)
    expected = output.lm_loss + 10 * output.grounding_loss + 10 * output.consistency_loss
    assert torch.equal(output.loss, expected)
    assert min(output.lm_loss, output.grounding_loss, output.consistency_loss) > 0.1  # nothing hides behind a zero
    # where there is no frame or no response token there is no evidence
    real = (batch["evidence_role"] > 0)[:, :, None] & output.frame_mask[:, None]
    assert (output.evidence_logits[~real] == MASKED_LOGIT).all()
    assert (output.evidence_logits[real].abs() < 100).all()


@every_text_model
@every_connector
def test_losses_are_the_same_in_train_and_in_eval_mode(text, connector):
    model, batch = tiny_model(text, connector), whole_sequence_batch(SAMPLES)
    evaluated = run(model, batch)
    trained = run(model.train(), batch)
    for part in ("loss", "lm_loss", "grounding_loss", "consistency_loss", "evidence_logits", "token_logps"):
        assert torch.equal(trained[part], evaluated[part])


def test_a_row_without_events_brings_no_evidence_loss():
    output = run(tiny_model(), whole_sequence_batch(SAMPLES[2:]))
    assert output.grounding_loss.item() == output.consistency_loss.item() == 0
    assert output.loss.item() == output.lm_loss.item() > 0


def test_labels_without_spans_give_the_language_loss_alone():
    batch = {k: v for k, v in whole_sequence_batch(SAMPLES[2:]).items() if not k.startswith("evidence")}
    output = run(tiny_model(), batch)
    assert output.grounding_loss is None
    assert torch.equal(output.loss, output.lm_loss)


def test_text_alone_is_a_language_model():
    model = tiny_model()
    ids = torch.tensor([[1, 5, 9, 7], [1, 4, 4, 8]])
    output = run(model, {"input_ids": ids, "labels": ids})
    plain = model.lm_head(model.model.language_model(ids).last_hidden_state).log_softmax(-1)
    expected = -plain[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.frame_states is None


# ---- a row is a row ---------------------------------------------------------------------------------------------


@every_text_model
@every_connector
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_a_row_of_a_batch_equals_the_row_alone(text, connector, left):
    model = tiny_model(text, connector)
    together = whole_sequence_batch(SAMPLES, left=left)
    output = run(model, together, logits_to_keep=0)
    counts, losses = [], []
    for row, sample in enumerate(SAMPLES):
        alone = whole_sequence_batch([sample])
        single = run(model, alone, logits_to_keep=0)
        real = together["attention_mask"][row].bool()
        assert_close(output.logits[row, real], single.logits[0])
        events, frames = alone["evidence_role"].shape[1], sample.frames
        assert_close(output.evidence_logits[row, :events, :frames], single.evidence_logits[0], 2e-5)
        assert_close(output.frame_states[row, :frames], single.frame_states[0], 2e-5)
        counts.append((alone["labels"] != -100).sum())
        losses.append([single.lm_loss * counts[-1], single.grounding_loss, single.consistency_loss])
    lm, grounding, consistency = (sum(part) for part in zip(*losses, strict=True))
    assert_close(output.lm_loss, lm / sum(counts))
    assert_close(output.grounding_loss, grounding / 2)  # two of the three have events
    assert_close(output.consistency_loss, consistency / 2)


@every_text_model
def test_left_padding_equals_right_padding(text):
    model = tiny_model(text)
    right, left = whole_sequence_batch(SAMPLES), whole_sequence_batch(SAMPLES, left=True)
    one, other = run(model, right, logits_to_keep=0), run(model, left, logits_to_keep=0)
    assert_close(one.logits[right["attention_mask"].bool()], other.logits[left["attention_mask"].bool()])
    assert_close(one.evidence_logits, other.evidence_logits, 2e-5)
    assert_close(one.loss, other.loss, 5e-5)


def test_positions_count_real_tokens_in_the_prompt_and_in_steps():
    """Rotary models hardly tell a shifted row from the row, so the positions are looked at themselves."""
    model, batch, seen = tiny_model(), tiny.prompt_batch(SAMPLES), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    state = run(model, batch, use_cache=True)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    run(model, {}, input_ids=torch.full((3, 1), 9), attention_mask=mask, past_key_values=state.past_key_values)
    for row, sample in enumerate(SAMPLES):
        real = batch["attention_mask"][row].bool()
        assert seen[0][row, real].tolist() == list(range(len(sample.prompt)))
        assert seen[1][row].tolist() == [len(sample.prompt)]


@pytest.mark.parametrize("text", ["llama", "qwen2-sliding", "phi3-sliding"])
def test_an_attention_mask_of_ones_equals_no_attention_mask(text):
    model, batch = tiny_model(text), whole_sequence_batch(SAMPLES[:1])
    assert batch["attention_mask"].all()
    assert torch.equal(run(model, batch).loss, run(model, batch, attention_mask=None).loss)


@every_text_model
def test_embeddings_equal_ids(text):
    model, batch = tiny_model(text), whole_sequence_batch(SAMPLES, left=True)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    one, other = run(model, batch), run(model, batch, input_ids=None, inputs_embeds=embeds)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.evidence_logits, other.evidence_logits)


# ---- cache ------------------------------------------------------------------------------------------------------


@every_text_model
@pytest.mark.parametrize("left", [False, True], ids=["one row", "left-padded rows"])
def test_steps_with_a_cache_equal_the_whole_sequence(text, left):
    """The prompt once, then one token at a time, each `<evi>` with the pooled states of its span."""
    model = tiny_model(text)
    samples = [
        Sample(5, [[(1, 2), (4, 4)]], given=[(0, 1)], seed=1),
        Sample(8, [[(3, 6), (0, 7)]], seed=2, given=[(2, 2)]),
    ]
    samples = samples if left else samples[:1]
    batch = tiny.training_batch(samples)
    prompt = batch.pop("prompt_length")
    whole = run(model, batch, logits_to_keep=0)
    state = run(model, tiny.prompt_batch(samples), use_cache=True)
    assert_close(state.logits[:, -1], whole.logits[:, prompt - 1])
    seen = torch.ones(len(samples), dtype=torch.long)  # the <evi> of the question comes first
    for column in range(prompt, batch["input_ids"].shape[1]):
        ids = batch["input_ids"][:, column : column + 1]
        evidence = ids[:, 0] == tiny.EVIDENCE
        spans = batch["evidence_spans"].gather(1, seen[:, None, None].expand(-1, 1, 2).clamp(max=4))
        pooled = pool_spans(whole.frame_states, spans) * evidence[:, None, None]
        seen += evidence
        state = run(
            model,
            {},
            input_ids=ids,
            attention_mask=batch["attention_mask"][:, : column + 1],
            past_key_values=state.past_key_values,
            evidence_embeds=pooled,
        )
        real = batch["attention_mask"][:, column].bool()
        assert_close(state.logits[real, -1], whole.logits[real, column], 2e-5)


# ---- frames attend to each other both ways ----------------------------------------------------------------------


def states_with_another_last_frame(model, layer: int, frames: int = 5):
    """States of a prompt before and after its last frame is replaced."""
    sample = Sample(frames, seed=1, before=4, after=4)
    batch = tiny.prompt_batch([sample])
    changed = {**batch, "pixel_values_videos": batch["pixel_values_videos"].clone()}
    changed["pixel_values_videos"][-1] = 0.5
    outputs = [run(model, b, output_hidden_states=True) for b in (batch, changed)]
    return [o.hidden_states[layer][0] for o in outputs], (
        batch["input_ids"][0] == tiny.VIDEO
    ).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("text", "attention"),
    [(t, a) for t in TEXT_MODELS for a in ("sdpa", "eager") if (t, a) != ("gemma2", "sdpa")],  # it soft-caps scores
)
@pytest.mark.parametrize("frames", ["bidirectional", "causal"])
def test_the_last_frame_reaches_the_first_and_never_the_text_before(text, attention, frames):
    model = tiny_model(text, attention=attention, frame_attention=frames)
    (one, other), columns = states_with_another_last_frame(model, layer=1)
    moved = [not torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    first, last = columns[0], columns[-1]
    assert not any(moved[:first])  # the text before the video
    assert moved[last]
    assert all(moved[first:last]) if frames == "bidirectional" else not any(moved[first:last])
    assert moved[last + 1]  # the text after it


@pytest.mark.parametrize("text", [t for t in TEXT_MODELS if t != "gemma2"])
def test_sdpa_equals_eager(text):
    batch = whole_sequence_batch(SAMPLES, left=True)
    one, other = (run(tiny_model(text, attention=a), batch) for a in ("sdpa", "eager"))
    assert_close(one.evidence_logits, other.evidence_logits, 2e-5)
    assert_close(one.loss, other.loss, 5e-5)


@pytest.mark.parametrize("text", ["phi3-sliding", "gemma2", "gemma3"])  # their first layer has a window
def test_a_sliding_window_narrows_the_text_and_not_the_block_of_frames(text):
    model, window = tiny_model(text), tiny.text_config(text).sliding_window
    sample = Sample(window + 4, seed=4, before=2, after=3)
    batch = tiny.prompt_batch([sample])
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 1] += 1
    one, other = (run(model, b, output_hidden_states=True).hidden_states[1][0] for b in (batch, changed))
    moved = [not torch.equal(a, b) for a, b in zip(one, other, strict=True)]
    assert moved == [1 <= column < 1 + window for column in range(len(moved))]
    (one, other), columns = states_with_another_last_frame(model, layer=1, frames=window + 4)
    assert not torch.equal(one[columns[0]], other[columns[0]])


def test_changing_the_attention_implementation_reaches_masks_and_text_model():
    model, batch = tiny_model("qwen2"), whole_sequence_batch(SAMPLES)
    before = run(model, batch).loss
    model.set_attn_implementation("eager")
    text = model.model.language_model
    assert text.config._attn_implementation == model.config.text_config._attn_implementation == "eager"
    assert_close(run(model, batch).loss, before, 5e-5)


# ---- video features ---------------------------------------------------------------------------------------------


@every_connector
def test_stored_patches_stored_features_and_pixels_are_the_same(connector):
    model, batch = tiny_model(connector=connector), whole_sequence_batch(SAMPLES)
    expected = run(model, batch).loss
    with torch.no_grad():
        patches = model.model.encode_patches(batch["pixel_values_videos"])
        features = model.get_video_features(**tiny.video_inputs(SAMPLES))
    without = {k: v for k, v in batch.items() if k != "pixel_values_videos"}
    assert patches.shape == (16, 4, 24)  # frames, patches, width
    assert [tuple(f.shape) for f in features.pooler_output] == [(s.frames, tiny.HIDDEN) for s in SAMPLES]
    assert torch.equal(run(model, without, patch_features=patches).loss, expected)
    assert torch.equal(run(model, without, mm_encoder_outputs={"video": features}).loss, expected)


@every_connector
@pytest.mark.parametrize("size", [1, 5, 16, 100])
def test_a_frozen_tower_works_in_chunks(connector, size):
    model, pixels = tiny_model(connector=connector), tiny.video_inputs(SAMPLES)["pixel_values_videos"]
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: None)
    embeddings = model.model.vision_tower.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    expected = model.model.encode_patches(pixels)  # trained: one piece, so that nothing is computed twice
    assert calls == [16]
    tiny.freeze_tower(model)
    model.config.vision_chunk_size = size
    chunked = model.model.encode_patches(pixels)
    assert calls[1:] == [size] * (16 // size) + ([16 % size] if 16 % size else [])
    assert expected.requires_grad
    assert not chunked.requires_grad
    assert_close(chunked, expected, 1e-5)


@every_connector
def test_two_questions_about_one_video_encode_it_once(connector):
    model = tiny_model(connector=connector)
    one, other = Sample(5, [[(1, 2)]], seed=1), Sample(5, [[(0, 4)]], seed=6, after=6)
    other.pixels = one.pixels
    third = Sample(3, [[(2, 2)]], seed=3)
    batch = whole_sequence_batch([one, other, third])
    shared = {
        **batch,
        "pixel_values_videos": torch.cat([third.pixels, one.pixels]),
        "num_frames": torch.tensor([3, 5]),
        "video_index": torch.tensor([1, 1, 0]),
    }
    seen = []
    model.model.vision_tower.get_input_embeddings().register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    expected, output = run(model, batch), run(model, shared)
    assert sum(seen) == (5 + 5 + 3) + (3 + 5)
    assert_close(output.evidence_logits, expected.evidence_logits, 2e-5)
    assert_close(output.loss, expected.loss, 5e-5)


def test_the_question_steers_the_qformer_and_not_the_mlp():
    for connector in CONNECTORS:
        model, batch = tiny_model(connector=connector), tiny.video_inputs(SAMPLES[:1])
        one = run(model.get_video_features, batch).pooler_output[0]
        other = run(model.get_video_features, batch, qformer_input_ids=batch["qformer_input_ids"] + 1).pooler_output[0]
        assert torch.equal(one, other) == (connector == "mlp")


def test_questions_are_padded_without_effect_and_may_come_without_a_mask():
    model, batch = tiny_model(), tiny.video_inputs(SAMPLES[:1])
    expected = run(model.get_video_features, batch).pooler_output[0]
    padded = {
        "qformer_input_ids": torch.nn.functional.pad(batch["qformer_input_ids"], (0, 3), value=7),
        "qformer_attention_mask": torch.nn.functional.pad(batch["qformer_attention_mask"], (0, 3)),
    }
    assert_close(run(model.get_video_features, batch, **padded).pooler_output[0], expected, 1e-6)
    assert torch.equal(run(model.get_video_features, batch, qformer_attention_mask=None).pooler_output[0], expected)


@every_connector
def test_a_frame_may_say_which_of_its_video_it_is(connector):
    plain, model = tiny_model(connector=connector), tiny_model(connector=connector, frame_positions=0.5)
    model.load_state_dict(plain.state_dict())
    lengths = [sample.frames for sample in SAMPLES]
    without, marked = (run(m.get_video_features, tiny.video_inputs(SAMPLES)).pooler_output for m in (plain, model))
    for length, one, other in zip(lengths, without, marked, strict=True):
        assert_close(other - one, 0.5 * frame_codes([length], tiny.HIDDEN), 1e-6)  # every video starts at 0
    for sample, other in zip(SAMPLES, marked, strict=True):
        assert_close(run(model.get_video_features, tiny.video_inputs([sample])).pooler_output[0], other, 1e-5)


def test_the_code_of_a_span_is_most_like_those_of_its_frames():
    codes = frame_codes([300], 64)
    for first, last in ((0, 5), (40, 47), (290, 299)):
        likeness = codes @ codes[first : last + 1].mean(0)
        assert first <= int(likeness.argmax()) <= last
        inside = torch.zeros(300, dtype=torch.bool)
        inside[first : last + 1] = True
        far = torch.ones(300, dtype=torch.bool)
        far[max(first - 4, 0) : last + 5] = False
        assert likeness[inside].min() > likeness[far].max()


@every_connector
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_vision_layer_and_the_cls_token_are_chosen_by_the_config(connector, layer):
    model = tiny_model(connector=connector, vision_feature_layer=layer, vision_feature_select_strategy="full")
    pixels = SAMPLES[0].pixels
    with torch.no_grad():
        full = model.model.encode_patches(pixels)
        tower = model.model.vision_tower
        outputs = tower(pixels, output_hidden_states=True)
        raw = outputs.hidden_states[layer]
        model.config.vision_feature_select_strategy = "default"
        dropped = model.model.encode_patches(pixels)
    if connector == "mlp" and layer == -1:
        raw = outputs.last_hidden_state
    assert torch.equal(full, raw)
    assert torch.equal(dropped, full[:, 1:])
    if connector == "qformer" and layer == -1:  # the original reads the states before the final norm
        assert not torch.allclose(full, outputs.last_hidden_state, atol=0.1)


# ---- visual capture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", [True, False])
def test_capture_fills_an_evidence_token_from_its_span(capture):
    model = tiny_model(visual_capture=capture)
    batch = whole_sequence_batch([Sample(6, [[(1, 2)]], seed=1)])
    moved = {**batch, "evidence_spans": torch.tensor([[[3, 4], [3, 4]]])}
    one, other = (run(model, b, logits_to_keep=0).logits[0] for b in (batch, moved))
    first = (batch["input_ids"][0] == tiny.EVIDENCE).nonzero()[0].item()
    assert torch.equal(one[:first], other[:first])
    assert torch.equal(one[first], other[first]) == (not capture)


def test_a_moment_of_the_question_is_filled_from_the_frames_before_the_text_model():
    for capture in (True, False):  # an input of the user: the ablation does not take it away
        model = tiny_model(visual_capture=capture)
        sample = Sample(6, given=[(1, 3)], seed=1)
        batch = tiny.prompt_batch([sample])
        output = run(model, batch, output_hidden_states=True)
        frames = run(model.get_video_features, tiny.video_inputs([sample])).pooler_output[0]
        column = sample.prompt.index(tiny.EVIDENCE)
        expected = model.get_input_embeddings().weight[tiny.EVIDENCE] + frames[1:4].mean(0)
        assert_close(output.hidden_states[0][0, column], expected, 1e-6)


@pytest.mark.parametrize("positions", [0.0, 0.5])
def test_moments_that_look_the_same_are_told_apart_by_their_positions_alone(positions):
    model = tiny_model(frame_positions=positions)
    one, other = Sample(6, given=[(1, 2)], seed=1), Sample(6, given=[(4, 5)], seed=1)
    one.pixels = other.pixels = one.pixels[:1].expand_as(one.pixels)
    embeds = [
        run(model, tiny.prompt_batch([sample]), output_hidden_states=True).hidden_states[0] for sample in (one, other)
    ]
    assert torch.allclose(*embeds, atol=1e-6) == (positions == 0)


# ---- outputs ----------------------------------------------------------------------------------------------------


def test_logits_to_keep():
    model, batch = tiny_model(), whole_sequence_batch(SAMPLES)
    prompts = tiny.prompt_batch(SAMPLES)
    whole = run(model, prompts).logits
    assert whole.shape[1] == prompts["input_ids"].shape[1]
    assert torch.equal(run(model, prompts, logits_to_keep=0).logits, whole)
    assert_close(run(model, prompts, logits_to_keep=3).logits, whole[:, -3:], 1e-6)
    assert run(model, batch).logits is None  # with labels the head runs at labelled positions only
    assert run(model, batch, logits_to_keep=2).logits.shape[1] == 2
    layout = tiny.training_batch(SAMPLES)
    computed = layout["input_ids"].shape[1] - layout["prompt_length"] + 1  # from the last column of the prompt on
    assert run(model, layout, logits_to_keep=0).logits.shape[1] == computed


def test_token_logps_are_the_log_probabilities_of_the_labels():
    model, batch = tiny_model(), whole_sequence_batch(SAMPLES)
    output = run(model, batch, logits_to_keep=0)
    logps, labels = output.logits.log_softmax(-1), batch["labels"]
    for row, column in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        label = labels[row, column].item()
        expected = 0.0 if label == -100 else logps[row, column - 1, label].item()
        assert output.token_logps[row, column].item() == pytest.approx(expected, abs=1e-5)
    assert output.lm_loss.item() == pytest.approx(-output.token_logps.sum().item() / (labels != -100).sum().item())
    layout = tiny.training_batch(SAMPLES)
    shared = run(model, layout).token_logps
    assert shared.shape == layout["labels"].shape
    assert ((shared != 0) == (layout["labels"] != -100)).all()


def test_hidden_states_attentions_and_tuples_on_request():
    model, batch = tiny_model(attention="eager"), whole_sequence_batch(SAMPLES)
    output = run(model, batch, output_hidden_states=True, output_attentions=True, return_dict=True)
    assert len(output.hidden_states) == tiny.LAYERS + 1
    assert all(h.shape == (*batch["input_ids"].shape, tiny.HIDDEN) for h in output.hidden_states)
    assert len(output.attentions) == tiny.LAYERS
    as_tuple = run(model, batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.loss)


# ---- precision --------------------------------------------------------------------------------------------------


@every_text_model
@every_connector
def test_bfloat16_stays_close_to_float32(text, connector):
    batch = whole_sequence_batch(SAMPLES)
    exact = run(tiny_model(text, connector), batch)
    rounded = run(tiny_model(text, connector).bfloat16(), batch)
    assert rounded.evidence_logits.dtype == rounded.loss.dtype == torch.float32
    real = exact.evidence_logits > MASKED_LOGIT
    assert_close(rounded.evidence_logits[real], exact.evidence_logits[real], 0.25)  # of up to 7
    for part in ("lm_loss", "grounding_loss", "consistency_loss"):
        assert rounded[part].item() == pytest.approx(exact[part].item(), rel=0.05)


def test_under_autocast_scores_and_losses_are_float32():
    model, batch = tiny_model(), whole_sequence_batch(SAMPLES)
    exact = run(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, batch)
    assert output.evidence_logits.dtype == output.loss.dtype == output.token_logps.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    # the dot product itself was not rounded
    keys, queries = output.frame_keys.float(), output.evidence_queries.float()
    product = (queries[0, 1] * keys[0, 2]).sum() / tiny.HIDDEN**0.5
    assert output.evidence_logits[0, 1, 2].item() == pytest.approx(product.item(), rel=1e-5)


# ---- construction, saving, loading ------------------------------------------------------------------------------


@every_text_model
@every_connector
def test_a_saved_model_is_the_same_model(text, connector, tmp_path):
    model, batch = tiny_model(text, connector), whole_sequence_batch(SAMPLES)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is D2VLMForConditionalGeneration
    assert not loaded.training
    assert loaded.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()
    assert torch.equal(run(loaded, batch).loss, run(model, batch).loss)
    tied = loaded.config.tie_word_embeddings
    assert tied == (text in ("qwen3", "gemma", "gemma2", "gemma3"))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_a_model_loads_in_bfloat16_and_with_eager_attention(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.language_model.config._attn_implementation == "eager"
    output = run(loaded, whole_sequence_batch(SAMPLES))
    assert output.loss.item() == pytest.approx(run(model, whole_sequence_batch(SAMPLES)).loss.item(), rel=0.05)


@every_text_model
@every_connector
def test_a_model_can_be_built_without_memory(text, connector):
    with torch.device("meta"):
        model = D2VLMForConditionalGeneration(tiny_config(text, connector))
    assert all(p.is_meta for p in model.parameters())
    real = tiny_model(text, connector).state_dict()
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in real.items()}


def test_the_module_tree_is_the_one_that_checkpoints_use():
    names = {n for n, _ in tiny_model().named_modules()}
    connector = {"qformer", "patch_norm", "query_out", "attn_query.0", "attn_key.1", "attn_value.1"}
    expected = {"model.vision_tower", "model.language_model.layers.3", "lm_head", "evidence_head.3", "frame_head.3"}
    assert expected | {f"model.connector.{n}" for n in connector} <= names
    assert tiny_model().model.connector.query_tokens.shape == (1, 3, 16)
    assert isinstance(tiny_model().base_model, D2VLMModel)


def test_fresh_weights_are_normal_and_finite():
    torch.manual_seed(0)
    model = D2VLMForConditionalGeneration(tiny_config())
    assert 0.005 < model.model.connector.query_tokens.std().item() < 0.04
    assert 0.005 < model.evidence_head[1].weight.std().item() < 0.04
    assert (model.evidence_head[0].weight == 1).all()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_the_vocabulary_can_grow(text):
    model, batch = tiny_model(text), whole_sequence_batch(SAMPLES)
    before = run(model, batch, logits_to_keep=0).logits
    model.resize_token_embeddings(tiny.VOCABULARY + 5)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == tiny.VOCABULARY + 5
    assert_close(run(model, batch, logits_to_keep=0).logits[..., : tiny.VOCABULARY], before, 1e-5)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (text == "qwen3")
