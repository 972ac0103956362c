# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The conversion of the original checkpoints: every tensor finds its place, in every family, and E.T. Chat's too."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden_batches import GOLDEN, sft_rows, training_inputs
from original_checkpoints import (
    FAMILIES,
    HIDDEN,
    VOCABULARY,
    etchat_parts,
    family_checkpoint,
    golden_config,
    golden_tensors,
    write_original,
)
from safetensors.torch import load_file
from tiny_tokenizers import (
    SPECIAL_TOKENS,
    TURN_TOKENS,
    build_bpe_tokenizer,
    build_sentencepiece_tokenizer,
    build_wordpiece_qformer_tokenizer,
)
from transformers import GenerationConfig

from d2vlm_hf.hub.convert import convert_checkpoint, plan_conversion
from d2vlm_hf.hub.key_maps import TokenIds, choose_token_ids, target_name, translate_config
from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration
from d2vlm_hf.model.processing_d2vlm import D2VLMProcessor


FULL_SIZE = Path(__file__).parent / "golden" / "phi3_full_keys.json"
EMBEDDINGS, LM_HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def shapes_only(shapes: dict[str, list[int]]) -> SimpleNamespace:
    """What `plan_conversion` needs of a checkpoint: names and shapes."""
    return SimpleNamespace(
        shapes={name: tuple(shape) for name, shape in shapes.items()}, replaced=[], origin=lambda name: (name,)
    )


def converted(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---- every tensor ---------------------------------------------------------------------------------------------------


def test_all_tensors_of_the_full_size_model_are_accounted_for():
    """5.02 B parameters by name and shape, on the meta device: nothing is missing, nothing left over."""
    golden = json.loads(FULL_SIZE.read_text())
    shapes = golden["state_dict"]
    plan = plan_conversion(golden["config"], shapes_only(shapes))
    report = plan.report
    assert len(shapes) == 1064
    assert (report.missing, report.misshaped, report.unexpected) == ([], [], [])
    merged = [name for names in report.merged.values() for name in names]
    accounted = [*report.kept, *report.renamed, *merged, *report.left_out]
    assert sorted(accounted) == sorted(shapes)
    assert list(report.left_out) == ["model.qformer_bert.bert.embeddings.position_ids"]
    assert len(report.merged) == 39
    for name, target in report.renamed.items():
        assert plan.shapes[target] == tuple(shapes[name])
    for target, (query, value) in report.merged.items():
        assert (query.endswith(".attn.q_bias"), value.endswith(".attn.v_bias")) == (True, True)
        assert plan.shapes[target] == (3 * shapes[query][0],)
    initialised = {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}
    assert set(report.initialised) == initialised
    assert set(plan.shapes) == {"lm_head.weight", *report.renamed.values(), *report.merged, *initialised}
    original = sum(math.prod(shape) for shape in shapes.values())
    ours = sum(math.prod(shape) for shape in plan.shapes.values())
    # fixed positions go; the norm and the zero biases of the keys come
    assert ours == original - 512 + 2 * 1408 + 39 * 1408
    assert 5.01e9 < ours < 5.03e9


def test_sizes_that_a_config_does_not_state_are_the_published_ones():
    config = translate_config(json.loads(FULL_SIZE.read_text())["config"], TokenIds(32063, 32011, 32012, 32064))
    vision, qformer = config.vision_config, config.qformer_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (1408, 6144, 39)
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
    assert (vision.layer_norm_eps, config.vision_feature_layer) == (1e-6, -1)
    assert (qformer.vocab_size, qformer.hidden_size, qformer.num_hidden_layers) == (30523, 768, 12)
    assert (qformer.cross_attention_frequency, qformer.encoder_hidden_size, config.num_query_tokens) == (2, 1408, 32)
    assert (qformer.hidden_dropout_prob, qformer.attention_probs_dropout_prob) == (0.1, 0.1)
    assert (config.evidence_layer, config.evidence_threshold, config.evidence_decay) == (6, 0.6, 2.0)
    assert (config.grounding_weight, config.consistency_weight) == (10.0, 10.0)


@pytest.mark.parametrize(("layer", "depth"), [(-2, 39), (-1, 40), (10, 11)])
def test_the_vision_tower_is_as_deep_as_it_was_built(layer, depth):
    source = {**json.loads(FULL_SIZE.read_text())["config"], "vision_output_layer": layer}
    config = translate_config(source, choose_token_ids(source, etchat=False))
    assert config.vision_config.num_hidden_layers == depth


def test_values_arrive_unchanged_under_their_new_names(tmp_path):
    report = convert_checkpoint(GOLDEN / "checkpoint", tmp_path / "ours")
    source, ours = golden_tensors(), converted(tmp_path / "ours")
    assert set(ours) == set(D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict())
    for name, target in {**report.renamed, "lm_head.weight": "lm_head.weight"}.items():
        assert ours[target].equal(source[name])
    for layer in range(3):
        there = f"model.vision_tower.vision_tower.blocks.{layer}.attn."
        query, key, value = ours[f"model.vision_tower.encoder.layers.{layer}.self_attn.qkv.bias"].chunk(3)
        assert query.equal(source[f"{there}q_bias"])
        assert value.equal(source[f"{there}v_bias"])
        assert not key.any()
    assert (ours["model.vision_tower.post_layernorm.weight"] == 1).all()
    assert report.kept == ["lm_head.weight"]
    assert report.family == "d2vlm"


def test_leftovers_are_named_by_reason_or_as_unknown(tmp_path, caplog):
    tensors = golden_tensors() | {
        "model.qformer_bert.cls.predictions.bias": torch.zeros(71),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.extra.weight": torch.zeros(2),
    }
    report = convert_checkpoint(write_original(tmp_path / "theirs", tensors), tmp_path / "ours")
    assert report.unexpected == ["model.extra.weight"]
    assert "1 tensors are known to no rule and were not converted: model.extra.weight" in caplog.text
    assert "language-modelling head" in report.left_out["model.qformer_bert.cls.predictions.bias"]
    assert report.left_out["model.layers.0.self_attn.rotary_emb.inv_freq"] == "computed from the config"
    text = str(report)
    assert "merged: model.vision_tower.encoder.layers.*.self_attn.qkv.bias (3x)" in text
    assert "unexpected: model.extra.weight" in text
    assert "note: <video> is token 119, <evi> 110, </evi> 111, of 120 rows" in text


def test_names_that_look_alike_keep_apart():
    assert target_name("model.qformer_proj.weight") == "model.connector.query_out.weight"
    assert target_name("model.qformer_q_proj.1.weight") == "model.connector.attn_query.1.weight"
    assert target_name("model.norm.weight") == "model.language_model.norm.weight"
    assert target_name("model.vision_tower.vision_tower.norm.weight") is None
    assert target_name("norm.weight") is None


# ---- families -------------------------------------------------------------------------------------------------------


def spelled_out(text, tensors, row, frame_embeds, scale: float):
    """The original's computation step by step, on transformers' own text model: logits and similarities.

    `scale` multiplies every input embedding, frames and captures included: what Gemma-2 does in transformers 4.44.
    """
    tokens = torch.tensor(row.prompt + row.response)
    frames = (tokens == 119).nonzero().flatten()
    evidence = (tokens == 110).nonzero().flatten().tolist()
    embeds = text.get_input_embeddings().weight[tokens].clone()
    embeds[frames] = frame_embeds
    for place, (start, end) in zip(evidence, row.given, strict=False):
        embeds[place] += frame_embeds[start : end + 1].mean(0)

    columns = torch.arange(len(tokens))
    allowed = columns[:, None] >= columns
    allowed[frames[:, None], frames] = True
    blocked = torch.finfo(torch.float32).min

    def mask(window: int) -> torch.Tensor:
        near = allowed & (columns[:, None] - columns < window)
        return torch.where(near, 0.0, blocked)[None, None]

    masks = mask(len(tokens))
    if text.config.model_type == "gemma2":  # every second layer has a window
        masks = {"full_attention": masks, "sliding_attention": mask(text.config.sliding_window)}

    def run():
        return text(inputs_embeds=embeds[None] * scale, attention_mask=masks, output_hidden_states=True)

    memory = run().hidden_states[6][0, frames]
    answered = evidence[len(row.given) :]
    for place, (start, end) in zip(answered, 2 * row.events, strict=True):
        embeds[place] += memory[start : end + 1].mean(0)
    output = run()
    states = output.hidden_states[-2][0]

    def head(name: str, x: torch.Tensor) -> torch.Tensor:
        part = {
            key: tensors[f"{name}.{key}"] for key in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
        }
        x = F.layer_norm(x, (HIDDEN,), part["0.weight"], part["0.bias"])
        return F.linear(F.gelu(F.linear(x, part["1.weight"], part["1.bias"])), part["3.weight"], part["3.bias"])

    queries = head("evi_head", states[[place - 1 for place in answered]])
    return output.logits[0], queries @ head("frm_head", states[frames]).T / math.sqrt(HIDDEN)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_computes_what_the_original_does(tmp_path, family):
    """Against transformers' own text model, fed with embeddings that are put together by hand."""
    source, text = family_checkpoint(tmp_path / "theirs", family)
    report = convert_checkpoint(source, tmp_path / "ours")
    model = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert report.text_model == family
    row = sft_rows()[1]
    inputs = training_inputs([row], "plain", videos=1)
    output = model(**inputs, logits_to_keep=0)
    frame_embeds = load_file(GOLDEN / "sft" / "tensors.safetensors")["frame_embeds.1"]
    scale = math.sqrt(HIDDEN) if family == "gemma2" else 1.0
    logits, similarity = spelled_out(text, load_file(source / "model.safetensors"), row, frame_embeds, scale)
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.evidence_logits[0, 1:], similarity, rtol=0, atol=1e-4)
    assert logits.std() > 0.2


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_tied_embeddings_are_stored_once(tmp_path, family):
    source, text = family_checkpoint(tmp_path / "theirs", family)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_original(source, tensors, json.loads((source / "config.json").read_text()))
    report = convert_checkpoint(source, tmp_path / "ours")
    assert report.left_out["lm_head.weight"] == "tied to the embeddings"
    assert LM_HEAD not in converted(tmp_path / "ours")
    model = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.equal(text.lm_head.weight)

    tensors["lm_head.weight"] += 1
    write_original(source, tensors, json.loads((source / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embeddings, but config.json ties them"):
        convert_checkpoint(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- config.json ----------------------------------------------------------------------------------------------------


def translated(**changes):
    source = {**golden_config(), **changes}
    return translate_config(source, choose_token_ids(source, etchat=False))


def test_settings_of_the_text_model_are_carried_over():
    text = translated(
        attention_dropout=0.1, resid_pdrop=0.2, embd_pdrop=0.3, pad_token_id=None, eos_token_id=[2, 115], rope_theta=5e5
    ).text_config
    assert (text.attention_dropout, text.resid_pdrop, text.embd_pdrop) == (0.1, 0.2, 0.3)
    assert (text.pad_token_id, text.bos_token_id, text.eos_token_id) == (None, 1, [2, 115])
    assert text.rope_parameters["rope_theta"] == 5e5
    assert (text.rms_norm_eps, text.max_position_embeddings, text.vocab_size) == (1e-5, 512, VOCABULARY)


def test_ids_that_are_not_written_are_none():
    """transformers 4.44 writes no id that is None; today's Phi-3 would read 32000."""
    source = {k: v for k, v in golden_config().items() if k not in ("pad_token_id", "eos_token_id")}
    text = translate_config(source, choose_token_ids(source, etchat=False)).text_config
    assert (text.pad_token_id, text.eos_token_id) == (None, None)


def test_settings_of_the_method_are_carried_over():
    config = translated(alpha=3.0, consistency_loss=False, bi_attention=False)
    assert (config.evidence_decay, config.consistency_weight, config.frame_attention) == (3.0, 0.0, "causal")
    config = translated()
    assert (config.evidence_decay, config.consistency_weight, config.frame_attention) == (2.0, 10.0, "bidirectional")


def test_a_window_that_the_original_ignored_is_switched_off(tmp_path):
    source = write_original(tmp_path / "theirs", golden_tensors(), {**golden_config(), "sliding_window": 8})
    report = convert_checkpoint(source, tmp_path / "ours")
    assert any("the sliding window of 8 tokens is off" in note for note in report.notes)
    model = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.config.text_config.sliding_window is None


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_the_long_rope_of_phi3_under_all_its_names(name):
    """Frequencies and scale as transformers 4.44 computes them."""
    short, long = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
    scaling = {"type": name, "short_factor": short, "long_factor": long}
    config = translated(rope_scaling=scaling, original_max_position_embeddings=16, max_position_embeddings=64)
    assert scaling["type"] == name  # the caller's dict is left alone
    text = config.text_config
    rotary = D2VLMForConditionalGeneration(config).model.language_model.rotary_emb
    states = torch.zeros(1, 1, HIDDEN)
    for length, factors in ((16, short), (17, long)):
        positions = torch.arange(length)
        cos, sin = rotary(states, positions[None])
        bases = torch.tensor([1 / (factor * 10000.0 ** (2 * i / 16)) for i, factor in enumerate(factors)])
        angles = (positions[:, None] * bases).repeat(1, 2)
        scale = math.sqrt(1 + math.log(64 / 16) / math.log(16))
        torch.testing.assert_close(cos[0], angles.cos() * scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[0], angles.sin() * scale, rtol=0, atol=1e-5)
    assert text.rope_parameters["rope_type"] == "longrope"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector": "mlp2x_gelu"}, "config.json has mm_projector='mlp2x_gelu': all published checkpoints have"),
        ({"vision_tower": "clip"}, "config.json has vision_tower='clip'"),
        ({"use_time_tag": True}, "config.json has use_time_tag=True"),
        ({"vocab_size": None}, "config.json has vocab_size=None: without the rows of the embedding matrix"),
        ({"evidence_token_id": None}, "config.json has evidence_token_id=None and evidence_end_token_id=111"),
    ],
)
def test_settings_that_cannot_be_converted(changes, message):
    with pytest.raises(ValueError, match=message):
        translated(**changes)


def test_the_family_is_found_by_any_of_its_names(tmp_path):
    for changes in ({"model_type": "phi3"}, {"model_type": "phi3", "architectures": None}):
        source = write_original(tmp_path / "theirs", golden_tensors(), {**golden_config(), **changes})
        assert convert_checkpoint(source, tmp_path / "ours", overwrite=True).text_model == "phi3"


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    source = write_original(tmp_path / "theirs", golden_tensors(), {"model_type": "d2vlm", "vocab_size": 120})
    message = "config.json has model_type='d2vlm' and architectures=None: that is no D2VLM or E.T. Chat checkpoint"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "ours")


# ---- special tokens -------------------------------------------------------------------------------------------------


def test_video_takes_the_last_row_of_a_padded_vocabulary():
    source = golden_config()
    assert choose_token_ids(source, etchat=False) == TokenIds(119, 110, 111, 120)
    full = json.loads(FULL_SIZE.read_text())["config"]
    assert choose_token_ids(full, etchat=False) == TokenIds(32063, 32011, 32012, 32064)


@pytest.mark.parametrize("changes", [{"evidence_end_token_id": 119}, {"pad_token_id": 119}])
def test_video_takes_a_new_row_where_none_is_free(changes):
    assert choose_token_ids({**golden_config(), **changes}, etchat=False).video == 120


def test_a_new_row_is_the_mean_of_the_others(tmp_path):
    source = write_original(tmp_path / "theirs", golden_tensors(), {**golden_config(), "pad_token_id": 119})
    report = convert_checkpoint(source, tmp_path / "ours")
    ours, theirs = converted(tmp_path / "ours"), golden_tensors()
    for target, name in ((EMBEDDINGS, "model.embed_tokens.weight"), (LM_HEAD, "lm_head.weight")):
        assert ours[target].shape == (121, HIDDEN)
        assert ours[target][:120].equal(theirs[name])
        torch.testing.assert_close(ours[target][120], theirs[name].mean(0))
        assert report.initialised[target] == "rows 120: the mean of the rows before them (new tokens)"
    assert D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").config.text_config.vocab_size == 121


def evidence_checkpoint(folder: Path, tokenizer, config: dict | None = None, tensors=None) -> Path:
    """The golden checkpoint with a vocabulary that fits a tokenizer: as many rows as tokens, and a few more."""
    tensors, config = tensors or golden_tensors(), dict(config or golden_config())
    rows = len(tokenizer) + 5
    generator = torch.Generator().manual_seed(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(rows, HIDDEN, generator=generator)
    config["vocab_size"] = rows
    if "evidence_token_id" in config:
        ids = tokenizer.convert_tokens_to_ids(["<evi>", "</evi>"])
        config["evidence_token_id"], config["evidence_end_token_id"] = ids
    return write_original(folder, tensors, config)


@pytest.mark.parametrize("where", ["beside", "folder", "object"])
def test_with_tokenizers_the_processor_is_written_too(tmp_path, where):
    """`<video>` is added to a copy of the tokenizer; the model, the processor and `generate` agree on every id."""
    tokenizer = build_sentencepiece_tokenizer(tmp_path, False, special_tokens=(*TURN_TOKENS, "<evi>", "</evi>"))
    size = len(tokenizer)
    source = evidence_checkpoint(tmp_path / "theirs", tokenizer)
    words = (GOLDEN / "checkpoint" / "qformer_vocab.txt").read_text()
    options = {}
    if where == "beside":
        tokenizer.save_pretrained(source)
        (source / "qformer_vocab.txt").write_text(words)
    else:
        qformer = build_wordpiece_qformer_tokenizer(words.splitlines())
        if where == "folder":
            tokenizer.save_pretrained(tmp_path / "text")
            qformer.save_pretrained(tmp_path / "question")
            options = {"tokenizer": tmp_path / "text", "qformer_tokenizer": str(tmp_path / "question")}
        else:
            options = {"tokenizer": tokenizer, "qformer_tokenizer": qformer}
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    report = convert_checkpoint(source, tmp_path / "ours", **options)
    assert not any("no processor" in note for note in report.notes)
    assert len(tokenizer) == size

    config = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    processor = D2VLMProcessor.from_pretrained(tmp_path / "ours")
    assert (config.video_token_id, config.text_config.vocab_size) == (size, size + 5)
    assert processor.video_token_id == config.video_token_id
    assert processor.evidence_token_id == config.evidence_token_id
    assert processor.evidence_end_token_id == config.evidence_end_token_id
    assert processor.video_processor.crop_size["height"] == 28
    question = processor.encode_questions(["what happens in the video"])["qformer_input_ids"]
    assert question[0, [0, -1]].tolist() == [2, 3]
    generation = GenerationConfig.from_pretrained(tmp_path / "ours")
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert generation.eos_token_id == [2, 1, end_of_turn]
    prompt = processor.apply_chat_template([{"role": "user", "content": "when?"}], add_generation_prompt=True)
    assert "<|system|>\nYou are a helpful AI assistant.<|end|>" in prompt


def test_a_tokenizer_alone_is_written_alone(tmp_path):
    tokenizer = build_bpe_tokenizer(special_tokens=SPECIAL_TOKENS)
    source = evidence_checkpoint(tmp_path / "theirs", tokenizer)
    report = convert_checkpoint(source, tmp_path / "ours", tokenizer=tokenizer)
    assert "no processor was written: pass qformer_tokenizer (BERT-base uncased)" in report.notes
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert not (tmp_path / "ours" / "processor_config.json").exists()
    config = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    assert config.video_token_id == tokenizer.convert_tokens_to_ids("<video>")


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path):
    tokenizer = build_bpe_tokenizer()
    source = write_original(tmp_path / "theirs", golden_tensors())
    message = r"the tokenizer has <evi>, </evi> at .* and config.json at \(110, 111\): they are not of one checkpoint"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "ours", tokenizer=tokenizer)


# ---- E.T. Chat ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
def test_etchat_becomes_a_starting_point(tmp_path, stage):
    """Matching is left out by name, evidence starts new, everything else is taken over."""
    tensors, config = etchat_parts(stage)
    report = convert_checkpoint(write_original(tmp_path / "theirs", tensors, config), tmp_path / "ours")
    assert report.family == "etchat"
    left_out = {name for name in tensors if name.startswith("vid_head.")}
    assert len(left_out) == (6 if stage == 3 else 0)
    assert left_out == {name for name, reason in report.left_out.items() if "<vid>" in reason}
    ours = converted(tmp_path / "ours")
    for name, target in report.renamed.items():
        expected = ours[target][:VOCABULARY] if target == EMBEDDINGS else ours[target]
        assert expected.equal(tensors[name])
    for target, name in ((EMBEDDINGS, "model.embed_tokens.weight"), (LM_HEAD, "lm_head.weight")):
        assert ours[target].shape == (VOCABULARY + 3, HIDDEN)
        mean = tensors[name].mean(0).expand(3, -1)
        torch.testing.assert_close(ours[target][VOCABULARY:], mean)
    # a stage-3 checkpoint has a frame head, which the original would go on with too
    fresh = ["evidence_head."] if stage == 3 else ["evidence_head.", "frame_head."]
    for prefix in fresh:
        assert (ours[f"{prefix}0.weight"] == 1).all()
        assert not ours[f"{prefix}1.bias"].any()
        assert 0.015 < ours[f"{prefix}1.weight"].std() < 0.025
        assert f"{prefix}1.weight" in report.initialised
    if stage == 3:
        assert ours["frame_head.1.weight"].equal(tensors["frm_head.1.weight"])
        assert any("<vid> (token 110)" in note for note in report.notes)
    model_config = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    assert (model_config.evidence_token_id, model_config.evidence_end_token_id) == (120, 121)
    assert model_config.video_token_id == 122
    assert model_config.frame_attention == "bidirectional"
    assert any("they attend both ways" in note for note in report.notes) == (stage == 2)


def test_etchat_with_a_tokenizer_uses_free_rows(tmp_path):
    """New tokens come after the tokenizer's own, in rows that only padded the matrix; their rows become the mean."""
    tokenizer = build_bpe_tokenizer(special_tokens=(*TURN_TOKENS, "<vid>"))
    tensors, config = etchat_parts(stage=3)
    source = evidence_checkpoint(tmp_path / "theirs", tokenizer, config, tensors)
    convert_checkpoint(source, tmp_path / "ours", tokenizer=tokenizer)
    theirs, ours = load_file(source / "model.safetensors"), converted(tmp_path / "ours")
    size = len(tokenizer)
    for target, name in ((EMBEDDINGS, "model.embed_tokens.weight"), (LM_HEAD, "lm_head.weight")):
        assert ours[target].shape == theirs[name].shape
        torch.testing.assert_close(ours[target][size : size + 2], theirs[name][:size].mean(0).expand(2, -1))
        assert ours[target][:size].equal(theirs[name][:size])
    config = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").config
    ids = (config.evidence_token_id, config.evidence_end_token_id, config.video_token_id)
    assert ids == (size, size + 1, size + 2)


def test_a_starting_point_can_be_trained(tmp_path):
    tensors, config = etchat_parts(stage=2)
    convert_checkpoint(write_original(tmp_path / "theirs", tensors, config), tmp_path / "ours")
    model = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").train()
    inputs = training_inputs(sft_rows(), "prefix", videos=2)
    for there, here in ((110, 120), (111, 121), (119, 122)):
        for name in ("input_ids", "labels"):
            inputs[name][inputs[name] == there] = here
    output = model(**inputs)
    output.loss.backward()
    assert output.loss.isfinite()
    assert model.evidence_head[3].weight.grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.grad[120].abs().sum() > 0


def test_conversions_are_repeatable(tmp_path):
    tensors, config = etchat_parts(stage=2)
    source = write_original(tmp_path / "theirs", tensors, config)
    for name in ("one", "two"):
        convert_checkpoint(source, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
