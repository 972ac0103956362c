# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The first lessons: their targets are true, perfect answers cost nothing, and a killed run goes on after them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_runs import SPEC, tiny

from d2vlm_hf.data import shapes_lessons as lessons
from d2vlm_hf.data.shapes import make_rows, make_scene
from d2vlm_hf.data.shapes_language import POSITIONS
from d2vlm_hf.training import lesson_losses, warmup
from d2vlm_hf.training.configs import ModelArguments
from d2vlm_hf.training.muon import Muon, orthogonalise


LITTLE = {"patches": 2, "frames": 2, "letters": 2, "words": 2, "batch_size": 2, "video_batch_size": 2, "num_workers": 0}
SURE = 30.0


@pytest.fixture(scope="module")
def batch():
    items = lessons.ShapesLessons(4, size=32, fps=2.0, questions=4)
    return lessons.collate_lessons([items[index] for index in range(len(items))])


@pytest.mark.parametrize(
    ("text", "subjects", "kinds"),
    [
        ("When does the red circle move left?", {("red", "circle")}, {"move_left"}),
        ("Find every time a blue shape changes its place.", {("blue", None)}, set(lessons.MOVES)),
        ("Which shape blinks at <evi>?", {(None, None)}, {"flash"}),
        (
            "Which of these happens first? Options: (A) the red star becomes big (B) the cyan ring goes up",
            {("red", "star"), ("cyan", "ring")},
            {"grow", "move_up"},
        ),
        ("Describe everything that happens in the video.", set(), set()),
    ],
)
def test_a_question_names_subjects_and_events(text, subjects, kinds):
    assert lessons.named_subjects(text) == subjects
    assert lessons.named_kinds(text) == kinds


def test_what_is_asked_for_is_what_the_answer_says():
    """In grounding rows the frames of asked events of matched objects are those of the true spans."""
    checked = 0
    for index in range(60):
        scene = make_scene("middle", "train", index, 3)
        times = np.arange(0, scene.duration, 0.5)
        doing = lessons.frame_labels(scene, times)["doing"]
        for row in make_rows(scene, 4, {"tvg": 1.0, "tal": 1.0}):
            about = lessons.question_labels(scene, row["question"])
            active = (doing & about["matched"][:, None] & about["asked"]).any((1, 2))
            inside = [any(start <= time <= end for start, end in row["spans"]) for time in times]
            assert active.tolist() == inside, row["question"]
            checked += 1
    assert checked > 150


def test_lessons_never_show_a_scene_of_the_supervised_rows():
    data = lessons.ShapesLessons(2, size=16, fps=1.0)
    assert data.start >= 1_000_000
    with pytest.raises(IndexError):
        data[2]


def sure(parts: dict[str, int], *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((*shape, size), -SURE) for name, size in parts.items()}


def test_perfect_patches_cost_nothing(batch):
    side = 4
    places = [((x + 0.5) / side, (y + 0.5) / side) for y in range(side) for x in range(side)]  # row by row
    frames = len(batch.pixels)
    heads = sure(lesson_losses.PATCH_PARTS, frames, side * side)
    heads["centre"] = torch.zeros(frames, side * side, 2)
    covered = 0
    for frame in range(frames):
        for place, (x, y) in enumerate(places):
            near = [
                (float(torch.dist(batch.centre[frame, k], torch.tensor([x, y]))), k)
                for k in range(lessons.MAX_OBJECTS)
                if batch.present[frame, k]
            ]
            near = [(far, k) for far, k in near if far < lesson_losses.OBJECT_REACH[int(batch.big[frame, k])]]
            k = min(near)[1] if near else None
            covered += k is not None
            heads["look"][frame, place, 0 if k is None else 1 + batch.look[frame, k]] = SURE
            heads["shape"][frame, place, 0 if k is None else 1 + batch.shape[frame, k]] = SURE
            if k is not None:
                heads["dark_big"][frame, place] = SURE * (
                    2 * torch.tensor([batch.dark[frame, k], batch.big[frame, k]]).float() - 1
                )
                heads["centre"][frame, place] = batch.centre[frame, k]
    losses = lesson_losses.patch_loss(heads, batch)
    assert covered > 20
    assert losses.pop("shape_accuracy") == 1
    assert all(float(loss) < 1e-6 for loss in losses.values()), losses
    heads["look"] = heads["look"].roll(1, -1)
    assert lesson_losses.patch_loss(heads, batch)["look"] > 1


def test_perfect_states_cost_nothing(batch):
    longest = int(batch.num_frames.max())
    mask = torch.arange(longest) < batch.num_frames[batch.video_index][:, None]
    heads = sure(lesson_losses.STATE_PARTS, len(batch.questions), longest)
    first = (batch.num_frames.cumsum(0) - batch.num_frames).tolist()
    active_frames = alone_frames = 0
    for question, video in enumerate(batch.video_index.tolist()):
        for time in range(int(batch.num_frames[video])):
            seen = torch.where(batch.matched[question] & batch.present[first[video] + time])[0].tolist()
            if len(seen) == 1:
                alone_frames += 1
                x, y = (batch.centre[first[video] + time, seen[0]] - 0.5).tolist()
                side = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")
                heads["part"][question, time, POSITIONS.index(side)] = SURE
            for k in range(lessons.MAX_OBJECTS):
                doing = batch.doing[first[video] + time, k] & batch.matched[question, k]
                heads["doing"][question, time][doing] = SURE
                colour, kinds = int(batch.colour[first[video], k]), len(lessons.EVENT_KINDS)
                heads["deeds"][question, time, colour * kinds : (colour + 1) * kinds][doing] = SURE
                shape = int(batch.shape[first[video], k])
                heads["deeds_of_shapes"][question, time, shape * kinds : (shape + 1) * kinds][doing] = SURE
                if batch.matched[question, k] and batch.present[first[video] + time, k]:
                    before, after = max(time - 1, 0), min(time + 1, int(batch.num_frames[video]) - 1)
                    shift = batch.centre[first[video] + after, k] - batch.centre[first[video] + before, k]
                    shift = lesson_losses.SHIFT_SCALE * shift
                    heads["shifts"][question, time, 2 * colour : 2 * colour + 2] = shift
                heads["asked"][question, time][doing & batch.asked[question]] = SURE
                if (doing & batch.asked[question]).any():
                    active_frames += 1
                    heads["active"][question, time] = SURE
                    heads["colour"][question, time, batch.colour[first[video], k]] = SURE
                    heads["shape"][question, time, shape] = SURE
    losses = lesson_losses.state_loss(heads, batch, mask)
    assert active_frames > 20
    assert alone_frames > 20
    assert losses.pop("active_iou") == 1
    assert all(float(loss) < 1e-6 for loss in losses.values()), losses
    heads["part"] = heads["part"].roll(1, -1)
    assert lesson_losses.state_loss(heads, batch, mask)["part"] > 1
    heads["active"] = -heads["active"]
    assert lesson_losses.state_loss(heads, batch, mask)["active_iou"] == 0
    nothing = replace(batch, matched=torch.zeros_like(batch.matched))
    assert all(torch.isfinite(loss) for loss in lesson_losses.state_loss(heads, nothing, mask).values())


def test_frames_are_scored_by_what_the_question_names(batch):
    frames = torch.zeros(len(batch.questions), dtype=torch.long)
    heads = sure(lesson_losses.FRAME_PARTS, len(batch.questions))
    seen = (batch.matched & batch.present[frames]).sum(1).clamp(max=2)
    heads["count"].scatter_(1, seen[:, None], SURE)
    heads["words"] = SURE * (2 * batch.words.float() - 1)
    for question in range(len(batch.questions)):
        for k in range(lessons.MAX_OBJECTS):
            if batch.matched[question, k] and batch.present[0, k]:
                colour = int(batch.colour[0, k])
                heads["places"][question, 2 * colour : 2 * colour + 2] = batch.centre[0, k]
    losses = lesson_losses.frame_loss(heads, batch, frames, torch.arange(len(batch.questions)))
    assert losses["count_accuracy"] == 1
    assert float(losses["count"]) < 1e-6
    assert float(losses["words"]) < 1e-6
    assert float(losses["places"]) < 1e-6


def test_warm_up_learns_and_is_kept(tmp_path):
    torch.manual_seed(0)
    model, processor = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {**LITTLE, "patches": 60}
    first = warmup.warm_up(model, processor, {**options, "patches": 1}, seed=1)
    model, processor = tiny()
    results = warmup.warm_up(model, processor, options, str(tmp_path), seed=1)
    assert results["warmup/patches/look"] < first["warmup/patches/look"] - 0.1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    for part in ("vision_tower", "connector", "language_model.layers"):
        assert any(part in name for name in changed), part
    assert {path.name for path in tmp_path.iterdir()} == {f"warmup-{name}.safetensors" for name in warmup.LESSONS}
    assert all(p.requires_grad for p in model.parameters())

    (tmp_path / "warmup-words.safetensors").unlink()  # killed during the last lesson
    again, processor = tiny(seed=5)
    assert set(warmup.warm_up(again, processor, options, str(tmp_path), seed=1)) == {
        name for name in results if "/words/" in name
    }
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("lesson", ["frames", "words"])
def test_a_killed_lesson_goes_on(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "ECHO_LAG", 1)  # a batch that was used before the kill comes again after it
    options = {**LITTLE, "patches": 0, "frames": 0, "letters": 0, "words": 0, "save_steps": 2, "uses": 2, lesson: 4}
    whole, processor = tiny()
    warmup.warm_up(whole, processor, options, seed=1)
    killed, processor = tiny()
    update, calls = warmup._LessonState.update, []

    def die_at_third(state):
        calls.append(state)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(state)

    with monkeypatch.context() as patch:
        patch.setattr(warmup._LessonState, "update", die_at_third)
        with pytest.raises(KeyboardInterrupt):
            warmup.warm_up(killed, processor, options, str(tmp_path), seed=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"warmup-{lesson}.partial"]
    again, processor = tiny(seed=5)
    warmup.warm_up(again, processor, options, str(tmp_path), seed=1)
    trained = {"frames": ("vision_tower", "connector"), "words": ("language_model",)}[lesson]
    for part in trained:
        for name, value in getattr(whole.model, part).state_dict().items():
            torch.testing.assert_close(getattr(again.model, part).state_dict()[name], value, msg=name)
    assert [path.name for path in tmp_path.iterdir()] == [f"warmup-{lesson}.safetensors"]


def test_batches_come_again_and_are_loaded_once(monkeypatch):
    monkeypatch.setattr(lessons, "ECHO_LAG", 2)
    assert lessons.batch_order(5, 1) == [0, 1, 2, 3, 4]
    assert lessons.batch_order(9, 2) == [0, 1, 2, 0, 3, 1, 4, 2, 5]
    assert lessons.batch_order(9, 3) == [0, 1, 2, 0, 3, 1, 4, 2, 0]
    order = lessons.batch_order(40, 3)
    assert max(order.count(number) for number in order) == 3
    loaded = []

    def load():
        for number in dict.fromkeys(order[7:]):  # as after a kill
            loaded.append(number)
            yield number

    assert list(lessons.repeated(load(), order[7:])) == order[7:]
    assert len(loaded) == len(set(loaded))


def test_a_batch_is_encoded_once(batch, monkeypatch):
    """A later use gives the same losses and gradients without the tower and the connector."""
    model, processor = tiny()
    model.train()
    lesson = warmup.Warmup(model, processor, warmup.WarmupOptions(fps=2.0, uses=2))
    state = warmup._LessonState(lesson, "words", 2, None)

    def step():
        losses = lesson.words(batch)
        sum(value for value in losses.values() if value.requires_grad).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return losses, gradients

    batch = replace(batch, inputs=None)
    plain = model(**lesson.collator(batch.rows)).lm_loss
    first, gradients = step()
    torch.testing.assert_close(first["lm"], plain)
    monkeypatch.setattr(model.model.vision_tower, "forward", None)
    monkeypatch.setattr(model.model.connector, "forward", None)
    again, same = step()
    assert {name: value.item() for name, value in again.items()} == {
        name: value.item() for name, value in first.items()
    }
    assert gradients
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, msg=name)
    state.finish()


def test_the_tokens_that_decide(batch):
    """The right option with its letter, and whether there is a moment, as the answer says them."""
    model, processor = tiny()
    base = {"question_spans": [], "options": [], "task": "tvg"}
    rows = [
        {
            **base,
            "task": "rar",
            "answer": "It is the red star (C).",
            "spans": [],
            "options": ["the red star", "the box"],
        },
        {**base, "task": "gvq", "answer": "Left (B) at <evi>.", "spans": [[0, 1]], "options": ["left", "right"]},
        {**base, "answer": "The red star never goes left.", "spans": []},
    ]
    responses = [processor.encode_response(row["answer"], len(row["spans"]), "both") for row in rows]
    labels = torch.full((3, max(map(len, responses)) + 2), -100)
    for row, ids in zip(labels, responses, strict=True):
        row[2 : 2 + len(ids)] = torch.tensor(list(ids))
    logps = torch.zeros(labels.shape)
    words = processor.tokenizer.convert_ids_to_tokens
    options = warmup.WarmupOptions(choice_weight=2.0, decision_weight=0.5)
    lesson = warmup.Warmup(model, processor, options)
    wanted = {0: "theredstarC", 1: "LeftB"}
    for row, text in wanted.items():
        said = torch.isin(labels[row], lesson._option_tokens(rows))
        assert "".join(words(labels[row][said].tolist())).replace("Ġ", "") == text
    assert lesson._deciding(rows, labels, logps) == {"choice": 0.0, "decision": 0.0}
    logps[2, 2] = -1.0  # `</evi>`, at once: no moment
    logps[2, 3:] = -9.0  # how it is said does not count
    logps[0, labels[0] == processor.tokenizer.convert_tokens_to_ids("C")] = -1.0
    deciding = lesson._deciding(rows, labels, logps)
    assert float(deciding["decision"]) == pytest.approx(0.5)
    count = sum(int(torch.isin(labels[row], lesson._option_tokens(rows)).sum()) for row in wanted)
    assert float(deciding["choice"]) == pytest.approx(2.0 / count)
    assert not warmup.Warmup(model, processor, warmup.WarmupOptions())._deciding(rows, labels, logps)


def test_letters_are_learned_from_texts_alone(monkeypatch):
    """The letter follows its words; only the tokens of the answer count, the letters most."""
    texts = lessons.ChoiceTexts(6, rows=2)
    with pytest.raises(IndexError):
        texts[6]
    rows = [row for index in range(6) for row in texts[index]]
    assert rows == [row for index in range(6) for row in texts[index]]
    for row in rows:
        assert row["question"].startswith("Options: (A) ")
        letter = "abcd"[row["correct_option"]]
        assert f"{row['options'][row['correct_option']]} ({letter})" in row["answer"].lower()
    model, processor = tiny()
    lesson = warmup.Warmup(model, processor, warmup.WarmupOptions())
    losses = lesson.letters(rows)
    assert losses["letter"] > 1
    assert losses["others"] > 0.1
    letters = processor.tokenizer.convert_tokens_to_ids(list("ABCD"))
    said = []

    def head(states):  # a head that always says A
        said.append(len(states))
        return SURE * torch.nn.functional.one_hot(torch.full((len(states),), letters[0]), 5000).float()

    monkeypatch.setattr(model.lm_head, "forward", head)
    share = sum(row["correct_option"] == 0 for row in rows) / len(rows)
    assert lesson.letters(rows)["letter_accuracy"] == pytest.approx(share)
    assert said[0] == len(rows)


def test_a_given_moment_is_looked_for(batch):
    """The last lesson asks where the moment of the question is exactly when there is one."""
    model, processor = tiny()
    lesson = warmup.Warmup(model, processor, warmup.WarmupOptions(fps=2.0))
    rows = [place for place, row in enumerate(batch.rows) if row["question_spans"]]
    assert rows
    assert "moment" in lesson.words(batch)
    fields = {name: getattr(batch, name) for name in ("video_index", "matched", "asked", "words")}
    plain = [place for place in range(len(batch.rows)) if place not in rows]
    without = replace(
        batch,
        rows=[batch.rows[place] for place in plain],
        questions=[batch.questions[place] for place in plain],
        **{name: value[plain] for name, value in fields.items()},
    )
    assert "moment" not in lesson.words(without)


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_an_update_is_turned_into_a_rotation(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    turned = orthogonalise(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.linalg.svdvals(turned).sub(1).abs().max() < 0.4
    cosine = torch.cosine_similarity(turned.flatten(1), (u @ vh).flatten(1))
    assert cosine.min() > 0.95
    torch.testing.assert_close(orthogonalise(matrices[:1]), turned[:1])  # stacking changes nothing


def test_muon_walks_down_and_refuses_vectors():
    torch.manual_seed(0)
    weight, target = torch.nn.Parameter(torch.zeros(6, 4)), torch.randn(6, 4)
    optimizer = Muon([weight], lr=0.2, weight_decay=0.0)
    start = (weight - target).square().sum()
    for _ in range(60):
        loss = (weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * start
    with pytest.raises(ValueError, match=r"Muon got a parameter of shape \(3,\): it turns matrices. Give it to AdamW"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_errors():
    model, processor = tiny()
    with pytest.raises(ValueError, match=r"warmup has unknown options \['step'\]. Use some of \["):
        warmup.warm_up(model, processor, {"step": 3})
    mlp = tiny_model(connector="mlp")
    with pytest.raises(ValueError, match=r"not 'mlp': the lessons ask about what it names. Use connector_type"):
        warmup.warm_up(mlp, processor, LITTLE)
    with pytest.raises(ValueError, match=r"model_name_or_path='x': a trained model would unlearn what it knows"):
        ModelArguments(model_name_or_path="x", warmup={})
    assert ModelArguments(scratch=SPEC, warmup={}).warmup == {}
