# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""How the conversion reads and writes: shards, pickles, LoRA adapters, the Hub, damaged files, and folders in use."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from golden_batches import GOLDEN
from huggingface_hub import HfApi
from original_checkpoints import (
    etchat_parts,
    family_checkpoint,
    golden_config,
    golden_tensors,
    write_original,
)
from safetensors.torch import load_file, save_file

from d2vlm_hf.hub import convert
from d2vlm_hf.hub.convert import convert_checkpoint
from d2vlm_hf.hub.original_weights import fetch, plain_name
from d2vlm_hf.model.modeling_d2vlm import D2VLMForConditionalGeneration


CHECKPOINT = GOLDEN / "checkpoint"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What the golden checkpoint is converted to."""
    folder = tmp_path_factory.mktemp("expected") / "ours"
    convert_checkpoint(CHECKPOINT, folder)
    return load_file(folder / "model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    assert set(ours) == set(wanted)
    assert [name for name in wanted if not ours[name].equal(wanted[name])] == []


def config_only(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden_config() if config is None else config))
    return folder


def write_shards(folder: Path, stem: str, suffix: str, save) -> None:
    tensors = golden_tensors()
    names = sorted(tensors)
    parts = {f"{stem}-0000{i + 1}-of-00003{suffix}": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# ---- forms of storage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors shards", "bin", "bin shards", "state_dict in bin"])
def test_every_form_of_storage_gives_the_same(tmp_path, expected, form):
    source = config_only(tmp_path / "theirs")
    if form == "safetensors shards":
        write_shards(source, "model", ".safetensors", save_file)
    elif form == "bin shards":
        write_shards(source, "pytorch_model", ".bin", torch.save)
    else:
        tensors = golden_tensors()
        torch.save({"state_dict": tensors} if "state_dict" in form else tensors, source / "pytorch_model.bin")
    convert_checkpoint(source, tmp_path / "ours")
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), expected)


def test_large_models_are_written_in_shards(tmp_path, expected, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 2_000_000)
    convert_checkpoint(CHECKPOINT, tmp_path / "ours")
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    shards = {file: load_file(tmp_path / "ours" / file) for file in files}
    assert all(sum(t.nbytes for t in shard.values()) <= 2_000_000 for shard in shards.values())
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    model, report = D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert_equal({name: model.state_dict()[name] for name in expected}, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, None])
def test_dtype(tmp_path, expected, dtype):
    source = write_original(tmp_path / "theirs", {k: v.bfloat16() for k, v in golden_tensors().items()})
    convert_checkpoint(source, tmp_path / "ours", dtype=dtype)
    wanted = torch.float16 if dtype is torch.float16 else torch.bfloat16
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in ours.values()} == {wanted}
    assert_equal(ours, {name: tensor.bfloat16().to(wanted) for name, tensor in expected.items()})
    assert D2VLMForConditionalGeneration.from_pretrained(tmp_path / "ours").dtype == wanted


def test_a_repository_of_the_hub(hub_here, tmp_path, expected):
    """Safetensors are preferred: the pickled copy of the weights is not downloaded."""
    source = tmp_path / "theirs"
    write_original(source, golden_tensors())
    torch.save(golden_tensors(), source / "pytorch_model.bin")
    api = HfApi()
    api.create_repo("org/whole")
    api.upload_folder(repo_id="org/whole", folder_path=source)
    report = convert_checkpoint("org/whole", tmp_path / "ours")
    assert report.source == "org/whole"
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), expected)
    assert not (fetch("org/whole") / "pytorch_model.bin").exists()

    (source / "model.safetensors").unlink()
    api.create_repo("org/pickled")
    api.upload_folder(repo_id="org/pickled", folder_path=source)
    convert_checkpoint("org/pickled", tmp_path / "again")
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), expected)
    with pytest.raises(ValueError, match="org/absent is no folder here, and no repository that can be had"):
        convert_checkpoint("org/absent", tmp_path / "nothing")


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def lora_config(base: Path | str, **changes) -> dict:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8, "bias": "none"}
    return {**config, "target_modules": ["qkv_proj", "o_proj"], **changes}


def lora_factors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Factors for the attention of every layer, under the names that peft stores."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(8):
        for module, rows in (("qkv_proj", 192), ("o_proj", 64)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            factors[f"{name}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
            factors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    return factors


def merged_by_hand(tensors: dict, factors: dict, scale: float) -> dict[str, torch.Tensor]:
    tensors = dict(tensors)
    for name in [name for name in factors if name.endswith("lora_A.weight")]:
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        tensors[weight] = tensors[weight] + scale * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    return tensors


def convert_to_tensors(source: Path, destination: Path, **options) -> dict[str, torch.Tensor]:
    convert_checkpoint(source, destination, **options)
    return load_file(destination / "model.safetensors")


def assert_close(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_adapter_and_what_was_trained_in_full_beside_it(tmp_path, suffix):
    """The authors' `pytorch_model.safetensors` and LLaVA's `non_lora_trainables.bin`."""
    base = write_original(tmp_path / "base", golden_tensors())
    factors = lora_factors()
    trained = {
        "base_model.model.lm_head.weight": torch.ones(120, 64),
        "base_model.model.evi_head.1.weight": torch.full((32, 64), 2.0),
        "base_model.model.model.layers.3.self_attn.qkv_proj.base_layer.weight": torch.full((192, 64), 3.0),
    }
    source = config_only(tmp_path / "theirs", {**golden_config(), "model_name_or_path": str(base)})
    (source / "adapter_config.json").write_text(json.dumps(lora_config("elsewhere")))
    if suffix == ".bin":
        torch.save(factors, source / "adapter_model.bin")
        torch.save(trained, source / "non_lora_trainables.bin")
    else:
        save_file(factors, source / "adapter_model.safetensors")
        save_file(trained, source / "pytorch_model.safetensors")
    report = convert_checkpoint(source, tmp_path / "ours")
    tensors = golden_tensors() | {plain_name(name): tensor for name, tensor in trained.items()}
    by_hand = write_original(tmp_path / "merged", merged_by_hand(tensors, factors, scale=2.0))
    assert_close(load_file(tmp_path / "ours" / "model.safetensors"), convert_to_tensors(by_hand, tmp_path / "wanted"))
    qkv = "model.language_model.layers.0.self_attn.qkv_proj.weight"
    assert [name.rsplit(".", 2)[1] for name in report.merged[qkv]] == ["qkv_proj", "lora_A", "lora_B"]
    assert report.left_out["lm_head.weight (base model)"] == "the adapter's folder has a newer one"


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_is_merged_as_peft_merges_it(tmp_path, rslora):
    """An adapter that peft wrote, on the Llama text model of a checkpoint."""
    peft = pytest.importorskip("peft")
    base, text = family_checkpoint(tmp_path / "base", "llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["q_proj", "o_proj", "down_proj"])
    adapted = peft.get_peft_model(text, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "theirs")
    ours = convert_to_tensors(tmp_path / "theirs", tmp_path / "ours", base_model=base)
    tensors = load_file(base / "model.safetensors")
    merged = adapted.merge_and_unload().state_dict()
    config = json.loads((base / "config.json").read_text())
    whole = write_original(tmp_path / "merged", tensors | {name: merged[name] for name in merged}, config)
    assert_close(ours, convert_to_tensors(whole, tmp_path / "wanted"))


def test_an_adapter_of_etchat(tmp_path):
    """Its vocabulary had grown by a token: the base has one row less than the parts that were trained in full."""
    tensors, config = etchat_parts(stage=3)
    small = {k: v[:119] if k in ("model.embed_tokens.weight", "lm_head.weight") else v for k, v in tensors.items()}
    base_tensors = {k: v for k, v in small.items() if not k.startswith(("vid_head.", "frm_head."))}
    base = write_original(tmp_path / "base", base_tensors, {**config, "vocab_size": 119, "use_matching": False})
    trained = {k: v for k, v in tensors.items() if k.startswith(("vid_head.", "frm_head.", "lm_head.", "model.embed"))}
    source = config_only(tmp_path / "theirs", config)
    factors = lora_factors()
    (source / "adapter_config.json").write_text(json.dumps(lora_config(base)))
    save_file(factors, source / "adapter_model.safetensors")
    save_file({f"base_model.model.{k}": v for k, v in trained.items()}, source / "pytorch_model.safetensors")
    report = convert_checkpoint(source, tmp_path / "ours")
    assert report.family == "etchat"
    assert sum("<vid>" in reason for reason in report.left_out.values()) == 6
    by_hand = write_original(tmp_path / "merged", merged_by_hand(tensors, factors, scale=2.0), config)
    assert_close(load_file(tmp_path / "ours" / "model.safetensors"), convert_to_tensors(by_hand, tmp_path / "wanted"))


def test_parts_that_were_trained_without_a_lora(tmp_path, expected):
    tensors = golden_tensors()
    heads = {name: tensors.pop(name) for name in list(tensors) if name.startswith("evi_head.")}
    base = write_original(tmp_path / "base", tensors)
    source = config_only(tmp_path / "theirs")
    save_file(heads, source / "pytorch_model.safetensors")
    assert_equal(convert_to_tensors(source, tmp_path / "ours", base_model=base), expected)


def test_names_that_peft_puts_around_a_tensor():
    inner = "base_model.model.model.layers.0.self_attn.qkv_proj.base_layer.weight"
    assert plain_name(inner) == "model.layers.0.self_attn.qkv_proj.weight"
    assert plain_name("base_model.model.lm_head.modules_to_save.default.weight") == "lm_head.weight"
    assert plain_name("lm_head.weight") == "lm_head.weight"


def adapter(folder: Path, factors: dict, config: dict | None) -> Path:
    config_only(folder)
    save_file(factors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"rank_pattern": {"o_proj": 8}}, {"peft_type": "IA3"}, {"fan_in_fan_out": True}]
)
def test_other_adapters_than_plain_lora_are_refused(tmp_path, changes):
    source = adapter(tmp_path / "theirs", lora_factors(), lora_config(CHECKPOINT, **changes))
    with pytest.raises(ValueError, match=r"adapter_config.json has .* only plain LoRA can be merged here"):
        convert_checkpoint(source, tmp_path / "ours")


def test_an_adapter_for_other_layers_is_refused(tmp_path):
    factors = lora_factors() | {"base_model.model.model.layers.0.mlp.lora_embedding_A": torch.zeros(1)}
    source = adapter(tmp_path / "one", factors, lora_config(CHECKPOINT))
    with pytest.raises(ValueError, match="only pairs lora_A, lora_B of linear layers can be merged here"):
        convert_checkpoint(source, tmp_path / "ours")
    factors = lora_factors() | {"base_model.model.model.layers.9.self_attn.o_proj.lora_A.weight": torch.zeros(4, 64)}
    source = adapter(tmp_path / "two", factors, lora_config(CHECKPOINT))
    message = (
        r"the adapter changes 1 weights that the base model does not have .*o_proj.weight: it belongs to another base"
    )
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "ours")


def test_an_adapter_without_its_base_is_refused(tmp_path):
    source = adapter(tmp_path / "one", lora_factors(), lora_config("work_dirs/stage-2"))
    message = (
        "was trained from 'work_dirs/stage-2', which is no folder here: its adapter cannot be merged without the base"
    )
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "ours")
    source = adapter(tmp_path / "two", lora_factors(), None)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors without adapter_config.json: it is no checkpoint"):
        convert_checkpoint(source, tmp_path / "ours", base_model=CHECKPOINT)


# ---- incomplete and damaged -----------------------------------------------------------------------------------------


def refused(source: Path, tmp_path: Path, message: str):
    """The conversion raises and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        convert_checkpoint(source, tmp_path / "ours")
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


def test_missing_and_misshaped_tensors_are_listed(tmp_path):
    tensors = golden_tensors()
    del tensors["model.layers.5.mlp.down_proj.weight"]
    del tensors["model.vision_tower.vision_tower.blocks.1.attn.q_bias"]
    tensors["evi_head.1.weight"] = torch.zeros(33, 64)
    tensors["lm_head.weight"] = torch.zeros(121, 64)
    tensors["model.layers.8.mlp.down_proj.weight"] = torch.zeros(1)
    tensors["stray"] = torch.zeros(1)
    message = refused(
        write_original(tmp_path / "theirs", tensors), tmp_path, "does not hold the model that its config.json"
    )
    assert "2 tensors are missing" in message
    assert "model.language_model.layers.5.mlp.down_proj.weight" in message
    assert "model.vision_tower.vision_tower.blocks.1.attn.q_bias" in message
    assert "evi_head.1.weight: (33, 64), where config.json says (32, 64)" in message
    assert "lm_head.weight: (121, 64), where config.json says (120, 64)" in message
    assert "model.layers.8.mlp.down_proj.weight: config.json describes a model without such a part" in message
    assert "1 are known to no rule: stray" in message


def test_a_long_list_is_cut(tmp_path):
    tensors = {name: tensor for name, tensor in golden_tensors().items() if not name.startswith("model.layers.")}
    message = refused(write_original(tmp_path / "theirs", tensors), tmp_path, "48 tensors are missing")
    assert "and 18 more" in message


def test_evidence_heads_that_a_config_promises_must_be_there(tmp_path):
    tensors = {name: tensor for name, tensor in golden_tensors().items() if not name.startswith("evi_head.")}
    refused(write_original(tmp_path / "theirs", tensors), tmp_path, r"6 tensors are missing: evidence_head.0.weight")


def test_a_missing_shard(tmp_path):
    source = config_only(tmp_path / "theirs")
    write_shards(source, "model", ".safetensors", save_file)
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, tmp_path, "model-00002-of-00003.safetensors, not found beside it: the checkpoint is incomplete")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file(tmp_path, name):
    source = config_only(tmp_path / "theirs")
    if name.endswith(".bin"):
        torch.save(golden_tensors(), source / name)
    else:
        save_file(golden_tensors(), source / name)
    os.truncate(source / name, 100_000)
    refused(source, tmp_path, "cannot be read as weights .* it is damaged, or holds more than tensors")


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path, legacy):
    source, witness = config_only(tmp_path / "theirs"), tmp_path / "witness"
    if legacy:
        (source / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(witness)}))
    else:
        torch.save({"a": Payload(witness)}, source / "pytorch_model.bin")
    refused(source, tmp_path, "cannot be read as weights")
    assert not witness.exists()


def test_a_training_state_is_no_checkpoint(tmp_path):
    source = config_only(tmp_path / "theirs")
    torch.save({"step": 3, "model": golden_tensors()}, source / "pytorch_model.bin")
    refused(source, tmp_path, "does not hold tensors by name: weights are expected, not a training state")


def test_folders_without_a_checkpoint(tmp_path):
    empty = tmp_path / "theirs"
    empty.mkdir()
    refused(
        empty, tmp_path, r"holds none of model.safetensors.index.json, .* it is no checkpoint that can be converted"
    )
    save_file(golden_tensors(), empty / "model.safetensors")
    refused(empty, tmp_path, r"holds no config.json: it is no checkpoint that can be converted")
    refused(tmp_path / "nowhere", tmp_path, "is no folder here, and no repository that can be had from the Hub")


# ---- where it is written --------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds files, so nothing was written"):
        convert_checkpoint(CHECKPOINT, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["notes.txt"]


def test_overwriting_replaces_the_model_and_nothing_else(tmp_path, expected, monkeypatch):
    """Old shards go, or the stale index would be loaded; other files stay."""
    with monkeypatch.context() as patch:
        patch.setattr(convert, "SHARD_BYTES", 2_000_000)
        convert_checkpoint(CHECKPOINT, tmp_path / "ours")
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    convert_checkpoint(CHECKPOINT, tmp_path / "ours", overwrite=True)
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert [name for name in names if not name.endswith("_d2vlm.py")] == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt", "qformer_tokenizer",
    ]  # fmt: skip
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), expected)


def test_a_destination_must_be_a_folder_of_its_own(tmp_path):
    source = write_original(tmp_path / "theirs", golden_tensors())
    (tmp_path / "file").write_text("")
    for destination in (source, tmp_path / "file"):
        with pytest.raises(ValueError, match="is the source or no folder: the converted model needs one of its own"):
            convert_checkpoint(source, destination, overwrite=True)


def test_an_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match=r"dtype='int8' is none that weights are kept in here. Pass one of float32"):
        convert_checkpoint(CHECKPOINT, tmp_path / "ours", dtype="int8")


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(CHECKPOINT, tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []
