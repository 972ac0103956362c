# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Requests answered in one batch, against the same requests one at a time.

Every answer has the same length and `<evi>` tokens in the same places, so that both sides decode the same spans.
"""

import statistics
import time

import torch
from common import EVENTS, Setting, Timing, build_model, check_close, machine, prompts, read_setting, sizes
from transformers import LogitsProcessor


class Script(LogitsProcessor):
    """Puts `<evi>`, `</evi>` in fixed places, never ends early, and notes when the prefill was over.

    Args:
        prompt_length (`int`): Columns of the prompt.
        setting (`Setting`): Token ids.
    """

    def __init__(self, prompt_length: int, setting: Setting):
        self.prompt_length = prompt_length
        self.forced = dict.fromkeys(range(EVENTS), setting.evidence) | {EVENTS: setting.evidence_end}
        self.forced |= {EVENTS + 2 + 2 * k: setting.evidence for k in range(EVENTS)}
        self.words = slice(3, setting.video)
        self.prefilled: tuple[float, float] | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.prefilled is None:
            self.prefilled = time.perf_counter(), time.process_time()
        token = self.forced.get(input_ids.shape[1] - self.prompt_length)
        allowed = self.words if token is None else token
        kept = torch.full_like(scores, -torch.inf)
        kept[:, allowed] = scores[:, allowed]
        return kept


@torch.no_grad()
def answer(model, inputs: dict, setting: Setting) -> tuple[torch.Tensor, list, Timing, Timing]:
    """Tokens and spans of each answer, time of the whole call and of its decode phase."""
    script = Script(inputs["input_ids"].shape[1], setting)
    start, cpu_start = time.perf_counter(), time.process_time()
    outputs = model.generate(
        **inputs, max_new_tokens=setting.response, do_sample=False, logits_processor=[script],
        return_dict_in_generate=True,
    )  # fmt: skip
    end, cpu_end = time.perf_counter(), time.process_time()
    decode = Timing(end - script.prefilled[0], cpu_end - script.prefilled[1])
    return outputs.sequences, outputs.evidence_trace.spans, Timing(end - start, cpu_end - cpu_start), decode


def singles(inputs: dict) -> list[dict]:
    """The requests of a batch, one by one."""
    patches = inputs["patch_features"].split(inputs["num_frames"].tolist())
    rows = [
        {name: inputs[name][i : i + 1] for name in ("input_ids", "attention_mask", "num_frames")}
        for i in range(len(patches))
    ]
    return [{**row, "patch_features": patch} for row, patch in zip(rows, patches, strict=True)]


def answer_one_by_one(model, inputs: dict, setting: Setting) -> tuple[torch.Tensor, list, Timing, Timing]:
    """As `answer`, with times summed over the requests."""
    parts = [answer(model, single, setting) for single in singles(inputs)]
    whole, decode = (Timing(sum(p[i].wall for p in parts), sum(p[i].cpu for p in parts)) for i in (2, 3))
    return torch.cat([p[0] for p in parts]), [p[1][0] for p in parts], whole, decode


def measure(setting: Setting) -> dict[str, dict[str, Timing]]:
    """Medians of both sides, end to end and in the decode phase."""
    model, inputs = build_model(setting).eval(), prompts(setting)
    sides = {"ours": answer, "baseline": answer_one_by_one}
    tokens, spans = {}, {}
    for name, side in sides.items():  # also warms up
        tokens[name], spans[name], _, _ = side(model, inputs, setting)
    check_close((tokens["ours"] == tokens["baseline"]).double().mean().item(), 1.0, "share of equal tokens")
    check_close(float(spans["ours"] == spans["baseline"]), 1.0, "equal spans")
    found = {"end to end": {name: [] for name in sides}, "decode phase": {name: [] for name in sides}}
    for _ in range(setting.repeats):
        for name, side in sides.items():
            _, _, whole, decode = side(model, inputs, setting)
            found["end to end"][name].append(whole)
            found["decode phase"][name].append(decode)
    return {
        phase: {
            name: Timing(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))
            for name, times in by_side.items()
        }
        for phase, by_side in found.items()
    }


def main() -> None:
    setting, _ = read_setting(__doc__, batch=8, repeats=3)
    targets = {"end to end": ">= 2.5", "decode phase": ">= 3"}
    print("| what | sizes | batched s (CPU) | one by one s (CPU) | speed-up wall | speed-up CPU | target | versions |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for phase, sides in measure(setting).items():
        ours, baseline = sides["ours"], sides["baseline"]
        print(
            f"| {setting.batch} requests, {phase} | {sizes(setting)}, {setting.repeats} repeats | {ours.wall:.2f} "
            f"({ours.cpu:.2f}) | {baseline.wall:.2f} ({baseline.cpu:.2f}) | {baseline.wall / ours.wall:.2f} | "
            f"{baseline.cpu / ours.cpu:.2f} | {targets[phase]} | {machine()} |"
        )


if __name__ == "__main__":
    main()
