# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Every shipped recipe: the big ones parsed and set up on tiny models, the small ones run for a few steps."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Video, load_dataset
from huggingface_hub import DatasetCard
from peft import get_peft_model
from tiny_runs import SPEC, preference_dataset, sft_rows, tiny
from transformers import pipeline
from trl import TrlParser

from d2vlm_hf.commands.check_data import check_data
from d2vlm_hf.data import build
from d2vlm_hf.evaluation.run import main as evaluate
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint
from d2vlm_hf.training import run, run_fpo
from d2vlm_hf.training.configs import D2VLMSFTConfig, DataArguments, ModelArguments
from d2vlm_hf.training.fpo_config import FPOConfig
from d2vlm_hf.training.fpo_trainer import FPOTrainer
from d2vlm_hf.training.run import load_model, lora_config
from d2vlm_hf.training.scratch import build_from_scratch
from d2vlm_hf.training.sft_trainer import D2VLMSFTTrainer


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
CONFIGS = {"sft": D2VLMSFTConfig, "fpo": FPOConfig}
# What a recipe for a GPU needs to run on any machine, and to be over soon.
SMALL = {
    "use_cpu": True, "bf16": False, "lora_r": 2, "lora_alpha": 4, "max_steps": 1, "save_strategy": "no",
    "dataloader_num_workers": 0, "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **{k: v for k, v in SPEC["vision"].items() if k != "initializer_range"}}
SPECS = {
    "d2vlm-phi3": {**SPEC, "text": {**SPEC["text"], "model_type": "phi3", "tie_word_embeddings": False}},
    "qwen3-siglip": {
        "vocab_size": SPEC["vocab_size"],
        "vision": SIGLIP,
        "text": {**SPEC["text"], "model_type": "qwen3", "head_dim": 16},
        "model": {"vision_feature_select_strategy": "full", "evidence_layer": 1},
        "processor": {"fps": 1.0},
    },
}
# The trainable parts, numbers of layers left out: adapters of the language model, and what is trained in full.
LAYER = "model.language_model.layers.*.self_attn"
IN_FULL = {"evidence_head", "frame_head", "model.connector", "model.language_model.embed_tokens"}
TRAINABLE = {
    "d2vlm-phi3": {f"{LAYER}.qkv_proj", f"{LAYER}.o_proj", "lm_head", *IN_FULL},
    "qwen3-siglip": {*(f"{LAYER}.{name}_proj" for name in "qkvo"), *IN_FULL},  # tied: the embeddings are the head
}


def parsed(path: Path, **changed):
    """The dataclasses that a script makes of a recipe, some options overridden on the command line."""
    kind = path.stem
    options = [text for name, value in changed.items() for text in (f"--{name}", str(value))]
    parser = TrlParser((ModelArguments, DataArguments, CONFIGS[kind]))
    return parser.parse_args_and_config(args=["--config", str(path), *options])


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return sft_rows(tmp_path_factory.mktemp("videos"), videos=1, per_video=2)


@pytest.mark.parametrize("kind", ["sft", "fpo"])
@pytest.mark.parametrize("folder", ["d2vlm-phi3", "qwen3-siglip"])
def test_big_recipes_are_read_as_they_are_written(folder, kind):
    path = RECIPES / folder / f"{kind}.yaml"
    found = {name: value for part in parsed(path, use_cpu=True, bf16=True) for name, value in vars(part).items()}
    for name, value in yaml.safe_load(path.read_text()).items():
        wanted = [] if (name, value) == ("report_to", "none") else value
        assert found[name] == wanted, name
    assert path.read_text().startswith("# Hardware: ")


@pytest.mark.parametrize("kind", ["sft", "fpo"])
def test_every_value_of_the_paper_run_names_its_source(kind):
    lines = (RECIPES / "d2vlm-phi3" / f"{kind}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\w+:", line)]
    assert len(values) > 20
    assert [line for line in values if not re.search(r" # .*\[(paper|script|code|here)\]", line)] == []


def trainable_parts(model) -> set[str]:
    """Names of what is trained, without the wrappers of adapters: a module with LoRA, or a part trained in full."""
    parts = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
            parts.add(re.split(r"\.(?:lora_[AB]|modules_to_save)\.", name)[0])
    return parts


@pytest.mark.parametrize("folder", ["d2vlm-phi3", "qwen3-siglip"])
def test_big_recipes_train_a_tiny_model(tmp_path, rows, folder):
    """LoRA inside the language model alone, what is trained in full beside it, two learning rates, one step of each."""
    model, processor = build_from_scratch(SPECS[folder], [row["question"] + row["answer"] for row in rows])
    save_checkpoint(tmp_path / "start", model, processor)
    for kind in ("sft", "fpo"):
        start = {"model_name_or_path": tmp_path / "start", "output_dir": tmp_path / kind}
        path = RECIPES / folder / f"{kind}.yaml"
        arguments, _, config = parsed(path, **SMALL, **start)
        assert arguments.use_lora
        model, processor = load_model(arguments, config)
        adapters = lora_config(model, arguments)
        if kind == "sft":
            model = get_peft_model(model, adapters)
            trainer = D2VLMSFTTrainer(model=model, args=config, processing_class=processor, train_dataset=rows)
        else:
            trainer = FPOTrainer(model=model, args=config, processing_class=processor, peft_config=adapters,
                                 train_dataset=preference_dataset(rows, 1))  # fmt: skip
        assert trainable_parts(trainer.model) == TRAINABLE[folder]
        rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
        recipe = yaml.safe_load(path.read_text())
        found = {("lora_" in name, rates[id(p)]) for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert found == {(True, recipe["learning_rate"]), (False, recipe["full_learning_rate"])}
        trainer.train()
        assert trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize(
    ("name", "distributed", "processes"),
    [("single", "NO", 1), ("ddp", "MULTI_GPU", 8), ("fsdp2", "FSDP", 8), ("zero2", "DEEPSPEED", 8)],
)
def test_accelerate_configs_load(name, distributed, processes):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == distributed
    assert config.num_processes == processes
    assert config.fsdp_config.get("fsdp_version", 2) == 2
    assert config.deepspeed_config.get("zero_stage", 2) == 2


def test_small_recipes_run_one_after_the_other(tmp_path):
    """Preferences of new videos, FPO on them, and the evaluation of its result, each from its own YAML."""

    def changed(name, **values):
        recipe = yaml.safe_load((RECIPES / "shapes" / f"{name}.yaml").read_text())
        for key, value in values.items():
            recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return ["--config", str(path)]

    small = {"num_videos": 1, "size": 32, "rows_per_video": 2}
    build.main(changed("preferences", output=str(tmp_path / "preferences"), shapes=small, num_proc=1, choices=True))
    counts = json.loads((tmp_path / "preferences" / "counts.json").read_text())
    assert counts["rows"] in (1, 2)  # fewer where a video holds fewer different questions
    assert {"shift", "tamper", "mcqa"} <= set(counts["made"])
    written = load_dataset(str(tmp_path / "preferences"), split="train").cast_column("video", Video(decode=False))
    assert len(written) == sum(counts["made"].values()) > 0
    card = DatasetCard.load(tmp_path / "preferences" / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en"])
    assert f"| split | train | {len(written)} |" in card.text
    assert "### text: tamper" in card.text
    assert str(tmp_path) not in card.text

    model, processor = tiny()
    save_checkpoint(tmp_path / "sft", model, processor)
    run_fpo.main(
        changed("fpo", model_name_or_path=str(tmp_path / "sft"), dataset=str(tmp_path / "preferences"), bf16=False,
                output_dir=str(tmp_path / "fpo"), max_steps=2, per_device_train_batch_size=1, save_strategy="no",
                gradient_accumulation_steps=2, disable_tqdm=True)
    )  # fmt: skip
    results = json.loads((tmp_path / "fpo" / "all_results.json").read_text())
    assert results["wall_seconds"] > 0
    evaluate(
        changed("evaluate", model=str(tmp_path / "fpo"), shapes=small, blind=[], batch_size=2, max_new_tokens=4,
                output_dir=str(tmp_path / "evaluation"))
    )  # fmt: skip
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["rows_scored"] in (1, 2)


def test_clips_of_one_s_own(tmp_path, monkeypatch):
    """Four columns a row are enough; the bundled checkpoint goes on learning from them."""
    monkeypatch.chdir(RECIPES.parent)  # the recipe names the checkpoint from there
    rows = sft_rows(tmp_path, videos=2, per_video=2)
    written = [{key: row[key] for key in ("question", "answer", "spans")} for row in rows]
    lines = [json.dumps({"video": Path(row["video"]).name, **text}) for row, text in zip(rows, written, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    assert check_data(str(tmp_path / "rows.jsonl")) == (4, [])
    run.main([
        "--config", str(RECIPES / "own_clips" / "sft.yaml"), "--dataset", str(tmp_path / "rows.jsonl"),
        "--output_dir", str(tmp_path / "own"), "--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true",
    ])  # fmt: skip
    result = pipeline("video-grounding", model=str(tmp_path / "own"))(rows[0]["video"], question=rows[0]["question"])
    assert result["answer"]
