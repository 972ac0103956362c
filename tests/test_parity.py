# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Parity with the original implementation, through `convert_checkpoint`.

`tests/golden/phi3_tiny` holds a tiny checkpoint in the original layout and numbers that the original computed with it
(float32, CPU, eager attention, one frame a second): frame embeddings, logits, similarities, losses, gradients, greedy
tokens. Here they are met with sdpa attention, batched, padded on either side, with the prompts run once, and under
gradient checkpointing. Other kernels sum in another order; what is left of that is far below `TOLERANCE`.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_batches import (
    EVIDENCE,
    GOLDEN,
    Row,
    forced_row,
    fpo_rows,
    golden,
    inference_rows,
    prompt_inputs,
    sft_rows,
    training_inputs,
    video_inputs,
)

from d2vlm_hf.hub.convert import convert_checkpoint
from d2vlm_hf.hub.key_maps import target_name
from d2vlm_hf.model.evidence_d2vlm import (
    ROLE_QUESTION,
    consistency_loss,
    decode_spans,
    evidence_similarity,
    grounding_log_likelihood,
    grounding_loss,
    pool_spans,
    soft_targets,
)
from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration


TOLERANCE = 1e-5  # absolute on values, relative to the largest entry on gradients
LAYOUTS = ("plain", "prefix", "plain-checkpointing", "prefix-checkpointing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    destination = tmp_path_factory.mktemp("converted") / "phi3_tiny"
    convert_checkpoint(GOLDEN / "checkpoint", destination)
    return destination


@pytest.fixture(scope="module")
def model(folder) -> D2VLMForConditionalGeneration:
    return D2VLMForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def trainee(folder) -> D2VLMForConditionalGeneration:
    """In train mode with a frozen vision tower, as the original was."""
    model = D2VLMForConditionalGeneration.from_pretrained(folder).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def prepare(trainee, layout: str):
    """The model in train mode, with gradient checkpointing where the layout says so."""
    trainee.zero_grad(set_to_none=True)
    if layout.endswith("checkpointing"):
        trainee.activation_checkpointing_enable({"use_reentrant": False})
    else:
        trainee.activation_checkpointing_disable()
    assert trainee.is_activation_checkpointing == layout.endswith("checkpointing")
    return trainee


def assert_close(value: torch.Tensor, wanted: torch.Tensor):
    # the raw vision states reach 30, where float32 itself differs by 1e-5 from one kind of CPU to another
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=TOLERANCE)


def assert_gradients_close(model, tensors: dict[str, torch.Tensor]):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for name, wanted in tensors.items():
        if name.startswith("grad."):
            gradient = gradients[target_name(name.removeprefix("grad."))]
            assert (gradient - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), name
            compared += 1
    assert compared >= 5


# ---- frames ---------------------------------------------------------------------------------------------------------


def test_vision_states(model):
    _, tensors = golden("sft")
    with torch.no_grad():
        tower = model.model.vision_tower
        states = tower.encoder(inputs_embeds=tower.embeddings(tensors["video.0"])).last_hidden_state
        patches = model.model.encode_patches(tensors["video.0"])
    assert_close(states, tensors["vision_hidden.0"])
    assert_close(patches, tensors["vision_hidden.0"][:, 1:])


def test_frame_embeddings(model):
    _, tensors = golden("sft")
    with torch.no_grad():
        frames = model.get_video_features(**video_inputs(sft_rows())).pooler_output
    for i in range(2):
        assert_close(frames[i], tensors[f"frame_embeds.{i}"])


# ---- supervised fine-tuning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_logits_and_similarities(trainee, layout):
    _, tensors = golden("sft")
    rows = sft_rows()
    inputs = training_inputs(rows, layout, videos=2)
    output = prepare(trainee, layout)(**inputs, logits_to_keep=0)
    columns = inputs["input_ids"].shape[1]
    first = columns - output.logits.shape[1]  # prompts that run once give logits from their last column on
    for i, row in enumerate(rows):
        real = inputs["attention_mask"][i].nonzero().flatten()
        covered = real >= first
        assert covered.sum() > len(row.response)
        assert_close(output.logits[i][real[covered] - first], tensors["logits"][i][: len(real)][covered])
        answered = inputs["evidence_role"][i] > ROLE_QUESTION
        assert_close(output.evidence_logits[i][answered][:, : len(row.video)], tensors[f"sim.{i}"])


def test_soft_targets():
    _, tensors = golden("sft")
    for i, row in enumerate(sft_rows()):
        targets = soft_targets(torch.tensor(2 * row.events), len(row.video))
        assert_close(targets, tensors[f"sim_target.{i}"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_losses_and_gradients(trainee, layout):
    meta, tensors = golden("sft")
    output = prepare(trainee, layout)(**training_inputs(sft_rows(), layout, videos=2))
    output.loss.backward()
    assert output.lm_loss.item() == pytest.approx(meta["lm_loss"], abs=TOLERANCE)
    assert output.grounding_loss.item() == pytest.approx(sum(meta["bce"]) / 2, abs=TOLERANCE)
    assert output.consistency_loss.item() == pytest.approx(sum(meta["l1"]) / 2, abs=TOLERANCE)
    assert output.loss.item() == pytest.approx(meta["loss"], abs=TOLERANCE)
    assert_gradients_close(trainee, tensors)


# ---- factorized preference optimization -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fpo_likelihoods_loss_and_gradients(trainee, layout):
    """Chosen and rejected responses are rows of one batch, over one encoding of each video."""
    meta, tensors = golden("fpo")
    inputs = training_inputs(fpo_rows(), layout, videos=2)
    output = prepare(trainee, layout)(**inputs)
    spans, role = inputs["evidence_spans"], inputs["evidence_role"]
    mask = role > ROLE_QUESTION
    grounding = grounding_log_likelihood(output.evidence_logits, spans, mask, output.frame_mask)
    chosen, rejected = (output.token_logps.sum(1) + grounding).chunk(2)
    for i, wanted in enumerate(meta["logps"]):
        assert chosen[i].item() == pytest.approx(wanted["chosen"], abs=5 * TOLERANCE)  # sums of some 80
        assert rejected[i].item() == pytest.approx(wanted["rejected"], abs=5 * TOLERANCE)
    preference = -F.logsigmoid(meta["beta"] * (chosen - rejected))
    assert preference.tolist() == pytest.approx([w["dpo_loss"] for w in meta["logps"]], abs=TOLERANCE)

    similarity, real = output.evidence_logits[:2], output.frame_mask[:2]
    targets = soft_targets(spans[:2], similarity.shape[-1])
    language = -output.token_logps[:2].sum() / (inputs["labels"][:2] != -100).sum()
    ground = grounding_loss(similarity, targets, mask[:2], real).mean()
    consistency = consistency_loss(output.evidence_queries[:2], role[:2]).mean()
    loss = language + 10 * ground + 10 * consistency + preference.mean()
    assert loss.item() == pytest.approx(meta["loss"], abs=TOLERANCE)
    loss.backward()
    assert_gradients_close(trainee, tensors)


# ---- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model, row: Row) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], torch.Tensor]:
    """Feed a row's response token by token: logits, probabilities and span of every step, and the frame states."""
    output = model(**prompt_inputs([row]), use_cache=True, logits_to_keep=1)
    states, keys = output.frame_states, output.frame_keys
    logits, probabilities, spans = [], [], []
    for token in row.response:
        similarity = evidence_similarity(output.next_query[:, None], keys)[0]  # (1, T)
        span, _ = decode_spans(similarity)
        logits.append(output.logits[0, -1])
        probabilities.append(similarity[0].sigmoid())
        spans.append(span[0].tolist())
        output = model(
            input_ids=torch.tensor([[token]]),
            past_key_values=output.past_key_values,
            evidence_embeds=pool_spans(states, span[None]) if token == EVIDENCE else None,
        )
    return torch.stack(logits), torch.stack(probabilities), spans, states[0]


def test_forced_decoding(model):
    """Similarities and spans of every step, `<evi>` or not, and the states that a span is filled with."""
    meta, tensors = golden("forced")
    logits, probabilities, spans, states = decode(model, forced_row())
    assert_close(logits, tensors["logits"])
    assert_close(probabilities, tensors["sim"])
    assert_close(states, tensors["memory"])
    assert spans == [step[0] for step in meta["intervals"]]


@pytest.mark.parametrize("case", range(4))
def test_similarities_and_spans_of_every_generated_step(model, case):
    meta, tensors = golden("infer")
    logits, probabilities, spans, _ = decode(model, inference_rows()[case])
    assert_close(logits, tensors[f"{case}.logits"])
    assert_close(probabilities, tensors[f"{case}.sim"])
    assert spans == [step[0] for step in meta["cases"][case]["intervals"]]


@pytest.mark.parametrize("cases", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_greedy_generation(model, cases):
    """Tokens, logits and the spans of the `<evi>` tokens; the batch of all cases gives what each gives alone."""
    meta, tensors = golden("infer")
    rows = inference_rows()
    inputs = prompt_inputs([rows[case] for case in cases])
    generated = model.generate(
        **inputs,
        max_new_tokens=14,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = generated.sequences[:, inputs["input_ids"].shape[1] :]
    for i, case in enumerate(cases):
        assert tokens[i].tolist() == tensors[f"{case}.tokens"].tolist()
        assert_close(torch.stack([step[i] for step in generated.logits]), tensors[f"{case}.logits"])
        intervals = meta["cases"][case]["intervals"]
        wanted = [tuple(intervals[step][0]) for step, token in enumerate(tokens[i].tolist()) if token == EVIDENCE]
        assert generated.evidence_trace.spans[i] == wanted


def test_eager_attention_gives_the_same(folder):
    """The original runs eager attention, the other tests here sdpa."""
    _, tensors = golden("forced")
    eager = D2VLMForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    assert_close(decode(eager, forced_row())[0], tensors["logits"])
