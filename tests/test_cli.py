# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The command line as people use it: what it prints where, which exit code it ends with, one line for an error."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import video_files
from original_checkpoints import golden_tensors, write_original
from safetensors.torch import load_file, save_file
from tiny_processor import model_for, tiny_processor
from tiny_tokenizers import build_bpe_tokenizer, build_wordpiece_qformer_tokenizer

from d2vlm_hf import cli, doctor
from d2vlm_hf.cli import main
from d2vlm_hf.commands import ground
from d2vlm_hf.data.schema import make_row
from d2vlm_hf.model.pipeline_d2vlm import save_checkpoint


PACKAGE = Path(cli.__file__).parent
QUESTION = "When does the man open the door?"
# The package without its `__init__`, which loads transformers: what is left is what the command line itself loads.
BARE = (
    "import sys, types\n"
    "package = types.ModuleType('d2vlm_hf')\n"
    f"package.__path__ = [{str(PACKAGE)!r}]\n"
    "sys.modules['d2vlm_hf'] = package\n"
    "from d2vlm_hf.cli import main\n"
)


def run_bare(code: str, *arguments: str, **options) -> subprocess.Popen:
    """A process that runs `code` after `main` was imported."""
    command = [sys.executable, "-c", BARE + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def told(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments: str, code: int = 2) -> str:
    """The one line of an error."""
    ended, out, err = told(capsys, *arguments)
    lines = [line for line in err.splitlines() if not line.endswith(" ...")]  # without "looking at ... ..."
    assert (ended, out) == (code, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("d2vlm: error: ")
    return lines[0].removeprefix("d2vlm: error: ")


# ---- a model that says what it is told to, in a folder ---------------------------------------------------------------


def script(processor, events: int) -> list:
    """A `sequence_bias` that makes `events` x <evi>, </evi>, words with one <evi>, end: each token wins after those
    before it."""
    evidence, words = processor.evidence_token_id, processor.tokenizer(" man", add_special_tokens=False)["input_ids"]
    ids = [*[evidence] * events, processor.evidence_end_token_id, *words]
    ids += [evidence] * (events > 0) + [processor.end_of_turn_id]
    return [[ids[: i + 1], 1000.0 * 2**i] for i in range(len(ids))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved checkpoint with random weights that answers with two events."""
    processor = tiny_processor()
    model = model_for(processor)
    model.generation_config.sequence_bias = script(processor, 2)
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    save_checkpoint(folder, model, processor)
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return ground.load_pipeline(str(checkpoint), "cpu")


@pytest.fixture
def loaded(monkeypatch, pipeline):
    """The same model for every command, loaded once."""
    asked = []
    monkeypatch.setattr(ground, "load_pipeline", lambda *arguments: asked.append(arguments) or pipeline)
    return SimpleNamespace(pipeline=pipeline, asked=asked)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """4 seconds, 10 frames per second."""
    return video_files.write_video(tmp_path_factory.mktemp("cli-clip") / "clip.mp4")


# ---- the program as such ---------------------------------------------------------------------------------------------


def test_help_loads_nothing_large_and_offers_what_there_is():
    code = (
        "commands = ['--help'], ['ground', '--help'], ['--version'], ['sft', '--config', 'gone']\n"
        "codes = [main(command) for command in commands]\n"
        "print(codes, sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'numpy', 'trl', 'datasets', 'av', 'matplotlib', 'yaml'}))\n"
    )
    out, err = run_bare(code).communicate(timeout=60)
    assert out.splitlines()[-1] == "[0, 0, 0, 2] []", err
    listed = out.split("COMMAND\n")[1].split("options:")[0]
    offered = set(re.findall(r"^    (\S+)", listed, re.M))
    there = {name for name, (module, _) in cli.FORWARDED.items() if importlib.util.find_spec(f"d2vlm_hf.{module}")}
    assert offered == {"ground", "convert", "doctor", "check-data", "shapes", "push", *there}
    assert {"sft", "fpo", "make-preferences"} <= there


@pytest.mark.parametrize("command", ["ground", "convert", "doctor", "check-data", "shapes", "push"])
def test_every_command_explains_itself(capsys, command):
    code, out, err = told(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: d2vlm {command}")


def test_a_command_whose_module_is_missing_is_not_offered(capsys, monkeypatch):
    monkeypatch.setitem(cli.FORWARDED, "sft", ("training.gone", "train"))
    assert "  sft " not in told(capsys, "--help")[1]
    assert refused(capsys, "sft", "--config", "x.yaml").startswith("argument COMMAND: invalid choice: 'sft'")


def test_version(capsys, monkeypatch):
    assert told(capsys, "--version") == (0, f"d2vlm {metadata.version('d2vlm-hf')}\n", "")

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cli.metadata, "version", version)
    assert told(capsys, "--version") == (0, "d2vlm of a folder that is not installed\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command was given (`d2vlm --help`"),
        (["grund"], "argument COMMAND: invalid choice: 'grund'"),
        (["doctor", "--quick"], "unrecognized arguments: --quick"),
        (["--deb", "doctor"], "unrecognized arguments: --deb"),
        (["convert", "here"], "the following arguments are required: DST (`d2vlm convert --help`"),
        (["shapes", "out", "--num-videos", "many"], "argument --num-videos: invalid int value: 'many'"),
    ],
)
def test_usage_errors_are_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("two\n  lines"), 2, "two lines"),
        (
            FileNotFoundError(2, "No such file or directory", "x.yaml"),
            2,
            "[Errno 2] No such file or directory: 'x.yaml'",
        ),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (RuntimeError("out of memory"), 1, "out of memory"),
        (KeyError("video"), 1, "KeyError: 'video' (`d2vlm --debug ...` shows where)"),
        (RuntimeError(), 1, "RuntimeError (`d2vlm --debug ...` shows where)"),
        (ImportError("PyAV cannot be loaded"), 1, "PyAV cannot be loaded"),
        (
            ModuleNotFoundError("No module named 'trl'", name="trl.trainer"),
            1,
            "this needs trl, which is not installed. Run: pip install 'd2vlm-hf[train]'",
        ),
        (
            ModuleNotFoundError("No module named 'pycocoevalcap'", name="pycocoevalcap"),
            1,
            "this needs pycocoevalcap, which is not installed. Run: pip install 'd2vlm-hf[eval]'",
        ),
        (SystemExit("stopped by a library"), 1, "stopped by a library"),
        (RuntimeError("x" * 5000), 1, "x" * 1500 + " ... (`d2vlm --debug ...` shows the rest)"),
    ],
)
def test_whatever_fails_is_one_line(capsys, monkeypatch, error, code, message):
    def diagnose():
        raise error

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert refused(capsys, "doctor", code=code) == message


def test_debug_shows_where(capsys, monkeypatch):
    def diagnose():
        raise KeyError("video")

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    code, out, err = told(capsys, "--debug", "doctor")
    assert (code, out) == (1, "")
    assert "Traceback (most recent call last):" in err
    assert "in diagnose" in err
    assert err.splitlines()[-1].startswith("d2vlm: error: KeyError: 'video'")


def test_status_line_appears_only_where_something_takes_long(capsys, monkeypatch, tmp_path):
    command = ("shapes", tmp_path / "out", "--difficulty", "easy", "--num-videos", "1")
    monkeypatch.setattr(cli, "STATUS_AFTER", 0.0)
    assert "d2vlm: generating ...\n" in told(capsys, *command)[2]
    monkeypatch.setattr(cli, "STATUS_AFTER", 1000.0)
    assert "generating" not in told(capsys, *command)[2]


def test_interrupt_is_quiet(tmp_path):
    # A shell that puts its jobs into the background has them ignore Ctrl-C, and so would this process.
    restore = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = restore + "sys.exit(main(['shapes', sys.argv[1], '--num-videos', '5000']))\n"
    process = run_bare(code, str(tmp_path / "out"))
    try:
        while not list((tmp_path / "out").glob("videos/*.mp4")):
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "error" not in err


def test_a_reader_that_leaves_is_no_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n" * 2000)
    process = run_bare("sys.exit(main(['check-data', sys.argv[1]]))\n", str(tmp_path / "rows.jsonl"))
    assert process.stdout.readline().startswith("Row 0 (id 'rows-0'), column 'video'")
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read().replace(f"d2vlm: checking {tmp_path / 'rows.jsonl'} ...\n", "") == ""


# ---- ground ----------------------------------------------------------------------------------------------------------


def test_ground_prints_answer_and_evidence(capsys, clip, checkpoint, pipeline):
    code, out, _ = told(capsys, "ground", clip, QUESTION, "--model", checkpoint, "--device", "cpu")
    expected = pipeline(clip, question=QUESTION)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"Question  {QUESTION}"
    assert lines[1] == f"Answer    {expected['answer']}"
    assert lines[2].split() == ["Evidence", "start", "end", "length", "score", "in", "the", "answer"]
    first, second = expected["evidence"]
    for line, entry, number, named in ((lines[3], first, 1, "yes"), (lines[4], second, 2, "no")):
        length = entry["end"] - entry["start"]
        seconds = [f"{value:.1f}s" for value in (entry["start"], entry["end"], length)]
        assert line.split() == [str(number), *seconds, f"{entry['score']:.2f}", named]
    assert len(lines) == 5


def test_ground_in_a_process_prints_json_alone(clip, checkpoint, pipeline):
    command = [sys.executable, "-m", "d2vlm_hf.cli", "ground", clip, QUESTION, "--json", "--model", str(checkpoint)]
    run = subprocess.run([*command, "--max-frames", "4", "--device", "cpu"], capture_output=True, text=True, check=True)
    expected = pipeline(clip, question=QUESTION, max_frames=4)
    assert json.loads(run.stdout) == {"video": clip, "question": QUESTION, **expected}
    assert "more than max_frames=4" in run.stderr
    assert expected["fps"] == 1.0


def test_ground_draws_what_it_found(capsys, monkeypatch, clip, loaded, tmp_path):
    drawn = {}
    original = ground.timeline
    monkeypatch.setattr(
        ground, "timeline", lambda *a, **k: drawn.update(k, result=a[0], times=a[2]) or original(*a, **k)
    )
    path = tmp_path / "timeline.png"
    code, out, _ = told(capsys, "ground", clip, QUESTION, "--figure", path)
    assert (code, out.splitlines()[-1]) == (0, f"Timeline  {path}")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert drawn["question"] == QUESTION
    assert len(drawn["result"]["curves"]) == 2
    assert len(drawn["result"]["times"]) == 8, "4 s at 2 frames per second"
    assert len(drawn["times"]) == 16, "the strip has frames of its own"
    code, out, err = told(capsys, "ground", clip, QUESTION, "--figure", path, "--json")
    assert code == 0
    assert {"times", "curves"} & set(json.loads(out)) == set()
    assert f"Timeline  {path}\n" in err


def test_a_damaged_video_is_told_of_once_and_drawn_as_far_as_it_goes(capsys, caplog, loaded, tmp_path):
    path = video_files.write_damaged(tmp_path / "clip.mp4", [25, 26], gop=40)
    assert told(capsys, "ground", path, QUESTION, "--figure", tmp_path / "t.png", "--max-new-tokens", "1")[0] == 0
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "is damaged" in line]) == 1, said
    assert (tmp_path / "t.png").is_file()


def test_frames_that_do_not_decode_leave_the_picture_without_a_strip(
    capsys, caplog, monkeypatch, clip, loaded, tmp_path
):
    def fail(*args, **kwargs):
        raise ValueError("no frame at 1.3 s")

    monkeypatch.setattr(ground, "sample_video", fail)
    assert told(capsys, "ground", clip, QUESTION, "--figure", tmp_path / "t.png")[0] == 0
    assert [record.getMessage() for record in caplog.records] == ["the picture has no frames: no frame at 1.3 s"]
    assert (tmp_path / "t.png").is_file()


def test_ground_hands_options_on(capsys, clip, loaded):
    result = loaded.pipeline(clip, question=QUESTION)
    scores = sorted(entry["score"] for entry in result["evidence"])
    options = (
        "--min-score",
        sum(scores) / 2,
        "--fps",
        1,
        "--max-new-tokens",
        2,
        "--dtype",
        "float32",
        "--model",
        "there",
    )
    code, out, _ = told(capsys, "ground", clip, QUESTION, "--json", *options)
    found = json.loads(out)
    assert (code, found["fps"], found["answer"]) == (0, 1.0, "")
    assert len(found["evidence"]) < 2
    assert loaded.asked == [("there", None, "float32")]


def test_ground_with_given_moments(capsys, clip, loaded):
    question = "What happens in <evi> and in <evi>?"
    spans = ("--question-span", "0.5", "1.5", "--question-span", "3", "4")
    code, out, _ = told(capsys, "ground", clip, question, "--json", *spans)
    assert code == 0
    expected = loaded.pipeline(clip, question=question, question_spans=[[0.5, 1.5], [3, 4]])
    assert json.loads(out) == {"video": clip, "question": question, **expected}
    other = loaded.pipeline(clip, question=question, question_spans=[[0, 0.5], [1, 2]])
    assert expected["evidence"] != other["evidence"], "the moments are looked at"


def test_ground_streams_the_answer_and_does_not_repeat_it(capsys, clip, loaded):
    code, out, _ = told(capsys, "ground", clip, QUESTION, "--stream")
    expected = loaded.pipeline(clip, question=QUESTION)
    words, table = out.split("Evidence  ")
    assert code == 0
    places = [f"[{e['start']:.1f}s - " for e in [*expected["evidence"], *expected["references"]]]
    assert [words.count(place) >= 1 for place in places] == [True] * 3
    assert "Answer" not in out
    assert len(table.splitlines()) == 3


def test_ground_says_when_nothing_was_found(capsys, monkeypatch, clip, loaded, tmp_path):
    bias = script(loaded.pipeline.processor, 0)
    monkeypatch.setattr(loaded.pipeline.model.generation_config, "sequence_bias", bias)
    code, out, _ = told(capsys, "ground", clip, QUESTION, "--figure", tmp_path / "none.png")
    assert code == 0
    assert out.splitlines()[1:3] == ["Answer    man", "Evidence  none: no moment of the video was found"]
    assert (tmp_path / "none.png").is_file()


def test_ground_takes_a_folder_of_frames(capsys, loaded, tmp_path):
    from PIL import Image

    for number, pixels in enumerate(video_files.numbered_frames(6)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    code, out, _ = told(
        capsys, "ground", tmp_path, QUESTION, "--json", "--video-fps", "2", "--figure", tmp_path / "t.png"
    )
    assert (code, json.loads(out)["duration"]) == (0, 3.0)
    assert "came with neither video_fps and timestamps" in refused(capsys, "ground", tmp_path, QUESTION)


def test_demo_grounds_the_shipped_clip(capsys, monkeypatch, clip, loaded, tmp_path):
    shutil.copy(clip, tmp_path / "demo.mp4")
    notes = {"question": QUESTION, "spans": [[1.0, 2.0]], "answer": "At <evi>."}
    (tmp_path / "demo.json").write_text(json.dumps(notes))
    monkeypatch.setattr(ground, "bundled_clip", lambda: str(tmp_path / "demo.mp4"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = told(capsys, "ground", "--demo")
    assert code == 0
    assert out.splitlines()[0] == f"Question  {QUESTION}"
    assert out.splitlines()[-2:] == ["Annotated 1.0s - 2.0s", "Timeline  demo_timeline.png"]
    assert (tmp_path / "demo_timeline.png").stat().st_size > 10_000
    assert loaded.asked == [(None, None, None)], "with the shipped checkpoint"
    (tmp_path / "demo.json").unlink()
    assert "or demo.json beside it is missing: this installation lacks its clip" in refused(capsys, "ground", "--demo")


def test_without_matplotlib_there_is_an_answer_and_no_picture(capsys, monkeypatch, clip, loaded, tmp_path):
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else original(name))
    said = refused(capsys, "ground", clip, QUESTION, "--figure", tmp_path / "t.png", code=1)
    assert said == "this needs matplotlib, which is not installed. Run: pip install 'd2vlm-hf[eval]'"
    assert loaded.asked == [], "before the model is loaded"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ground, "demonstration", lambda: ground.Inquiry(clip, QUESTION))
    code, out, err = told(capsys, "ground", "--demo")
    assert (code, "Answer    " in out) == (0, True)
    assert "no picture is drawn: this needs matplotlib" in err
    assert list(tmp_path.iterdir()) == []


BAD_VIDEOS = {
    "missing": (lambda path: None, "does not exist: no video file is there"),
    "text": (
        lambda path: path.write_text("not a video, but long enough to look at" * 100),
        "is not a video that FFmpeg",
    ),
    "empty": (lambda path: path.touch(), "is empty (0 bytes)"),
    "audio": (video_files.write_audio, "holds no video: FFmpeg finds only audio in it"),
    "header only": (video_files.write_header_only, "holds no video frames"),
    "truncated": (lambda path: video_files.write_cut_off(path, 0.5, False), "is a cut-off MP4 or MOV file: its index"),
    "folder": (lambda path: path.mkdir(), "is a folder without pictures"),
}


@pytest.mark.parametrize("kind", BAD_VIDEOS)
def test_bad_videos_are_refused(capsys, loaded, tmp_path, kind):
    make, message = BAD_VIDEOS[kind]
    path = tmp_path / "video.mp4"
    make(path)
    said = refused(capsys, "ground", path, QUESTION, "--figure", tmp_path / "timeline.png")
    assert message in said
    assert str(path) in said
    assert not (tmp_path / "timeline.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the question is empty: there is nothing to look for"),
        (["  "], "the question is empty: there is nothing to look for"),
        (["What happens in <evi>?"], "holds <evi> without a span: it stands for a moment of the video"),
        (["Look at <video>!"], "holds <video>, the token that frames stand in for"),
        (["What is it?", "--question-span", "1", "2"], "has 0 <evi> for 1 given spans: every given moment needs one"),
        (["<evi> or <evi>?", "--question-span", "1", "2"], "has 2 <evi> for 1 given spans"),
        (["And <evi>?", "--question-span", "3", "1"], "spans[0] is [3.0, 1.0]: it ends before it starts"),
        (["And <evi>?", "--question-span", "-1", "1"], "spans[0] is [-1.0, 1.0]: it starts before the video does"),
        (["And <evi>?", "--question-span", "1", "99"], "spans[0] is [1.0, 99.0]: it ends after the video"),
        (["And <evi>?", "--question-span", "nan", "1"], "spans[0] is [nan, 1.0]"),
        (["And <evi>?", "--question-span", "1"], "argument --question-span: expected 2 arguments"),
        (["And <evi>?", "--question-span", "now", "1"], "argument --question-span: invalid float value: 'now'"),
        ([QUESTION, "--fps", "0"], "fps=0.0 is no sampling rate"),
        ([QUESTION, "--fps", "-2"], "fps=-2.0 is no sampling rate"),
        ([QUESTION, "--fps", "nan"], "fps=nan is no sampling rate"),
        ([QUESTION, "--fps", "fast"], "argument --fps: invalid float value: 'fast'"),
        ([QUESTION, "--max-new-tokens", "500"], "tokens, most of them frames, and the text model has room for 12"),
        ([QUESTION, "--max-frames", "0"], "max_frames=0 leaves nothing to look at"),
        ([QUESTION, "--max-new-tokens", "0"], "max_new_tokens=0 leaves no answer"),
        ([QUESTION, "--min-score", "7"], "min_score=7.0 is no score"),
        ([QUESTION, "--video-fps", "8"], "came with video_fps or timestamps, but a video file has its own times"),
        ([QUESTION, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([QUESTION, "--figure", "timeline.docx"], "timeline.docx has no ending that says its format"),
        ([QUESTION, "--figure", "gone/timeline.png"], "cannot be written to gone/timeline.png"),
        ([QUESTION, "--json", "--stream"], "--stream prints words as they come and --json one object"),
        ([QUESTION, "--demo"], "--demo brings its own video and question, but video was given"),
        ([], "QUESTION is missing: there is nothing to find"),
    ],
)
def test_bad_questions_and_options_are_refused(capsys, clip, loaded, arguments, message):
    assert message in refused(capsys, "ground", clip, *arguments)
    assert told(capsys, "ground", clip, QUESTION)[0] == 0, "the next request is unharmed"


def test_ground_without_anything(capsys):
    assert refused(capsys, "ground").startswith("VIDEO and QUESTION are missing: there is nothing to find")


def copied(checkpoint: Path, folder: Path, change) -> Path:
    """The checkpoint with other weights."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_bad_checkpoints_are_refused(capsys, clip, checkpoint, tmp_path):
    name = "evidence_head.1.weight"
    lacking = copied(checkpoint, tmp_path / "lacking", lambda w: {k: v for k, v in w.items() if k != name})
    other = copied(checkpoint, tmp_path / "other", lambda w: w | {name: torch.zeros(2, 2)})
    broken = copied(checkpoint, tmp_path / "broken", dict)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "bare").mkdir()
    for model, message in {
        lacking: f"lacks 1 tensors ({name}, ...), which would be random numbers",
        other: "cannot be loaded: ",
        broken: "cannot be loaded: ",
        tmp_path / "bare": f"the model {tmp_path / 'bare'} cannot be loaded: ",
        tmp_path / "gone": "gone is no checkpoint: no such folder is there. Pass a folder, or a Hub id",
        "gpt": "gpt is no checkpoint: no such folder is there",
        "owner/name": "the model owner/name cannot be loaded: ",  # tests have no network
    }.items():
        code, out, err = told(capsys, "ground", clip, QUESTION, "--model", model)
        assert (code, out) == (2, ""), model
        assert message in err.splitlines()[-1], model
        assert "Traceback" not in err


def test_an_installation_without_its_checkpoint_says_so(capsys, monkeypatch, clip, tmp_path):
    monkeypatch.setattr(ground, "bundled_checkpoint", lambda: str(tmp_path / "gone"))
    assert "no such folder is there. Reinstall the package, or pass --model" in refused(
        capsys, "ground", clip, QUESTION
    )


@pytest.mark.parametrize(
    ("device", "message"), [("tpu9", "is none that torch knows"), ("cuda:99", "is not on this machine")]
)
def test_bad_devices_are_refused(capsys, clip, checkpoint, device, message):
    assert message in refused(capsys, "ground", clip, QUESTION, "--model", checkpoint, "--device", device)


# ---- doctor, convert, push -------------------------------------------------------------------------------------------


def test_doctor_reports_and_fails_only_for_what_is_needed(capsys, monkeypatch, clip):
    monkeypatch.setattr(doctor, "bundled_clip", lambda: clip)
    checks = doctor.diagnose()
    code, out, _ = told(capsys, "doctor")
    needed = [check for check in checks if check.required and check.status != "ok"]
    assert code == bool(needed)
    for check in checks:
        assert f"  {check.name} " in out
        assert check.detail in out
        assert f"-> {check.remedy}" in out or not check.remedy
    broken = doctor.Check("video", "broken", "no decoder works", "pip install --force-reinstall av")
    optional = doctor.Check("ffmpeg", "missing", "not on the path", "install it", required=False)
    monkeypatch.setattr(doctor, "diagnose", lambda: [optional])
    assert told(capsys, "doctor") == (
        0,
        "(missing)  ffmpeg  not on the path\n                   -> install it\n"
        "All that is needed works. In brackets: 1 optional parts that do not.\n",
        "",
    )
    monkeypatch.setattr(doctor, "diagnose", lambda: [optional, broken])
    code, out, _ = told(capsys, "doctor")
    assert (code, out.splitlines()[-1]) == (1, "Not everything that is needed works: video.")


def test_convert_prints_what_became_of_every_tensor(capsys, tmp_path):
    source = write_original(tmp_path / "original", golden_tensors())
    code, out, err = told(capsys, "convert", source, tmp_path / "out", "--dtype", "float16")
    assert code == 0, err
    assert "d2vlm with a phi3 text model" in out
    assert out.splitlines()[-1] == f"written to {tmp_path / 'out'}"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert "already holds files, so nothing was written" in refused(capsys, "convert", source, tmp_path / "out")
    assert told(capsys, "convert", source, tmp_path / "out", "--overwrite")[0] == 0
    build_bpe_tokenizer().save_pretrained(tmp_path / "tokenizer")
    build_wordpiece_qformer_tokenizer().save_pretrained(tmp_path / "qformer")
    tokenizers = ("--tokenizer", tmp_path / "tokenizer", "--qformer-tokenizer", tmp_path / "qformer")
    said = refused(capsys, "convert", source, tmp_path / "new", *tokenizers)
    assert "and config.json at (110, 111): they are not of one checkpoint" in said
    (source / "config.json").write_text("{}")
    assert "config.json" in refused(capsys, "convert", source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own call
def test_push_lists_pushes_and_refuses(capsys, monkeypatch, checkpoint, hub_here, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "pushed")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A checkpoint\n")
    (folder / "LICENSE").write_text("Apache License")
    code, out, err = told(capsys, "push", folder, "me/cli", "--dry-run")
    assert code == 0, err
    assert "model.safetensors" in out
    assert out.splitlines()[-1] == "nothing was sent"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert "there is no token of the Hub" in refused(capsys, "push", folder, "me/cli", code=1)
    monkeypatch.setenv("HF_TOKEN", hub_here.env()["HF_TOKEN"])
    code, out, err = told(capsys, "push", folder, "me/cli")
    assert code == 0, err
    assert out.splitlines()[-1].startswith("pushed as ")
    assert told(capsys, "push", folder, "me/cli")[1].splitlines()[-1].startswith("already there, unchanged: ")
    assert "write 'owner/name'" in refused(capsys, "push", folder, "cli")
    assert "is no folder, so there is nothing to push" in refused(capsys, "push", tmp_path / "gone", "me/cli")


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(clip, tmp_path):
    """Two good rows whose video lies beside them."""
    shutil.copy(clip, tmp_path / "clip.mp4")
    common = {"video": "clip.mp4", "duration": 4.0, "question": "When?", "answer": "At <evi>.", "spans": [[1.0, 2.0]]}
    return [make_row(id=f"row-{k}", **common) for k in range(2)]


def write_rows(path: Path, rows: list) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", ["good.jsonl", "good.json", "good.parquet", "folder", "saved"])
def test_good_data_in_every_form(capsys, monkeypatch, rows, tmp_path, name):
    from datasets import Dataset

    from d2vlm_hf.data.schema import features

    monkeypatch.chdir(tmp_path)  # where datasets looks for the video
    path = tmp_path / name
    if path.suffix == ".parquet":
        Dataset.from_list(rows, features=features()).to_parquet(path)
    elif name == "saved":
        Dataset.from_list(rows, features=features()).save_to_disk(path)
    elif name == "folder":
        path.mkdir()
        shutil.move(tmp_path / "clip.mp4", path)
        write_rows(path / "rows.jsonl", rows)
    else:
        write_rows(path, rows)
    code, out, err = told(capsys, "check-data", path, "--no-videos")
    assert (code, out.splitlines()[-1].startswith("no faults in 2 rows of ")) == (0, True), out + err
    if name in ("good.jsonl", "good.json", "folder"):
        assert told(capsys, "check-data", path)[0] == 0


def test_faults_name_row_column_and_value(capsys, rows, tmp_path):
    rows[0] |= {"spans": [[3.0, 1.0]]}
    rows[1] |= {"id": "row-0", "video": "gone.mp4"}
    del rows[1]["question"]
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with path.open("a") as file:
        file.write("\n{not json\n[1, 2]\n")
    code, out, err = told(capsys, "check-data", path)
    assert code == 1, err
    lines = out.splitlines()
    assert lines[0].startswith("bad.jsonl, line 3, column '*', value '{not json': is no JSON (Expecting property name")
    assert any(
        "(id 'row-0'), column 'spans', value [[3.0, 1.0]]: span 0 [3.0, 1.0] ends before it starts" in s for s in lines
    )
    assert any("column 'question', value missing: the column is missing" in s for s in lines)
    assert any(f"column 'video', value '{tmp_path / 'gone.mp4'}': is not a file" in s for s in lines)
    assert any("column 'id', value 'row-0': row 0 has the same id" in s for s in lines)
    assert any("Row 2, column '*', value [1, 2]: a row must be a mapping" in s for s in lines)
    assert lines[-1] == f"6 faults in 3 rows of {path}"
    code, out, _ = told(capsys, "check-data", path, "--limit", "1", "--no-videos")
    assert (code, out.splitlines()[1:]) == (1, ["... and 4 more", f"5 faults in 3 rows of {path}"])


def test_a_video_that_does_not_tell_its_duration(capsys, rows, tmp_path):
    """Four columns are enough, where the video says how long it is; the other faults of the row are told, too."""
    short = {key: rows[0][key] for key in ("video", "question", "answer", "spans")}
    assert told(capsys, "check-data", write_rows(tmp_path / "short.jsonl", [short]))[0] == 0
    (tmp_path / "broken.mp4").write_text("no video")
    broken = {**short, "video": "broken.mp4", "spans": [[2.0, 1.0]]}
    code, out, _ = told(capsys, "check-data", write_rows(tmp_path / "short.jsonl", [broken]))
    assert code == 1
    assert "Row 0, column 'duration', value missing: " in out
    assert f"{tmp_path / 'broken.mp4'}" in out
    assert "ends before it starts" in out
    assert out.splitlines()[-1].startswith("2 faults in 1 row")


def test_root_of_the_videos(capsys, rows, tmp_path):
    (tmp_path / "data").mkdir()
    rows[1]["video"] = "../../clip.mp4"
    path = write_rows(tmp_path / "data" / "rows.json", rows)
    code, out, _ = told(capsys, "check-data", path, "--root", tmp_path)
    assert code == 1
    assert "Row 1, column 'video', value '../../clip.mp4': the video path '../../clip.mp4' leads out of" in out
    assert len(out.splitlines()) == 3, "and is looked for nowhere; the first row's is found"
    assert "value 'clip.mp4'" not in out


def test_preferences_are_asked_for(capsys, rows, tmp_path):
    said = [{"role": "user", "content": "When?"}]
    pair = {
        "prompt": said,
        "chosen": [{"role": "assistant", "content": "At <evi>."}],
        "rejected": [{"role": "assistant", "content": "At <evi>."}],
        "chosen_spans": [[1.0, 2.0]],
        "rejected_spans": [[2.0, 3.0]],
        "factor": "grounding",
        "perturbation": "shift",
        "edit": "by 1 s",
    }
    good = {key: value for key, value in rows[0].items() if value is not None} | {"id": "good"}
    path = write_rows(tmp_path / "pairs.jsonl", [make_row(preference=True, **good, **pair)])
    assert told(capsys, "check-data", path, "--preference")[0] == 0
    path = write_rows(tmp_path / "plain.jsonl", rows)
    code, out, _ = told(capsys, "check-data", path, "--preference")
    assert code == 1
    assert out.splitlines()[0].startswith("Row 0, column 'rejected', value missing: the column is missing, so this is")


def test_data_that_cannot_be_checked(capsys, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "does not exist: no rows are there to be checked" in refused(capsys, "check-data", tmp_path / "gone.jsonl")
    assert "holds no rows: there is nothing to check" in refused(capsys, "check-data", tmp_path / "empty.jsonl")
    assert "--limit -1 is no number of faults" in refused(capsys, "check-data", "x.jsonl", "--limit", "-1")


def test_shapes_are_generated_and_are_good_data(capsys, tmp_path):
    options = ("--difficulty", "easy", "--split", "test", "--num-videos", "2", "--rows-per-video", "2", "--seed", "3")
    code, out, _ = told(capsys, "shapes", tmp_path / "out", *options)
    assert (code, out) == (0, f"4 rows about 2 videos in {tmp_path / 'out'}\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seed"] == 3
    assert told(capsys, "check-data", tmp_path / "out")[0] == 0
    assert "unbearable" in refused(capsys, "shapes", tmp_path / "new", "--difficulty", "unbearable")
    assert "--num-proc 0 is no number of processes" in refused(capsys, "shapes", tmp_path / "new", "--num-proc", "0")
    assert "holds shapes of another configuration" in refused(capsys, "shapes", tmp_path / "out")


# ---- commands of other modules ---------------------------------------------------------------------------------------


@pytest.fixture
def worker(monkeypatch):
    """A stand-in for the module behind `d2vlm sft`."""
    module = ModuleType("d2vlm_hf.training.run")
    module.__spec__ = ModuleSpec("d2vlm_hf.training.run", None)
    module.calls = []
    module.main = module.calls.append
    monkeypatch.setitem(sys.modules, "d2vlm_hf.training.run", module)
    return module


def test_arguments_are_handed_on_untouched(capsys, worker, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("seed: 1\n")
    rest = ["--config", str(config), "--debug", "overflow", "--learning_rate", "-1e-3", "--", "x"]
    assert told(capsys, "sft", *rest) == (0, "", "")
    assert told(capsys, "sft", f"--config={config}", "--help") == (0, "", "")
    assert worker.calls == [rest, ["--config", str(config), "--help"]]


def test_configurations_that_are_not_there_are_refused_at_once(capsys, worker):
    assert refused(capsys, "sft", "--config", "gone.yaml").startswith("the configuration gone.yaml is not there")
    assert refused(capsys, "sft", "--config") == (
        "--config needs the path of a YAML file behind it. Write --config FILE.yaml."
    )
    assert worker.calls == []


def test_failures_of_other_modules(capsys, monkeypatch, worker, tmp_path):
    monkeypatch.setattr(worker, "main", lambda argv: 1)
    assert told(capsys, "sft") == (1, "", "")

    def stop(argv):
        raise SystemExit(2)

    monkeypatch.setattr(worker, "main", stop)
    assert told(capsys, "sft")[0] == 2


def test_a_real_run_refuses_unknown_keys_and_broken_yaml(capsys, tmp_path):
    (tmp_path / "unknown.yaml").write_text(
        f"model_name_or_path: gone\ndataset: gone\noutput_dir: {tmp_path / 'out'}\nlearning_rat: 1\n"
    )
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: {")
    assert "learning_rat" in refused(capsys, "sft", "--config", tmp_path / "unknown.yaml")
    said = refused(capsys, "sft", "--config", tmp_path / "broken.yaml")
    assert said.startswith(f"the configuration {tmp_path / 'broken.yaml'} is no YAML: ")
    assert not (tmp_path / "out").exists()
