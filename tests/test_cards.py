# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Cards tell what is known and nothing else; their code runs; records of runs name no machine."""

import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_server import LocalHub, run_script
from huggingface_hub import DatasetCard, EvalResultEntry, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st

from d2vlm_hf.data import schema
from d2vlm_hf.hub import records
from d2vlm_hf.hub.card_data import COLUMNS, PREFERENCE_COLUMNS, show_spans, slug
from d2vlm_hf.hub.cards import (
    PUBLISHED_FIGURES,
    ConvertedCardInfo,
    CurveLog,
    DatasetCardInfo,
    ModelCardInfo,
    Result,
    RunRecord,
    collect_run_record,
    plot_curves,
    render_converted_card,
    render_dataset_card,
    render_model_card,
    write_eval_results,
)
from d2vlm_hf.hub.records import describe_command, describe_device, describe_seconds, hash_config, strip_paths


SFT = RunRecord(
    stage="SFT",
    command="python recipes/sft.py --config recipes/shapes/sft.yaml",
    git_commit="0123abc",
    config_hash="89abcdef01234567",
    dataset_fingerprint="f00d",
    seed=3,
    device="CPU (x86_64, 2 cores)",
    wall_time_s=4210.0,
    effective_batch=8,
    versions={"Python": "3.11.7", "torch": "2.13.0"},
)
FPO = RunRecord(stage="FPO", seed=4, reference_free=True)
RESULTS = [
    Result(
        task="Temporal grounding",
        metric="mIoU",
        value=71.2345678,
        dataset="org/shapes",
        dataset_name="Shapes | test set",
        split="test",
        interval=(69.11, 73.0),
        blind={"videos swapped": 12.3, "black frames": 10.0},
        protocol="clean",
        settings="greedy, 2 fps",
    ),
    Result("Dense captioning", "F1", 41.0, "org/shapes", dataset_name="Shapes | test set", split="test"),
    Result("Temporal grounding", "R1@0.5", 0.5, "a local benchmark", digits=3, blind={"black frames": 0.1}),
]
FULL = ModelCardInfo(
    repo_id="org/d2vlm-shapes",
    license="apache-2.0",
    base_model="org/base",
    datasets=["org/shapes"],
    language=["en"],
    tags=["synthetic"],
    facts={"Parameters": "6.4 M"},
    example_video="example.mp4",
    example_question='When does the "red" circle appear?',
    example_output={"answer": "At 1.0 s.", "evidence": [{"start": 1.0, "end": 2.0, "score": 0.9}]},
    results=RESULTS,
    results_note="Mean of three seeds.",
    runs=[SFT, FPO],
    loss_picture="loss.png",
    timeline_picture="timeline.png",
    intended_use=["Trying the package."],
    limits=["Knows coloured shapes only."],
    data="Rendered from seeds.",
)
MINIMAL_CARD = """---
library_name: transformers
license: mit
pipeline_tag: video-text-to-text
tags:
- temporal-grounding
- video-grounding
- d2vlm
---

# tiny

A video-language model that answers a question about a video and shows the moments that support its answer, \
in seconds. It is an independent implementation of D2VLM ([paper](https://arxiv.org/abs/2512.24097)), made with the \
package `d2vlm_hf` and not by the paper's authors.

## Quick start

```python
from transformers import pipeline

grounder = pipeline("video-grounding", model="org/tiny", trust_remote_code=True)
video = "video.mp4"
result = grounder(video, question="When does the man open the door?")
print(result["answer"])
for moment in result["evidence"]:
    print(f"{moment['start']:.1f} s to {moment['end']:.1f} s, score {moment['score']:.2f}")
```

`evidence` lists the moments that support the answer, `references` the moments that the answer names, both in \
seconds. After `import d2vlm_hf` the same works without `trust_remote_code`.

## Limits

- A moment begins and ends at a frame that was looked at, so it is no finer than the sampling of the video.
- A score is the mean of frame scores between 0 and 1; it ranks moments and is no calibrated probability.
- Answers and moments can be wrong; look at the video before anything depends on them.

## Licence

The weights are under mit. The code files beside them come from `d2vlm_hf` and are under apache-2.0.

## Citation

The method is that of the paper:

```bibtex
@inproceedings{zeng2025factorized,
  title     = {Factorized Learning for Temporally Grounded Video-Language Models},
  author    = {Zeng, Wenzheng and Gao, Difei and Shou, Mike Zheng and Ng, Hwee Tou},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025},
  note      = {arXiv:2512.24097}
}
```
"""


def metadata(card: object) -> dict:
    return yaml.safe_load(str(card).split("---\n")[1])


def python_blocks(card: object) -> list[str]:
    return re.findall(r"```python\n(.*?)```", str(card), flags=re.DOTALL)


def sections(card: object) -> list[str]:
    return re.findall(r"^## (.*)$", str(card), flags=re.MULTILINE)


# -- model cards ------------------------------------------------------------------------------------------------------


def test_a_card_of_nothing_but_a_name_and_a_licence() -> None:
    assert str(render_model_card(ModelCardInfo("org/tiny", "mit"))) == MINIMAL_CARD


def test_metadata_of_a_full_card() -> None:
    card = render_model_card(FULL)
    data = metadata(card)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "video-text-to-text")
    assert data["tags"] == ["temporal-grounding", "video-grounding", "d2vlm", "sft", "fpo", "synthetic"]
    assert (data["base_model"], data["datasets"], data["license"]) == (["org/base"], ["org/shapes"], "apache-2.0")
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "d2vlm-shapes"
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("miou", "mIoU (Temporal grounding)", 71.234568),
        ("f1", "F1 (Dense captioning)", 41.0),
        ("r1_0_5", "R1@0.5 (Temporal grounding)", 0.5),
    ]
    assert (results[0].dataset_type, results[0].dataset_split, results[0].metric_args) == (
        "org/shapes",
        "test",
        {"protocol": "clean"},
    )
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_body_of_a_full_card() -> None:
    text = str(render_model_card(FULL))
    assert sections(text) == [
        "Quick start",
        "Results",
        "Training",
        "Intended use",
        "Limits",
        "Data",
        "Licence",
        "Citation",
    ]
    for line in (
        "| Data | Task | Metric | Value | 95 % interval | blind: videos swapped | blind: black frames | Protocol |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
        "| Shapes \\| test set (test) | Temporal grounding | mIoU | **71.2** | 69.1 to 73.0 | 12.3 | 10.0 | "
        "clean; greedy, 2 fps |",
        "| Shapes \\| test set (test) | Dense captioning | F1 | **41.0** |  |  |  |  |",
        "| a local benchmark | Temporal grounding | R1@0.5 | **0.500** |  |  | 0.100 |  |",
        "Mean of three seeds.",
        "python recipes/sft.py --config recipes/shapes/sft.yaml",
        "| Commit | `0123abc` |",
        "| Configuration (SHA-256) | `89abcdef01234567` |",
        "| Data fingerprint | `f00d` |",
        "| Seed | 3 |",
        "| Device | CPU (x86_64, 2 cores) |",
        "| Wall time | 1 h 10 min |",
        "| Effective batch | 8 |",
        "| Versions | Python 3.11.7, torch 2.13.0 |",
        "| Parameters | 6.4 M |",
        "![Loss curves](loss.png)",
        "![Frames, frame scores and the moments that were found](timeline.png)",
        "- Trying the package.",
        "- Knows coloured shapes only.",
        "Rendered from seeds.",
    ):
        assert line in text.splitlines(), line
    assert "Blind controls answer without seeing the right video: videos swapped, black frames." in text
    assert not re.search(r"\n{3}|[Mm]ore [Ii]nformation|None|nan", text)
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1]) == FULL.example_output
    # every table has as many cells in each row as in its header
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize(
    ("field", "value", "gone"),
    [
        ("results", (), "## Results"),
        ("runs", (), "python recipes/sft.py"),
        ("loss_picture", None, "![Loss curves]"),
        ("timeline_picture", None, "timeline.png"),
        ("intended_use", (), "## Intended use"),
        ("data", None, "Rendered from seeds"),
        ("datasets", (), "Data sets:"),
        ("facts", {}, "Parameters"),
        ("example_output", None, "```json"),
        ("example_video", None, "hf_hub_download"),
        ("base_model", None, "base_model"),
        ("results_note", None, "three seeds"),
        ("language", (), "language:"),
    ],
)
def test_what_is_not_known_is_left_out(field: str, value: object, gone: str) -> None:
    assert gone in str(render_model_card(FULL))
    text = str(render_model_card(replace(FULL, **{field: value})))
    assert gone not in text
    assert not re.search(r"\n{3}|[Mm]ore [Ii]nformation|None", text)


def test_no_training_and_no_data_section_without_facts() -> None:
    bare = replace(FULL, runs=(), loss_picture=None, data=None, datasets=())
    assert not {"Training", "Data"} & set(sections(render_model_card(bare)))
    assert "model-index" not in metadata(render_model_card(replace(FULL, results=())))
    only_stage = render_model_card(replace(bare, runs=[RunRecord("SFT")]))
    assert "| SFT |" not in str(only_stage)


def test_fpo_cards_say_loudly_whether_there_was_a_reference() -> None:
    free = str(render_model_card(FULL))
    assert "> [!IMPORTANT]\n> **FPO without a reference model (`reference_free=True`).**" in free
    held = str(render_model_card(replace(FULL, runs=[SFT, replace(FPO, reference_free=False)])))
    assert "> **FPO against a reference model (`reference_free=False`).**" in held
    assert "IMPORTANT" not in str(render_model_card(replace(FULL, runs=[SFT])))
    assert free.index("IMPORTANT") < free.index("## Quick start")


def test_folders_of_this_machine_are_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "sft").mkdir(parents=True)
    local = replace(FULL, base_model=[str(tmp_path), "out/sft"], datasets=["./data", "org/shapes"])
    data = metadata(render_model_card(local))
    assert "base_model" not in data
    assert data["datasets"] == ["org/shapes"]
    assert str(tmp_path) not in str(render_model_card(local))


@settings(deadline=None, max_examples=25)
@given(st.text(min_size=1, max_size=30).filter(lambda text: not set(text) & {"\x00", "\r"} and text.isprintable()))
def test_quick_start_compiles_whatever_the_question(question: str) -> None:
    (block,) = python_blocks(render_model_card(replace(FULL, example_question=question)))
    code = compile(block, "card", "exec")
    assert question in code.co_consts or question == "video-grounding"


def test_quick_start_of_a_model_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The block is run against stand-ins of the two functions that it calls."""
    calls = []

    def pipeline(task: str, **options: object):
        calls.append((task, options))
        return lambda video, question: calls.append((video, question)) or FULL.example_output

    def download(repo_id: str, name: str) -> str:
        return f"cache/{repo_id}/{name}"

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(pipeline=pipeline))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    (block,) = python_blocks(render_model_card(FULL))
    exec(compile(block, "card", "exec"), {})
    assert calls == [
        ("video-grounding", {"model": "org/d2vlm-shapes", "trust_remote_code": True}),
        ("cache/org/d2vlm-shapes/example.mp4", 'When does the "red" circle appear?'),
    ]
    assert capsys.readouterr().out == "At 1.0 s.\n1.0 s to 2.0 s, score 0.90\n"


def test_converted_card_claims_nothing() -> None:
    info = ConvertedCardInfo(
        repo_id="org/d2vlm-phi3",
        source="the authors' D2VLM-3.8B",
        source_url="https://example.org/weights",
        source_revision="abc",
        base_model="org/phi",
        run=RunRecord("conversion", command="d2vlm convert weights d2vlm-phi3", git_commit="fff"),
    )
    card = render_converted_card(info)
    data, text = metadata(card), str(card)
    assert (data["license"], data["base_model"]) == ("other", ["org/phi"])
    assert "model-index" not in data
    assert card.data.eval_results is None
    assert "## Figures as reported by the authors, not measured with this package" in text
    assert "Conversion checked on tensor names and tiny models only." in text
    assert "not by the paper's authors" in text
    for row in PUBLISHED_FIGURES:
        assert "| {} | {} | {} |".format(*row) in text
    assert " ".join(value for _, _, value in PUBLISHED_FIGURES) == "42.3 37.5 21.8 25.3 18.1 50.3 26.0 26.4 10.6 3.2"
    assert "| Source | https://example.org/weights |" in text
    assert "d2vlm convert weights d2vlm-phi3" in text
    bare = render_converted_card(
        ConvertedCardInfo("org/x", "somebody", license_name="weights licence", license_link="L")
    )
    assert "Each part of the weights stays under [weights licence](L)." in str(bare)
    assert "## Conversion" not in str(bare)
    assert metadata(bare)["license_name"] == "weights licence"
    assert "stays under the licence of its origin." in text


def test_eval_result_files(tmp_path: Path) -> None:
    """One file for each data set on the Hub; huggingface_hub reads the same entries back."""
    from huggingface_hub import parse_eval_result_entries

    (path,) = write_eval_results(tmp_path, RESULTS, date="2026-11-01", source_url="https://example.org/run")
    assert path == tmp_path / ".eval_results" / "org--shapes.yaml"
    first, second = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert first == EvalResultEntry(
        dataset_id="org/shapes",
        task_id="temporal_grounding_miou",
        value=71.234568,
        date="2026-11-01",
        source_url="https://example.org/run",
        notes="protocol clean; greedy, 2 fps; 95 % interval 69.1 to 73.0",
    )
    assert (second.task_id, second.notes) == ("dense_captioning_f1", None)
    assert write_eval_results(tmp_path, RESULTS[2:]) == []


def test_small_words() -> None:
    assert [describe_seconds(s) for s in (0.04, 59.9, 60, 3599, 3600, 36_061)] == [
        "0.0 s",
        "59.9 s",
        "1 min",
        "1 h 00 min",
        "1 h 00 min",
        "10 h 01 min",
    ]
    assert (slug("R1@0.5"), slug("SODA_c "), slug("mIoU")) == ("r1_0_5", "soda_c", "miou")
    assert (show_spans([]), show_spans([(1, 2.25), [3.0, 4]])) == ("no event", "1.0 s - 2.2 s, 3.0 s - 4.0 s")


# -- data set cards ---------------------------------------------------------------------------------------------------


def preference_row(factor: str, perturbation: str, number: int = 0) -> dict:
    say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    return {
        "task": "tvg" if number % 2 else "dvc",
        "question": "When?",
        "answer": "At <evi>.",
        "spans": [[1.0, 2.0]],
        "prompt": [{"role": "user", "content": "When does it\nhappen?"}],
        "chosen": say("At <evi>."),
        "rejected": say(f"Rejected {number} ```at <evi>."),
        "chosen_spans": [[1.0, 2.0]],
        "rejected_spans": [[3.0, 4.0]],
        "factor": factor,
        "perturbation": perturbation,
        "edit": f"edit {number}",
    }


def test_preference_card_counts_and_shows_each_kind() -> None:
    kinds = [("text", "tamper"), ("grounding", "shift"), ("grounding", "drop"), ("grounding", "shift")]
    rows = [preference_row(*kind, number) for number, kind in enumerate(kinds)]
    run = RunRecord("make-preferences", command="d2vlm make-preferences --config c.yaml", seed=1)
    info = DatasetCardInfo.from_rows(
        "org/prefs", {"train": iter(rows), "test": iter(rows[:1])}, license="apache-2.0", run=run, source="Made so."
    )
    assert info.splits == {"train": 4, "test": 1}
    assert info.tasks == {"dvc": 3, "tvg": 2}
    assert info.kinds == {("grounding", "drop"): 1, ("grounding", "shift"): 2, ("text", "tamper"): 2}
    card = render_dataset_card(info)
    text = str(card)
    for line in (
        "| split | train | 4 |",
        "| task | dvc | 3 |",
        "| grounding | shift | 2 |",
        "| **grounding** | all | **3** |",
        "| **text** | all | **2** |",
        "### grounding: shift",
        "rejected  Rejected 1 at <evi>.",
        "          3.0 s - 4.0 s",
        "prompt    When does it happen?",
        "edit      edit 1",
        "d2vlm make-preferences --config c.yaml",
        "Made so.",
        "The data is under apache-2.0.",
    ):
        assert line in text.splitlines(), line
    assert "Rejected 3" not in text  # one row of each kind
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == [*COLUMNS, *PREFERENCE_COLUMNS]
    data = metadata(card)
    assert (data["task_categories"], data["size_categories"]) == (["video-text-to-text"], ["n<1K"])
    assert {"temporal-grounding", "preference"} <= set(data["tags"])
    assert not re.search(r"\n{3}|[Mm]ore [Ii]nformation|None", text)


def test_card_of_plain_rows() -> None:
    row = {"task": "rar", "question": "Which?", "answer": "A", "spans": [], "options": ["a", "b"]}
    info = DatasetCardInfo.from_rows("org/shapes", {"train": [row] * 1200}, license="other", title="Shapes")
    text = str(render_dataset_card(info))
    assert "### rar\n\n```text\nquestion  Which?\noptions   a / b\nanswer    A\nspans     no event\n```" in text
    assert metadata(text)["size_categories"] == ["1K<n<10K"]
    assert "# Shapes\n" in text
    assert "Broken factor" not in text
    assert re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE) == list(COLUMNS)
    empty = str(render_dataset_card(DatasetCardInfo("org/none", "mit")))
    assert sections(empty) == ["How to load it", "Columns", "Licence", "Citation"]


def test_metadata_that_is_there_already_is_kept() -> None:
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    card = render_dataset_card(DatasetCardInfo("org/x", "mit"), {"configs": configs, "license": "unknown"})
    assert metadata(card)["configs"] == configs
    assert metadata(card)["license"] == "mit"


@pytest.mark.parametrize(
    ("rows", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (10**9, "1B<n<10B")],
)
def test_size_categories(rows: int, category: str) -> None:
    card = render_dataset_card(DatasetCardInfo("org/x", "mit", splits={"train": rows}))
    assert metadata(card)["size_categories"] == [category]


def test_columns_are_those_of_the_schema() -> None:
    assert list(COLUMNS) == list(schema.COLUMNS)
    assert list(PREFERENCE_COLUMNS) == list(schema.PREFERENCE_COLUMNS)


def test_data_set_quick_start_runs_from_the_hub(hub: LocalHub) -> None:
    """Rows are pushed and get their card; the code of the card then runs in a process without the package."""
    push = """
from datasets import Dataset, Features, List, Value, Video
text = Value("string")
types = {"video": Video(), "task": text, "question": text, "answer": text, "spans": List(List(Value("float64")))}
video = {"bytes": b"not decoded here", "path": "a.mp4"}
row = {"video": video, "task": "tvg", "question": "When?", "answer": "At <evi>.", "spans": [[1.0, 2.0]]}
Dataset.from_list([row], features=Features(types)).push_to_hub("org/carded", split="test")
"""
    plain = ("d2vlm_hf", "torch", "torchcodec", "transformers")
    run_script(push, hub, block=plain)
    written = hub.files("org/carded", "dataset")["README.md"].decode()
    row = {"task": "tvg", "question": "When?", "answer": "At <evi>.", "spans": [[1.0, 2.0]]}
    info = DatasetCardInfo.from_rows("org/carded", {"test": [row]}, license="mit")
    card = render_dataset_card(info, DatasetCard(written).data.to_dict())
    hub.write("org/carded", {"README.md": str(card).encode()}, kind="dataset")
    assert metadata(card)["configs"][0]["config_name"] == "default"
    (block,) = python_blocks(card)
    assert 'split="test"' in block
    out = run_script(block, hub, block=plain, home=hub.home / "reader").stdout
    assert out.strip().splitlines()[-1] == "When? At <evi>. [[1.0, 2.0]]"


# -- records of runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/u/data.json", "data.json"),
        ("--data=/home/u/my files/data.json", "--data=data.json"),
        ("/project/recipes/sft.yaml", "recipes/sft.yaml"),
        ("--config=/project/recipes/sft.yaml", "--config=recipes/sft.yaml"),
        ("recipes/sft.yaml", "recipes/sft.yaml"),
        ("src:/home/u/a,/home/u/b", "src:a,b"),
        ('{"root": "/home/u/videos"}', '{"root": "videos"}'),
        ("C:\\Users\\u\\data.json", "data.json"),
        ("~/data/x.json", "x.json"),
        ("file:///home/u/clip.mp4", "clip.mp4"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("and/or 3/4", "and/or 3/4"),
        ("hf_abcdefghij", "TOKEN"),
        ("/", "/"),
        ("1e-5", "1e-5"),
    ],
)
def test_strip_paths(text: str, shown: str) -> None:
    assert strip_paths(text, "/project") == shown


@settings(deadline=None)
@given(
    st.lists(st.from_regex(r"[A-Za-z0-9_.]{1,8}", fullmatch=True), min_size=2, max_size=5),
    st.sampled_from(["{}", "--a={}", "--a {}", "x:{}", "[{}, 1]", "'{}'", "{}:{}", "a={} b={}"]),
)
def test_no_absolute_path_is_left(parts: list[str], template: str) -> None:
    path = "/" + "/".join(parts)
    assert path not in strip_paths(template.replace("{}", path))


def test_commands_show_no_tokens() -> None:
    words = ["/venv/bin/d2vlm", "push", "out", "--token", "secret", "--hub_token=secret", "--name", "two words"]
    assert describe_command(words) == "d2vlm push out --token TOKEN --hub_token=TOKEN --name 'two words'"
    assert (
        describe_command(["/project/recipes/sft.py", "--lr", "1e-5"], "/project") == "python recipes/sft.py --lr 1e-5"
    )
    assert describe_command([]) is None


def test_config_hash() -> None:
    """Equal for equal configurations in any order and place, different for any other value."""
    one = {"lr": 1e-4, "data": "/home/a/project/data", "layers": [1, 2], "nested": {"x": None, "y": True}}
    two = {"nested": {"y": True, "x": None}, "layers": (1, 2), "data": "/home/b/project/data", "lr": 1e-4}
    assert hash_config(one, "/home/a/project") == hash_config(two, "/home/b/project")
    assert len(hash_config(one)) == 16
    assert hash_config(one) != hash_config({**one, "lr": 1e-5})
    assert hash_config(one) != hash_config({**one, "nested": {"x": None, "y": 1}})


def test_run_record_of_a_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.chdir(tmp_path)
    assert collect_run_record("SFT", command=["x"]).git_commit is None
    git("init", "--quiet")
    (tmp_path / "a.txt").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "recipes" / "sft.py"), "--config", str(tmp_path / "c.yaml")])
    record = collect_run_record(
        "SFT", config={"a": 1}, seed=5, device="cpu", wall_time_s=1.0, effective_batch=4, packages=("numpy", "no-such")
    )
    assert record.git_commit == git("rev-parse", "HEAD").strip()
    assert record.command == "python recipes/sft.py --config c.yaml"
    assert (record.seed, record.wall_time_s, record.effective_batch) == (5, 1.0, 4)
    assert set(record.versions) == {"Python", "numpy"}
    assert record.config_hash == hash_config({"a": 1})
    assert str(tmp_path) not in repr(record)
    (tmp_path / "a.txt").write_text("2")
    assert collect_run_record("SFT").git_commit == record.git_commit + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert collect_run_record("SFT").git_commit is None


def test_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert re.fullmatch(r"CPU \(\S+, \d+ cores\)", describe_device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [describe_device(kind) for kind in (None, "cuda:1", "mps")] == ["4 x Some GPU", "4 x Some GPU", "mps"]


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = [CurveLog("loss", [1, 2, 3], [3.0, 2.0, 1.5]), CurveLog("empty", [], []), CurveLog("one", [2], [1.0])]
    assert plot_curves([CurveLog("empty", [], [])], tmp_path / "none.png") is None
    with pytest.raises(ValueError, match="Curve 'loss' has 2 steps and 1 values; every value belongs to one step"):
        CurveLog("loss", [1, 2], [0.5])
    pytest.importorskip("matplotlib")
    path = plot_curves(curves, tmp_path / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    drawn = plot_curves(curves, tmp_path / "loss.svg").read_text()
    assert len(re.findall(r'id="line2d_\d+"', drawn)) > 2
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    assert plot_curves(curves, tmp_path / "without.png") is None
