# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Headline figures, card entries, paired comparison through the command line, and the pictures of an evaluation."""

import json

import numpy as np
import pytest
from huggingface_hub.repocard_data import model_index_to_eval_results

from d2vlm_hf.cli import main as command_line
from d2vlm_hf.data.schema import make_row
from d2vlm_hf.evaluation.plots import choose_examples, draw_figures, draw_headlines, draw_histogram, draw_recall
from d2vlm_hf.evaluation.report import card_metadata, card_results, compare, headlines, parts_of
from d2vlm_hf.evaluation.run import evaluate
from d2vlm_hf.hub.card_data import ModelCardInfo
from d2vlm_hf.hub.cards import render_model_card


def found(*spans, answer="", score=0.9) -> dict:
    return {"answer": answer, "evidence": [{"start": s, "end": e, "score": score} for s, e in spans], "references": []}


def moments(count: int, task: str = "tvg", **columns) -> list[dict]:
    """Rows that ask for one span each, two rows to a video."""
    spans = [[2.0 + n % 3, 6.0 + n % 3] for n in range(count)]
    return [
        make_row(id=f"{task}-{n}", video=f"v{n // 2}.mp4", duration=12.0, task=task, spans=[span],
                 question=f"When does it happen for the {n}th time?", **{"source": "shapes/easy", **columns})
        for n, span in enumerate(spans)
    ]  # fmt: skip


def shifted(rows, by: float) -> list[dict]:
    return [found((row["spans"][0][0] + by, row["spans"][0][1] + by)) for row in rows]


def settings(**more) -> dict:
    known = {"benchmark": "shapes", "protocol": "clean", "prompt": "default", "model": "tiny", "fps": 2.0}
    known |= {"max_new_tokens": 64, "generate_kwargs": {}, "dataset": "org/shapes", "dataset_split": "test"}
    return known | more


@pytest.fixture(scope="module")
def results() -> dict:
    rows = moments(12)
    model = [found((2.0, 6.0)) for _ in rows]
    return {
        "settings": settings(),
        "model": evaluate("shapes", rows, model),
        "black": evaluate("shapes", rows, shifted(rows, 20.0)),
    }


def test_headlines_of_the_shapes_benchmark(results):
    figures = headlines(results["model"])
    assert [figure[:2] for figure in figures] == [("tvg", "R1"), ("all", "mean")]
    value = results["model"]["metrics"]["tasks"]["tvg"]["R1"]
    assert figures[0][2:] == pytest.approx([100 * value[key] for key in ("value", "low", "high")])


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        ("charades_sta", ["R1@0.3", "R1@0.5", "R1@0.7", "mIoU"]),
        ("tacos", ["R1@0.1", "R1@0.3", "R1@0.5", "R1@0.7", "mIoU"]),
        ("qvhighlights", ["MR-full-mAP", "MR-full-R1@0.5", "MR-full-R1@0.7"]),
        ("etbench", ["F1", "score"]),
    ],
)
def test_headlines_are_in_percent_with_the_interval_of_the_same_figure(benchmark, expected):
    rows = moments(8)
    result = evaluate(benchmark, rows, shifted(rows, 1.0))  # IoU 3 / 5
    figures = {figure.metric: figure for figure in headlines(result)}
    assert set(expected) <= set(figures)
    for name in expected:
        assert figures[name].low is not None, name
        assert figures[name].low - 0.01 <= figures[name].value <= figures[name].high + 0.01
    single = figures.get("mIoU") or figures.get("MR-full-R1@0.5") or figures["F1"]
    assert single.value == pytest.approx({"mIoU": 60.0, "MR-full-R1@0.5": 100.0, "F1": 75.0}[single.metric])


def test_headlines_under_a_published_protocol_have_values_alone():
    rows = moments(4)
    texts = [f"{s:.1f} - {e:.1f} </evi> It happens at {s:.1f} - {e:.1f}." for s, e in (row["spans"][0] for row in rows)]
    for benchmark in ("charades_sta", "etbench"):
        figures = headlines(evaluate(benchmark, rows, texts, "d2vlm"))
        assert {(figure.low, figure.high) for figure in figures} == {(None, None)}
        assert max(figure.value for figure in figures) == pytest.approx(100.0)


def test_headlines_of_captions_and_of_choices():
    dense = moments(2, "dvc", captions=["a man runs"], source="youcook2")
    figures = headlines(evaluate("youcook2", dense, [found(row["spans"][0]) for row in dense], captions=False))
    assert [figure[:3] for figure in figures] == [("dvc", "F1", pytest.approx(100.0))]
    choice = [make_row(id=str(n), video="v.mp4", duration=9.0, task="rvq", source=f"mvbench/{n}", question="Which?",
                       options=["a cat", "a dog"], correct_option=n) for n in range(2)]  # fmt: skip
    figures = headlines(evaluate("mvbench", choice, [found(answer="(A) a cat")] * 2))
    assert [figure[:3] for figure in figures] == [("Multiple choice", "Acc", 50.0), ("Multiple choice", "mean", 50.0)]


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_an_evaluation_fills_a_model_card(results):
    entries = card_results(results)
    first = entries[0]
    assert (first.task, first.metric, first.dataset, first.split) == (
        "Temporal video grounding",
        "mIoU",
        "org/shapes",
        "test",
    )
    assert (first.blind, first.settings, first.protocol) == ({"black frames": 0.0}, "greedy, 2 fps", "clean")
    name, read = model_index_to_eval_results(card_metadata(results)["model-index"])
    assert (name, read[0].metric_value) == ("tiny", pytest.approx(first.value, abs=1e-6))
    assert read[0].metric_args == {"protocol": "clean"}
    card = render_model_card(ModelCardInfo("org/tiny", "apache-2.0", results=entries))
    assert card.data.eval_results[0].metric_name == "mIoU (Temporal video grounding)"
    assert f"**{first.value:.1f}**" in card.text


def test_a_published_benchmark_fills_a_model_card():
    rows = moments(8)
    result = evaluate("charades_sta", rows, shifted(rows, 1.0))
    charades = settings(benchmark="charades_sta", dataset="charades_sta_test.txt", dataset_split=None)
    entries = card_results({"settings": charades, "model": result, "swapped": result})
    assert [entry.metric for entry in entries] == ["R1@0.3", "R1@0.5", "R1@0.7", "mIoU"]
    assert entries[3].value == pytest.approx(60.0)
    assert entries[3].interval == pytest.approx((60.0, 60.0))
    assert entries[3].blind == {"videos swapped": pytest.approx(60.0)}
    assert (entries[3].dataset, entries[3].task) == ("Charades-STA", "Temporal video grounding")


def test_a_card_names_what_was_evaluated_on(results):
    made = {**results, "settings": settings(shapes={"difficulty": "hard", "split": "test"}, dataset=None)}
    assert (card_results(made)[0].dataset, card_results(made)[0].split) == ("Shapes (hard)", "test")
    theirs = {"benchmark": "shapes", "protocol": "clean", "predictions": ["theirs.jsonl"], "dataset": "rows.jsonl"}
    assert card_results({**results, "settings": theirs})[0].settings is None
    assert card_metadata({**results, "settings": theirs})["model-index"][0]["name"] == "theirs"


# ---- comparison ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path) -> list[str]:
    """Results of two systems: the second is better at every second row of one task, and as good at the other."""
    files = []
    for name, better in (("sft", 0.0), ("fpo", 0.25)):
        rows = [
            {
                "id": str(i),
                "task": "tvg",
                "video": f"v{i}",
                "score": 0.5 + better * (i % 2),
                "IoU": 0.5,
                "failed": False,
            }
            for i in range(40)
        ] + [{"id": f"c{i}", "task": "rar", "video": f"v{i}", "score": 1.0} for i in range(10)]
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"model": {"benchmark": "shapes", "protocol": "clean", "rows": rows}}))
        files.append(str(file))
    return files


def test_two_systems_are_compared_on_the_command_line(compared, capsys):
    assert command_line(["evaluate", "--compare", *compared]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"first: {compared[0]}", f"second: {compared[1]}", ""]
    assert lines[3].startswith(
        "| task | figure | rows | first | second | difference | 95 % | p | wins | losses | ties |"
    )
    cells = {tuple(line.strip("| ").split(" | ")[:2]): line.strip("| ").split(" | ")[2:] for line in lines[5:]}
    assert list(cells) == [("mean of tasks", "score"), ("rar", "score"), ("tvg", "score"), ("tvg", "IoU")]
    assert cells["tvg", "score"][:4] == ["40", "0.500", "0.625", "+0.125"]
    assert cells["tvg", "score"][-3:] == ["20", "0", "20"]
    low, high = map(float, cells["tvg", "score"][4].strip("[]").split(", "))
    assert 0.05 < low < 0.125 < high < 0.2
    assert cells["mean of tasks", "score"][:4] == ["50", "0.750", "0.812", "+0.062"]
    assert (cells["rar", "score"][3:5], cells["rar", "score"][5]) == (["+0.000", "[+0.000, +0.000]"], "1.000")


def test_what_cannot_be_compared(tmp_path, compared, capsys):
    def saved(name: str, content) -> str:
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    row = {"id": "x", "task": "tvg", "score": 1.0}
    others = saved("c.json", {"model": {"benchmark": "shapes", "protocol": "clean", "rows": [row]}})
    with pytest.raises(ValueError, match="share 0 of 50 and 1 scored rows"):
        compare(compared[0], others)
    protocol = saved("p.json", {"model": {"benchmark": "shapes", "protocol": "d2vlm", "rows": [row]}})
    with pytest.raises(ValueError, match="figures compare under one only"):
        compare(compared[0], protocol)
    assert command_line(["evaluate", "--compare", compared[0], saved("no.json", [1])]) == 2
    assert "holds no results of an evaluation" in capsys.readouterr().err
    assert command_line(["evaluate", "--compare", compared[0], str(tmp_path / "gone.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_drawn_and_the_same_for_the_same_results(tmp_path, results):
    rows = moments(12)
    predictions = {row["id"]: found((2.0, 6.0), answer="There.") for row in rows}
    figures = {name: headlines(part) for name, part in parts_of(results).items()}
    drawn = [draw_figures(tmp_path / n, parts_of(results), figures, rows, predictions, examples=2) for n in "ab"]
    names = [path.name for path in drawn[0]]
    assert names == ["headlines.png", "recall.png", "iou.png", "best-1.png", "best-2.png", "worst-1.png", "worst-2.png"]
    for one, other in zip(*drawn, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
        assert one.read_bytes().startswith(b"\x89PNG")


def test_what_has_no_numbers_is_not_drawn(tmp_path):
    """Choices have no spans; several tasks with spans share a picture; texts have no timeline."""
    choice = [make_row(id="0", video="v.mp4", duration=9.0, task="rar", source="shapes/easy", question="Which?",
                       options=["a", "b"], correct_option=0)]  # fmt: skip
    parts = {"model": evaluate("shapes", choice, [found(answer="(A) a")])}
    paths = draw_figures(tmp_path, parts, {"model": headlines(parts["model"])}, choice, {"0": found()})
    assert [path.name for path in paths] == ["headlines.png"]
    assert not draw_headlines({}, tmp_path / "none.png")

    rows = [*moments(2), *moments(2, "epm")]
    result = evaluate("etbench", rows, shifted(rows, 1.0))
    assert draw_recall({"model": result}, tmp_path / "tasks.png")
    assert draw_histogram({"model": result}, tmp_path / "spread.png")
    texts = {row["id"]: "1 - 2 </evi> 1 - 2" for row in rows}
    paths = draw_figures(tmp_path, {"model": result}, {"model": headlines(result)}, rows, texts)
    assert [path.name for path in paths] == ["headlines.png", "recall.png", "iou.png"]


def test_examples_differ_in_task_and_video():
    rows = [*moments(4), *moments(4, "tal")]
    results = [{"task": row["task"], "video": row["video"], "score": score}
               for row, score in zip(rows, np.linspace(1, 0, 8), strict=True)]  # fmt: skip
    assert choose_examples(results, rows, 3, best=True) == [0, 6, 1]  # the first tal of another video
    assert choose_examples(results, rows, 3, best=False) == [7, 1, 6]
    assert choose_examples(results, rows, 2, best=False, taken=[7]) == [6, 1]
    assert choose_examples(results, [{**row, "spans": []} for row in rows], 3, best=True) == []
