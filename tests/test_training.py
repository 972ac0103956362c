# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Supervised training: what should move moves, batches of any cut give the same step, a killed run resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import SPEC, preference_dataset, sft_rows, tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3Config, SiglipVisionConfig

from d2vlm_hf.data.schema import make_row
from d2vlm_hf.data.sources import RenderedShapes, load_rows, resolve_video
from d2vlm_hf.hub.publish import check_folder
from d2vlm_hf.model.configuration_d2vlm import D2VLMConfig
from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration
from d2vlm_hf.training.configs import D2VLMSFTConfig, DataArguments, ModelArguments
from d2vlm_hf.training.grounding_mixin import frame_iou
from d2vlm_hf.training.run import last_checkpoint, load_training_rows, lora_config, main, run_sft
from d2vlm_hf.training.scratch import build_from_scratch
from d2vlm_hf.training.sft_trainer import D2VLMSFTTrainer


RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sft_rows(tmp_path_factory.mktemp("videos"))


def options(folder, **changed) -> D2VLMSFTConfig:
    return D2VLMSFTConfig(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "report_to": "none",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **changed,
        },
    )


def train(folder, rows, resume=None, **changed):
    model, processor = tiny()
    trainer = D2VLMSFTTrainer(
        model=model, args=options(folder, **changed), processing_class=processor, train_dataset=rows
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_what_should_move_moved(tmp_path, rows):
    before = weights(tiny()[0])
    trainer = train(tmp_path, rows)
    moved = {name for name, after in weights(trainer.model).items() if not torch.equal(after, before[name])}
    frozen = {name for name in before if name.startswith("model.vision_tower")}
    assert not moved & frozen
    # A k bias cancels in its softmax, and nothing reads the text side of the Q-Former's last layer.
    unread = ("key.bias", "k_proj.bias", "qformer.encoder.layer.0.intermediate.", "qformer.encoder.layer.0.output.")
    assert {name for name in set(before) - moved - frozen if not any(part in name for part in unread)} == set()
    log = trainer.state.log_history[0]
    assert {"loss", "lm_loss", "grounding_loss", "consistency_loss", "grounding/miou"} <= set(log)
    parts = log["lm_loss"] + 10 * log["grounding_loss"] + 10 * log["consistency_loss"]
    assert log["loss"] == pytest.approx(parts, rel=1e-4)


def test_the_cut_into_batches_does_not_matter(tmp_path, rows):
    """1 x 8 = 2 x 4 accumulated = 8 x 1, though rows differ in length and some have no event."""
    eight = [*rows[:7], {**rows[7], "answer": "Nothing like that happens.", "spans": []}]
    runs = [
        train(tmp_path / str(size), eight, max_steps=1, learning_rate=1e-3, optim="sgd",
              per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        for size in (8, 4, 1)
    ]  # fmt: skip
    for other in runs[1:]:
        for (name, a), b in zip(runs[0].model.named_parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4, msg=name)
        assert other.state.log_history[0]["loss"] == pytest.approx(runs[0].state.log_history[0]["loss"], rel=1e-4)


def test_a_run_that_was_stopped_resumes_to_the_same_weights(tmp_path, rows):
    whole = train(tmp_path / "whole", rows, max_steps=4)
    train(tmp_path / "half", rows, max_steps=4, save_strategy="steps", save_steps=2)
    halfway = tmp_path / "half" / "checkpoint-2"
    assert {"processor_config.json", "modeling_d2vlm.py", "model.safetensors"} <= {p.name for p in halfway.iterdir()}
    resumed = train(tmp_path / "again", rows, max_steps=4, resume=str(halfway))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


DDP_SCRIPT = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training import train, weights
rows = json.loads(Path({rows!r}).read_text())
trainer = train({out!r}, rows, max_steps=1, learning_rate=1e-3, optim="sgd", per_device_train_batch_size=4,
                data_seed=0, ddp_backend="gloo")
if trainer.is_world_process_zero():
    torch.save(weights(trainer.accelerator.unwrap_model(trainer.model)), {out!r} + "/weights.pt")
"""


def test_two_processes_take_the_same_step(tmp_path, rows):
    """Also with a rank whose rows have no event at all: half of the rows are without."""
    empty = [{**row, "answer": "Nothing.", "spans": []} for row in rows[4:8]]
    mixed = [pair for both in zip(rows[:4], empty, strict=True) for pair in both]  # every second row: one rank's share
    single = train(tmp_path / "one", mixed, max_steps=1, learning_rate=1e-3, optim="sgd", per_device_train_batch_size=8)
    (tmp_path / "rows.json").write_text(json.dumps(mixed))
    (tmp_path / "two").mkdir()
    script = tmp_path / "ddp.py"
    script.write_text(
        DDP_SCRIPT.format(tests=str(Path(__file__).parent), rows=str(tmp_path / "rows.json"), out=str(tmp_path / "two"))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    both = torch.load(tmp_path / "two" / "weights.pt", weights_only=True)
    for name, one in weights(single.model).items():
        torch.testing.assert_close(one, both[name], atol=2e-6, rtol=1e-4, msg=name)


def test_evaluation_decodes_and_generates(tmp_path, rows):
    model, processor = tiny()
    trainer = D2VLMSFTTrainer(
        model=model, args=options(tmp_path, eval_generate_rows=3, eval_max_new_tokens=8), processing_class=processor,
        train_dataset=rows, eval_dataset=rows[:5],
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_grounding/miou"] <= 1
    assert 0 <= metrics["eval_generated/miou"] <= 1
    assert metrics["eval_loss"] > 0


def test_two_learning_rates(tmp_path, rows):
    from peft import get_peft_model

    model, processor = tiny()
    arguments = ModelArguments(model_name_or_path="x", use_lora=True, lora_r=2, lora_alpha=4)
    model = get_peft_model(model, lora_config(model, arguments))
    trainer = D2VLMSFTTrainer(
        model=model, args=options(tmp_path, full_learning_rate=5e-4), processing_class=processor, train_dataset=rows
    )
    rates = {}
    by_parameter = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates.setdefault("lora_" in name, set()).add(by_parameter[id(parameter)])
    assert rates == {True: {1e-2}, False: {5e-4}}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def phi3_like():
    return build_from_scratch(
        {**SPEC, "text": {**SPEC["text"], "model_type": "phi3", "tie_word_embeddings": False}}, ["a"]
    )[0]


def qwen3_siglip():
    return D2VLMForConditionalGeneration(
        D2VLMConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                patch_size=8
            ),
            text_config=Qwen3Config(
                hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
                head_dim=16, vocab_size=64, tie_word_embeddings=True,
            ),
            connector_type="mlp", vision_feature_select_strategy="full", evidence_layer=1,
            video_token_id=60, evidence_token_id=61, evidence_end_token_id=62,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "adapted", "in_full"),
    [
        (phi3_like, {"qkv_proj", "o_proj"}, {"connector", "evidence_head", "frame_head", "embed_tokens", "lm_head"}),
        (
            qwen3_siglip,
            {"q_proj", "k_proj", "v_proj", "o_proj"},
            {"connector", "evidence_head", "frame_head", "embed_tokens"},
        ),
    ],
    ids=["phi3-eva", "qwen3-siglip"],
)
def test_lora_stays_inside_the_language_model(build, adapted, in_full):
    from peft import get_peft_model

    model = build()
    model = get_peft_model(model, lora_config(model, ModelArguments(model_name_or_path="x", lora_r=2)))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lora = {name for name in names if "lora_" in name}
    assert {name.split(".lora_")[0].split(".")[-1] for name in lora} == adapted
    assert all("language_model" in name for name in lora)
    rest = [name for name in names if name not in lora]
    assert all(".modules_to_save." in name for name in rest)
    assert {part for part in in_full if any(f".{part}." in name for name in rest)} == in_full
    assert not any("vision_tower" in name for name in names)


def test_lora_names_that_fit_nothing_are_an_error():
    model, _ = tiny()
    with pytest.raises(ValueError, match=r"lora_target_modules=\['query'\] name no projection of Qwen2Model"):
        lora_config(model, ModelArguments(model_name_or_path="x", lora_target_modules=["query"]))


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "ladder/stage0"])
def test_the_shapes_recipe_runs_and_loads_again(tmp_path, name):
    recipe = yaml.safe_load((RECIPES / "shapes" / f"{name}.yaml").read_text())
    if "eval_shapes" in recipe:
        recipe["eval_shapes"] |= {"num_videos": 2, "rows_per_video": 2, "size": 32}
    recipe |= {
        "scratch": SPEC,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "eval_generate_rows": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "dataloader_num_workers": 0,
        "bf16": False,
        "eval_max_new_tokens": 4,
    }
    recipe["shapes"] |= {"size": 16, "fps": 1.0}
    recipe["warmup"] |= {
        "patches": 1, "frames": 1, "letters": 1, "words": 1, "batch_size": 2, "video_batch_size": 1, "num_workers": 0,
        "fps": 1.0,
    }  # fmt: skip
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    main(["--config", str(config)])
    folder = tmp_path / "run"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.evidence_token_id == model.config.evidence_token_id
    assert json.loads((folder / "all_results.json").read_text())["wall_seconds"] > 0
    assert (folder / "checkpoint-3").is_dir()
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert all("LICENSE" in warning for warning in check_folder(folder))  # fit for `d2vlm push`


def test_unknown_keys_are_errors(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model_name_or_path: x\ndataset: y\nlearnin_rate: 1.0\n")
    with pytest.raises(ValueError, match="learnin_rate"):
        main(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelArguments(), r"model_name_or_path=None and scratch=None: a run starts from exactly one"),
        (lambda: DataArguments(), r"dataset=None and shapes=None: rows come from exactly one"),
        (lambda: D2VLMSFTConfig(use_cpu=True, remove_unused_columns=True), r"remove_unused_columns=True would drop"),
        (
            lambda: RenderedShapes(4, stages=[{"until": 1.0, "difficulty": "easy", "speed": 2}]),
            r"the stages have unknown options \['speed'\]",
        ),
        (lambda: build_from_scratch({"vision": {}, "colour": 1}, []), r"scratch has unknown parts \['colour'\]"),
        (
            lambda: RenderedShapes(4, stages=[{"until": 0.5, "difficulty": "easy"}]),
            r"the stages end at \[0.5\]: each ends later than the one before, the last at 1.0",
        ),
        (
            lambda: load_training_rows(
                DataArguments(shapes={}), D2VLMSFTConfig(output_dir="x", use_cpu=True, report_to="none")
            ),
            r"max_steps=-1: rendered shapes never end",
        ),
        (
            lambda: resolve_video("../secret.mp4", Path("videos")),
            r"'../secret.mp4' leads out of videos: rows may name files inside it only",
        ),
        (lambda: load_rows("missing.jsonl"), r"missing.jsonl does not exist"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_curriculum_changes_by_position():
    stages = [
        {"until": 0.5, "difficulty": "easy", "fps": 1.0, "task_weights": {"rar": 1.0}},
        {"until": 1.0, "difficulty": "middle", "rows_per_video": 2, "task_weights": {"tvg": 1.0}, "absent_share": 1.0},
    ]
    data = RenderedShapes(8, size=16, stages=stages)
    first, last = data[0]["rows"], data[7]["rows"]
    assert {(row["source"].split("/")[1], row["task"]) for row in first} == {("easy", "rar")}
    assert (np.diff(first[0]["video"]["timestamps"]) == 1).all()
    assert {(row["source"].split("/")[1], row["task"]) for row in last} == {("middle", "tvg")}
    assert len({id(row["video"]) for row in last}) == 1  # rows about one video share it
    assert len(last) == 2
    assert not any(row["spans"] for row in last)
    assert (data[0]["rows"][0]["video"]["frames"] == first[0]["video"]["frames"]).all()  # the same for the same index


def scratch_model(**text):
    sizes = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    spec = {**SPEC, "text": {**sizes, **text}, "model": {**SPEC["model"], "evidence_layer": 1}}
    return lambda **options: build_from_scratch({**spec, **options}, ["When does it happen?"])[0]


def test_neighbour_heads_look_beside_themselves():
    torch.manual_seed(0)
    model = scratch_model()(neighbour_heads={"layers": 2, "offsets": [-1, 2]})
    model.set_attn_implementation("eager")
    both_ways = {"full_attention": torch.zeros(1, 1, 12, 12)}
    states = model.model.language_model(
        inputs_embeds=torch.randn(1, 12, 64), attention_mask=both_ways, output_attentions=True
    )
    places = torch.arange(12)
    for layer in range(2):
        looked_at = states.attentions[layer][0].argmax(-1)  # (heads, 12)
        assert looked_at[0, 1:].tolist() == places[:-1].tolist()
        assert looked_at[1, :-2].tolist() == places[2:].tolist()
    assert states.attentions[2].amax(-1).mean() < 0.4  # the other layers are as they were drawn


@pytest.mark.parametrize(
    ("text", "offsets", "message"),
    [
        ({}, [1, 2, 3, 4, 5], r"neighbour_heads has 5 offsets for 4 heads: each takes one"),
        ({"model_type": "llama"}, [1], r"neighbour_heads needs biases of queries and keys, which 'llama' has not"),
    ],
)
def test_neighbour_heads_need_heads_and_biases(text, offsets, message):
    with pytest.raises(ValueError, match=message):
        scratch_model(**text)(neighbour_heads={"layers": 1, "offsets": offsets})


def test_a_release_is_rounded_and_loads_as_float32(tmp_path):
    model, processor = tiny()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "trained")
    command = [sys.executable, "recipes/shapes/release.py", str(tmp_path / "trained"), str(tmp_path / "released")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    released = tmp_path / "released"
    assert not list(released.glob("*.py"))
    loaded = AutoModelForImageTextToText.from_pretrained(released)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.half().float(), msg=name, rtol=0, atol=0)
    AutoProcessor.from_pretrained(released)


def test_a_processor_is_needed(tmp_path, rows):
    with pytest.raises(ValueError, match="processing_class is missing"):
        D2VLMSFTTrainer(model=tiny()[0], args=options(tmp_path), train_dataset=rows)


def test_row_files(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**row, "video": "clip.mp4"}) for row in rows))
    loaded = load_rows(str(file))
    assert loaded[0]["video"] == str(tmp_path / "clip.mp4")
    assert [row["id"] for row in loaded] == [row["id"] for row in rows]
    file.write_text(json.dumps({**rows[0], "spans": [[5.0, 2.0]] * len(rows[0]["spans"])}))
    with pytest.raises(ValueError, match="spans"):
        load_rows(str(file))
    file.write_text("")
    with pytest.raises(ValueError, match="is empty: there is nothing to train or evaluate on"):
        load_rows(str(file))
    file.write_text(json.dumps(rows[0]) + "\n\n{not json\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3, value '{not json': is no JSON"):
        load_rows(str(file))
    parquet = tmp_path / "rows.parquet"
    preference_dataset(rows[:2], 1).to_parquet(str(parquet))
    assert load_rows(str(parquet))[0]["video"]["path"] == rows[0]["video"]


def test_what_a_row_of_a_file_leaves_out_is_filled_in(tmp_path, rows):
    file = tmp_path / "own.jsonl"
    short = {key: rows[0][key] for key in ("video", "question", "answer", "spans")}
    file.write_text(json.dumps(short))
    (row,) = load_rows(str(file))
    assert row == make_row(id="own-0", duration=pytest.approx(rows[0]["duration"], abs=0.1), **short)
    file.write_text(json.dumps({**short, "video": "gone.mp4"}))
    with pytest.raises(
        ValueError, match=r"^own, row 0 has no duration, and its video does not .*gone.mp4 does not exist"
    ):
        load_rows(str(file))
    file.write_text(json.dumps({key: value for key, value in short.items() if key != "spans"}))
    with pytest.raises(ValueError, match="column 'spans', value missing"):
        load_rows(str(file))


def test_frame_iou():
    a, b = torch.tensor([[2, 5], [0, 0], [3, 4]]), torch.tensor([[4, 7], [0, 0], [6, 9]])
    assert frame_iou(a, b).tolist() == pytest.approx([2 / 6, 1.0, 0.0])


def test_a_run_from_files(tmp_path, rows):
    """A whole run on stored rows: evaluation, the saved folder, and the trained weights in it."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    model, processor = tiny()
    start = tmp_path / "start"
    model.save_pretrained(start)
    processor.save_pretrained(start)
    metrics = run_sft(
        ModelArguments(model_name_or_path=str(start), use_lora=True, lora_r=2, lora_alpha=4),
        DataArguments(dataset=str(file), eval_dataset=str(file)),
        options(tmp_path / "out", freeze_vision=True),
    )
    assert metrics["eval_loss"] > 0
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    moved = [n for n, p in merged.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])]
    assert any("q_proj" in name for name in moved)
    assert any("evidence_head" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, caplog):
    """The trainer writes weights first and its state last; a kill in between leaves a folder without it."""
    assert last_checkpoint(str(tmp_path / "gone")) is None
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_st'), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert f"{tmp_path / 'checkpoint-15' / 'trainer_state.json'} is cut off" in caplog.text
