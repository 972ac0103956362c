# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The table, the figure and the README of a ladder, from the scores of its arms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ladder_arms import ARMS
from ladder_scores import FIGURES

from d2vlm_hf.evaluation.statistics import bootstrap_interval, paired_difference


BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
STEPS = [
    ("coupled", "factorized"), ("factorized", "interleaved"), ("interleaved", "consistency"), ("consistency", "fpo"),
    ("more-sft", "fpo"), ("dpo", "fpo"), ("no-capture", "consistency"),
]  # fmt: skip
"""Pairs of arms whose difference the second table shows."""

Scores = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]


def over_seeds(runs: Mapping[int, Sequence[Mapping[str, Any]]], figure: str) -> dict[str, dict[str, Any]]:
    """The rows that have a figure: id -> the mean over seeds, and the video."""
    rows: dict[str, dict[str, Any]] = {}
    for scores in runs.values():
        for row in scores:
            if row.get(figure) is not None:
                rows.setdefault(row["id"], {"video": row["video"], "values": []})["values"].append(row[figure])
    return {name: {"video": row["video"], "value": float(np.mean(row["values"]))} for name, row in rows.items()}


def summary(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Of every arm and figure: mean, 95 % interval over videos, the mean of each seed, and their spread.

    Args:
        scores: Arm -> seed -> scores of the test rows.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, runs in scores.items():
        table[arm] = {}
        for figure in FIGURES:
            rows = over_seeds(runs, figure)
            if not rows:
                continue
            interval = bootstrap_interval(
                [row["value"] for row in rows.values()], clusters=[row["video"] for row in rows.values()]
            )
            means = [float(np.mean([row[figure] for row in one if figure in row])) for one in runs.values()]
            spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
            table[arm][figure] = {**interval._asdict(), "seeds": means, "spread": spread, "rows": len(rows)}
    return table


def differences(scores: Scores) -> list[dict[str, Any]]:
    """Of every step whose two arms are there: the paired difference of each figure, with its interval over videos."""
    lines = []
    for before, after in STEPS:
        if before not in scores or after not in scores:
            continue
        line: dict[str, Any] = {"before": before, "after": after}
        for figure in FIGURES:
            one, other = (over_seeds(scores[arm], figure) for arm in (before, after))
            common = [name for name in one if name in other]
            if common:
                line[figure] = paired_difference(
                    [other[name]["value"] for name in common],
                    [one[name]["value"] for name in common],
                    clusters=[one[name]["video"] for name in common],
                )._asdict()
        lines.append(line)
    return lines


def tables(scores: Scores, minutes: Mapping[str, float | None]) -> str:
    """Two Markdown tables: the arms, and the steps between them.

    Args:
        scores: Arm -> seed -> scores of the test rows.
        minutes: Arm -> processor minutes of training, mean over seeds.
    """
    lines = ["| arm | " + " | ".join(FIGURES.values()) + " | CPU min |", "|---" * (len(FIGURES) + 2) + "|"]
    for arm, row in summary(scores).items():
        cells = [_cell(row.get(figure)) for figure in FIGURES]
        taken = minutes.get(arm)
        lines.append(f"| {ARMS[arm].title} | {' | '.join(cells)} | {'' if taken is None else f'{taken:.1f}'} |")
    seeds = max(len(runs) for runs in scores.values())
    lines += ["", f"Mean of {seeds} seeds ± their standard deviation, [95 % bootstrap interval over videos].", ""]
    lines += ["| from | to | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 2) + "|"]
    for line in differences(scores):
        cells = [
            f"{line[figure]['difference']:+.3f} [{line[figure]['low']:+.3f}, {line[figure]['high']:+.3f}]"
            if figure in line
            else ""
            for figure in FIGURES
        ]
        lines.append(f"| {line['before']} | {line['after']} | {' | '.join(cells)} |")
    lines += ["", "Paired differences of the same rows, with 95 % bootstrap intervals over videos."]
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    spread = "" if entry["spread"] is None else f" ± {entry['spread']:.3f}"
    return f"{entry['value']:.3f}{spread} [{entry['low']:.3f}, {entry['high']:.3f}]"


def figure(scores: Scores, path: Path) -> None:
    """A panel for each figure: an arm's mean with its interval, and a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = summary(scores)
    arms = list(table)
    drawing, panels = plt.subplots(1, len(FIGURES), figsize=(3.2 * len(FIGURES), 0.45 * len(arms) + 1.2), sharey=True)
    for panel, (name, title) in zip(panels, FIGURES.items(), strict=True):
        for place, arm in enumerate(arms):
            entry = table[arm].get(name)
            if entry is not None:
                panel.plot([entry["low"], entry["high"]], [place, place], color="tab:blue", linewidth=2)
                panel.plot(entry["value"], place, "o", color="tab:blue")
                panel.plot(entry["seeds"], [place] * len(entry["seeds"]), "|", color="tab:orange", markersize=10)
        panel.set_title(title, fontsize=9)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)
    plt.close(drawing)


def write_report(scores: Scores, minutes: Mapping[str, float | None], facts: str, readme: Path) -> None:
    """Put the tables and the picture into a README, between its two marks, and the picture beside it.

    Args:
        scores, minutes: As in [`tables`].
        facts (`str`): A line on how it was measured.
        readme (`Path`): The file; what stands outside of its marks is kept.
    """
    figure(scores, readme.parent / "ladder.png")
    text = readme.read_text(encoding="utf-8") if readme.exists() else f"# Ladder\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    body = f"{facts}\n\n{tables(scores, minutes)}\n\n![Means, intervals and seeds of every arm](ladder.png)"
    readme.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
