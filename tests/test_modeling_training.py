# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Training: every way to compute a step gives the loss and the gradients of two plain passes written out by hand."""

import copy
import re
import threading

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import (
    CONNECTORS,
    PAIRS,
    SAMPLES,
    TEXT_MODELS,
    Sample,
    freeze_tower,
    gradients,
    largest_difference,
    tiny_model,
    training_batch,
    video_inputs,
)


every_text_model = pytest.mark.parametrize("text", TEXT_MODELS)
every_connector = pytest.mark.parametrize("connector", CONNECTORS)

# Parameters that the loss cannot feel: a key's bias cancels in the softmax; the text half of the last Q-Former layer is
# not read.
IDLE = re.compile(r"key\.bias|attn_key\.[01]\.bias|qformer\.encoder\.layer\.1\.(intermediate|output)\.")
PARTS = ("loss", "lm_loss", "grounding_loss", "consistency_loss")


# ---- the step by hand: one row at a time, no padding, no cache, masks and sums from their definitions -------------


def slow_masks(model, tokens: list[int]) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks: text looks back (as far as the window), frames look back and at all frames."""

    def mask(window: int | None) -> torch.Tensor:
        rows = [
            [
                0.0
                if (j <= i and (window is None or i - j < window)) or (tokens[i] == tokens[j] == tiny.VIDEO)
                else torch.finfo(torch.float32).min
                for j in range(len(tokens))
            ]
            for i in range(len(tokens))
        ]
        return torch.tensor(rows)[None, None]

    config = model.config.text_config
    if hasattr(config, "layer_types"):
        return {"full_attention": mask(None), "sliding_attention": mask(config.sliding_window)}
    return mask(getattr(config, "sliding_window", None))


def slow_row(model, sample: Sample, response: int) -> dict:
    """Summed log-likelihood, number of tokens, grounding and consistency of one response."""
    tokens = sample.prompt + sample.answers[response]
    spans, role = sample.evidence(response)
    scale = tiny.HIDDEN**0.5 if model.config.text_config.model_type.startswith("gemma") else 1.0
    frames = model.get_video_features(**video_inputs([sample])).pooler_output[0]
    at_frames = [i for i, token in enumerate(tokens) if token == tiny.VIDEO]
    at_evidence = [i for i, token in enumerate(tokens) if token == tiny.EVIDENCE]

    vectors = [model.lm_head.weight.new_zeros(0)] * len(tokens)
    for i, token in enumerate(tokens):
        vectors[i] = model.get_input_embeddings().weight[token] * scale
    for t, i in enumerate(at_frames):
        vectors[i] = frames[t] * scale
    for i, (first, last), kind in zip(at_evidence, spans, role, strict=True):
        if kind == 0:
            vectors[i] = vectors[i] + sum(frames[first : last + 1]) / (last - first + 1) * scale

    def states(inputs):
        return model.model.language_model(
            inputs_embeds=torch.stack(inputs)[None],
            attention_mask=slow_masks(model, tokens),
            position_ids=torch.arange(len(tokens))[None],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states

    first_pass = states(vectors)[model.config.evidence_layer][0]
    for i, (first, last), kind in zip(at_evidence, spans, role, strict=True):
        if kind > 0 and model.config.visual_capture:
            moment = [first_pass[at_frames[t]] for t in range(first, last + 1)]
            vectors[i] = vectors[i] + sum(moment) / len(moment) * scale
    second_pass = states(vectors)

    logits = model.lm_head(second_pass[-1][0])
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    answer = range(len(sample.prompt), len(tokens))
    logp = sum(torch.log_softmax(logits[i - 1], -1)[tokens[i]] for i in answer)

    keys = [model.frame_head(second_pass[-2][0, i]) for i in at_frames]
    queries = {i: model.evidence_head(second_pass[-2][0, i - 1]) for i in at_evidence}
    entropies, by_role = [], {0: [], 1: [], 2: []}
    for i, (first, last), kind in zip(at_evidence, spans, role, strict=True):
        by_role[kind].append(queries[i])
        for t, key in enumerate(keys):
            p = torch.sigmoid((queries[i] * key).sum() / tiny.HIDDEN**0.5)
            s = 2.0 ** -max(first - t, 0, t - last)
            if kind > 0:
                entropies.append(-s * torch.log(p) - (1 - s) * torch.log(1 - p))
    pairs = [(a - b).abs().mean() for a, b in zip(by_role[1], by_role[2], strict=True)]
    return {
        "logp": logp,
        "tokens": len(answer),
        "grounding": sum(entropies) / len(entropies) if entropies else None,
        "consistency": sum(pairs) / len(pairs) if pairs else None,
    }


def slow_step(model, samples, responses=(0,)) -> tuple[dict, dict]:
    """Loss parts and gradients of a batch, from the rows of `slow_row`."""
    rows = [slow_row(model, sample, response) for response in responses for sample in samples]
    with_events = [r for r in rows if r["grounding"] is not None]
    zero = rows[0]["logp"] * 0
    parts = {
        "lm_loss": -sum(r["logp"] for r in rows) / sum(r["tokens"] for r in rows),
        "grounding_loss": sum((r["grounding"] for r in with_events), zero) / max(len(with_events), 1),
        "consistency_loss": sum((r["consistency"] for r in with_events), zero) / max(len(with_events), 1),
    }
    parts["loss"] = parts["lm_loss"] + 10 * parts["grounding_loss"] + 10 * parts["consistency_loss"]
    model.zero_grad(set_to_none=True)
    parts["loss"].backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return parts, grads


def assert_same_step(one, other, tolerance: float = 1e-5):
    """Loss parts and gradients agree, relative to the largest gradient of a parameter (at least 1)."""
    (output, grads), (expected, expected_grads) = one, other
    for part in PARTS:
        assert output[part].item() == pytest.approx(expected[part].item(), rel=1e-5, abs=1e-6), part
    assert largest_difference(grads, expected_grads) <= tolerance


def plain(batch: dict) -> dict:
    """Without `prompt_length`: two plain passes."""
    return {k: v for k, v in batch.items() if k != "prompt_length"}


def checkpointed(model, **kwargs):
    model = copy.deepcopy(model).train()
    model.activation_checkpointing_enable(kwargs or None)
    return model


# ---- all ways are one -------------------------------------------------------------------------------------------


@every_text_model
@every_connector
def test_shared_prefix_early_stop_and_two_passes_equal_the_step_by_hand(text, connector):
    model, batch = freeze_tower(tiny_model(text, connector)), training_batch(SAMPLES)
    expected = slow_step(model, SAMPLES)
    assert expected[0]["grounding_loss"].item() > 0.1
    assert_same_step(gradients(model, **plain(batch)), expected)
    assert_same_step(gradients(model, **batch), expected)
    assert_same_step(gradients(checkpointed(model), **batch), expected)


@every_text_model
def test_two_responses_to_each_video_equal_the_step_by_hand(text):
    model, batch = freeze_tower(tiny_model(text)), training_batch(PAIRS, responses=(0, 1))
    expected = slow_step(model, PAIRS, responses=(0, 1))
    assert_same_step(gradients(model, **plain(batch)), expected)
    assert_same_step(gradients(model, **batch), expected)
    assert_same_step(gradients(checkpointed(model), **batch), expected)


@pytest.mark.parametrize("text", ["llama", "gemma"])
def test_without_visual_capture_too(text):
    model, batch = freeze_tower(tiny_model(text, visual_capture=False)), training_batch(SAMPLES)
    expected = slow_step(model, SAMPLES)
    assert_same_step(gradients(model, **plain(batch)), expected)
    assert_same_step(gradients(model, **batch), expected)
    assert_same_step(gradients(checkpointed(model), **batch), expected)


def test_reentrant_checkpointing_is_exact_too():
    model, batch = freeze_tower(tiny_model()), training_batch(SAMPLES)
    expected = gradients(model, **plain(batch))
    assert_same_step(gradients(checkpointed(model, use_reentrant=True), **batch), expected)


def test_a_trained_tower_gets_the_gradients_of_the_step_by_hand():
    model, batch = tiny_model(), training_batch(SAMPLES)
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # after the states that are read
    assert_same_step(gradients(model, **batch), slow_step(model, SAMPLES))


def test_checkpointing_is_silent_about_caches(caplog):
    model = freeze_tower(tiny_model())
    gradients(checkpointed(model), **training_batch(SAMPLES))
    assert "use_cache" not in caplog.text  # transformers warns where it drops a cache


def test_embeddings_take_the_shared_prefix_too():
    model, batch = freeze_tower(tiny_model()), training_batch(PAIRS, responses=(0, 1))
    expected = gradients(model, **batch)
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_same_step(gradients(model, **batch, inputs_embeds=embeds), expected)


def test_two_responses_in_one_call_equal_two_calls():
    model = tiny_model().eval()
    both = training_batch(PAIRS, responses=(0, 1))
    with torch.no_grad():
        together = model(**both)
        for half, response in enumerate((0, 1)):
            alone = training_batch(PAIRS, responses=(response,))
            output = model(**alone)
            rows = slice(half * len(PAIRS), (half + 1) * len(PAIRS))
            events, width = alone["evidence_role"].shape[1], alone["labels"].shape[1]
            assert torch.allclose(together.token_logps[rows, :width], output.token_logps, atol=1e-5)
            assert torch.allclose(together.evidence_logits[rows, :events], output.evidence_logits, atol=2e-5)


def test_the_video_of_two_responses_is_encoded_once():
    model, frames = tiny_model(), []
    model.model.vision_tower.get_input_embeddings().register_forward_pre_hook(
        lambda m, args: frames.append(len(args[0]))
    )
    model(**training_batch(PAIRS, responses=(0, 1)))
    assert sum(frames) == sum(s.frames for s in PAIRS)


def test_the_shared_prefix_spares_the_text_model_the_second_prompt():
    model, widths = tiny_model(), []
    layer = model.model.language_model.layers[-1]
    layer.register_forward_hook(lambda module, args, output: widths.append(tuple(args[0].shape[:2])))
    batch = training_batch(PAIRS, responses=(0, 1))
    model(**batch)
    prompt, columns = batch["prompt_length"], batch["input_ids"].shape[1]
    assert widths == [(3, prompt), (6, columns - prompt)]


def test_spans_of_other_threads_do_not_stop_this_one():
    """The early stop is a hook for the time of a pass; a pass in another thread must not feel it."""
    model = tiny_model().eval()
    batches = [plain(training_batch([s])) for s in SAMPLES[:2]]
    with torch.no_grad():
        expected = [model(**b).loss.item() for b in batches]
    found, faults = [[], []], []

    def work(index):
        try:
            with torch.no_grad():
                found[index] += [model(**batches[index]).loss.item() for _ in range(25)]
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [set(values) for values in found] == [{expected[0]}, {expected[1]}]


# ---- normalisation over the global batch ------------------------------------------------------------------------


@pytest.mark.parametrize("responses", [(0,), (0, 1)])
def test_parts_of_a_batch_with_global_counts_sum_to_the_whole(responses):
    model = freeze_tower(tiny_model())
    batch = training_batch(PAIRS, responses)
    whole = gradients(model, **batch)
    tokens = (batch["labels"] != -100).sum()
    samples = (batch["evidence_role"] > 0).any(1).sum()
    assert samples < len(batch["labels"])  # rows without events do not count
    counts = {"num_items_in_batch": tokens, "num_evidence_samples": samples}
    parts = [gradients(model, **training_batch([s], responses), **counts) for s in PAIRS]
    output = {part: sum(o[part] for o, _ in parts) for part in PARTS}
    grads = {name: sum(g[name] for _, g in parts) for name in whole[1]}
    assert_same_step((output, grads), whole)


# ---- every parameter is reached ---------------------------------------------------------------------------------


@every_text_model
@every_connector
@pytest.mark.parametrize("path", ["two passes", "shared prefix", "checkpointing"])
def test_a_batch_without_events_still_reaches_every_trainable_parameter(text, connector, path):
    model, batch = freeze_tower(tiny_model(text, connector)), training_batch(SAMPLES[2:])
    assert batch["evidence_role"].shape == (1, 0)
    if path == "checkpointing":
        model = checkpointed(model)
    output, grads = gradients(model, **(plain(batch) if path == "two passes" else batch))
    assert output.grounding_loss.item() == output.consistency_loss.item() == 0
    assert [name for name, gradient in grads.items() if gradient is None] == []
    silent = {name.split(".")[0] for name, gradient in grads.items() if not gradient.any()}
    assert silent <= {"evidence_head", "frame_head", "model"}  # zeros, which a distributed reduction can wait for
    assert all((grads[name] == 0).all() for name in grads if name.startswith(("evidence_head", "frame_head")))


@every_connector
def test_a_step_with_events_moves_every_trainable_parameter(connector):
    model, batch = freeze_tower(tiny_model(connector=connector)), training_batch(SAMPLES)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trainable
    assert [n for n in trainable - moved if not IDLE.search(n)] == []
    assert not any("vision_tower" in n for n in moved)


@pytest.mark.parametrize("text", ["qwen3", "gemma"])
def test_tied_embeddings_stay_tied_through_a_step_and_a_file(text, tmp_path):
    model, batch = freeze_tower(tiny_model(text)), training_batch(SAMPLES)
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)


# ---- LoRA -------------------------------------------------------------------------------------------------------


def with_lora(text: str):
    base = freeze_tower(tiny_model(text))
    targets = "qkv_proj|o_proj" if text == "phi3" else "q_proj|k_proj|v_proj|o_proj"
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=rf"model\.language_model\.layers\.\d+\.self_attn\.({targets})",
        modules_to_save=["evidence_head", "frame_head", "connector"],
    )
    return base, get_peft_model(copy.deepcopy(base), config)


@pytest.mark.parametrize("text", ["phi3", "llama", "qwen3"])
@pytest.mark.parametrize("path", ["two passes", "shared prefix", "checkpointing"])
def test_lora_trains_adapters_and_saved_modules_and_merges(text, path):
    base, model = with_lora(text)
    batch = training_batch(PAIRS, responses=(0, 1))
    inputs = plain(batch) if path == "two passes" else batch
    model.train()
    if path == "checkpointing":
        model.base_model.model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    with torch.no_grad():
        start = model(**inputs).loss
        assert start.item() == pytest.approx(base(**inputs).loss.item(), rel=1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # lora_A moves once lora_B is no longer zero
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved <= trainable
    assert [n for n in trainable - moved if not IDLE.search(n)] == []
    kinds = ("lora_A", "lora_B", "evidence_head.modules_to_save", "frame_head.modules_to_save", "connector.modules_to")
    assert all(any(kind in n for n in moved) for kind in kinds)
    assert not any(kind in n for n in moved for kind in ("vision_tower", "mlp", "embed_tokens", "original_module"))
    with torch.no_grad():
        trained = model(**inputs).loss
        with model.disable_adapter():
            assert model(**inputs).loss.item() == pytest.approx(start.item(), rel=1e-5)
        merged = model.merge_and_unload()
        assert merged(**inputs).loss.item() == pytest.approx(trained.item(), rel=1e-4)
    assert trained.item() != pytest.approx(start.item(), rel=1e-3)
