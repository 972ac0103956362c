# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The web page: what it asks of the pipeline and shows of its answers, and once in a real browser."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import video_files
from browser import CHROMIUM, DRIVER, Browser
from PIL import Image
from test_cli import script
from tiny_processor import model_for, tiny_processor

from d2vlm_hf import bundled_clip, cli, demo
from d2vlm_hf.figures import PALETTE
from d2vlm_hf.model.pipeline_d2vlm import VideoGroundingPipeline, save_checkpoint


pytest.importorskip("gradio", reason="the page needs gradio, which is not installed: pip install 'd2vlm-hf[demo]'")

QUESTION = "When does the man open the door?"
RESULT = {
    "answer": "At 1.0s - 2.5s, <b>then</b> {{7}} ${8}, 4.0s - 5.0s.",
    "evidence": [{"start": 1.0, "end": 2.5, "score": 0.934}],
    "references": [
        {"start": 4.0, "end": 5.0, "score": 0.5, "char_start": 40, "char_end": 51, "evidence": None},
        {"start": 1.0, "end": 2.5, "score": 0.9, "char_start": 3, "char_end": 14, "evidence": 0},
    ],
    "duration": 11.0,
}


@pytest.fixture(scope="module")
def pipe():
    """A tiny model that finds two moments in the bundled clip, neither at its start, and names one in the answer."""
    processor = tiny_processor()
    model = model_for(processor, seed=2, evidence_threshold=0.95)
    model.generation_config.sequence_bias = script(processor, 2)
    return VideoGroundingPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def expected(pipe):
    """The answer to `QUESTION` about the bundled clip, without the page."""
    result = pipe(bundled_clip(), question=QUESTION)
    assert len(result["evidence"]) == 2
    assert all(moment["start"] > 1 for moment in result["evidence"])
    return result


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "moments"),
    [
        ("", []),
        (" \n", []),
        ("4.5 - 7", [[4.5, 7.0]]),
        ("4.5s-7s, 1:02 – 1:10.5;", [[4.5, 7.0], [62.0, 70.5]]),
        ("0 to 3\n5 to 6", [[0.0, 3.0], [5.0, 6.0]]),
    ],
)
def test_moments_are_read_as_people_write_them(text, moments):
    assert demo.parse_moments(text) == moments


@pytest.mark.parametrize("text", ["4.5", "4 - ", "-4 - 5", "1 - 2 - 3", "one - two", "4 - 5, nan - 6"])
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(ValueError, match="is no moment of a video: it needs a start and an end"):
        demo.parse_moments(text)


def test_an_inquiry_has_the_given_moments():
    inquiry = demo.make_inquiry("clip.mp4", " What happens in <evi>? ", "1 - 2")
    assert inquiry.question == "What happens in <evi>?"
    assert inquiry.question_spans == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, QUESTION), "There is no video yet. Upload one"),
        (("", QUESTION), "There is no video yet. Upload one"),
        (("clip.mp4", " \n"), "There is no question yet. Write one"),
        (
            ("clip.mp4", "What happens in <evi>?"),
            "<evi> in the question: 1, given moments: 0. Each <evi> stands for one moment",
        ),
        (
            ("clip.mp4", QUESTION, "1 - 2"),
            "<evi> in the question: 0, given moments: 1. Each <evi> stands for one moment",
        ),
    ],
)
def test_what_is_missing_is_said_in_words_of_the_page(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        demo.make_inquiry(*arguments)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def buttons(html: str) -> list[tuple[str, ...]]:
    """Start, end, colour and content of everything that can be clicked."""
    found = re.findall(r'<button [^>]*data-start="(.*?)" data-end="(.*?)" style="--event: (.*?)"[^>]*>(.*?)</b', html)
    return [(*values[:3], re.sub("<.*?>", " ", values[3]).strip()) for values in found]


def test_every_moment_of_a_result_can_be_clicked():
    html = demo.show_result(RESULT)
    assert buttons(html) == [
        ("1.0", "2.5", PALETTE[0], "1.0s - 2.5s"),
        ("4.0", "5.0", demo.NO_EVENT, "4.0s - 5.0s"),
        ("1.0", "2.5", PALETTE[0], "1  1.0s - 2.5s  score 0.93"),
    ]


def test_text_of_the_model_is_shown_and_not_run():
    html = demo.show_result(RESULT)
    assert "&lt;b&gt;then&lt;/b&gt; &#123;&#123;7&#125;&#125; &#36;&#123;8&#125;, " in html
    assert not re.search(r"[{}$]|<b>", html)
    assert demo.show_error("the <script> of ${x}").endswith(">the &lt;script&gt; of &#36;&#123;x&#125;</div>")


def test_nothing_found_is_said():
    html = demo.show_result({"answer": " ", "evidence": [], "references": []})
    assert "The answer is empty." in html
    assert "No moment of the video was found." in html
    assert buttons(html) == []


def test_an_answer_comes_with_its_picture(pipe, expected):
    html, picture = demo.answer(pipe, bundled_clip(), QUESTION)
    assert html == demo.show_result(expected)
    assert picture.width == 1200
    assert picture.height > 300


def test_a_given_moment_reaches_the_model(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "ask", lambda pipe, inquiry: asked.append(inquiry) or {**RESULT, "curves": None})
    demo.answer(pipe, bundled_clip(), "What happens in <evi>?", "2 - 4")
    monkeypatch.undo()
    assert asked[0].question_spans == [[2.0, 4.0]]
    assert buttons(demo.answer(pipe, bundled_clip(), "What happens in <evi>?", "2 - 4")[0])


def test_a_refusal_is_shown_and_the_next_request_is_answered(pipe, expected, tmp_path):
    notes = tmp_path / "notes.mp4"
    notes.write_text("no video")
    requests = [
        (None, QUESTION, "", "There is no video yet"),
        (str(notes), QUESTION, "", "notes.mp4"),
        (bundled_clip(), "Where is <video>?", "", "holds &lt;video&gt;"),
        (bundled_clip(), "What happens in <evi>?", "5 - 2", "5.0"),
        (bundled_clip(), "What happens in <evi>?", "5 - 200", "200"),
        (video_files.write_video(tmp_path / "short.mp4", 10), QUESTION, "", ""),
    ]
    for video, question, moments, told in requests[:-1]:
        html, picture = demo.answer(pipe, video, question, moments)
        assert 'class="error"' in html
        assert told in html
        assert str(tmp_path) not in html
        assert picture is None
    assert 'class="error"' not in demo.answer(pipe, *requests[-1][:3])[0]
    assert demo.answer(pipe, bundled_clip(), QUESTION)[0] == demo.show_result(expected)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """What `main` would have served."""
    import gradio

    seen = SimpleNamespace(loaded=[], launched=[])
    monkeypatch.setattr(demo, "load_pipeline", lambda *arguments: seen.loaded.append(arguments))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda page, **options: seen.launched.append(options))
    return seen


def test_the_command_serves_any_checkpoint(launched):
    options = ["--model", "me/mine", "--device", "cpu", "--dtype", "float32", "--host", "0.0.0.0", "--port", "7999"]
    assert cli.main(["demo", *options]) == 0
    assert launched.loaded == [("me/mine", "cpu", "float32")]
    assert launched.launched == [{"server_name": "0.0.0.0", "server_port": 7999}]


def test_a_space_calls_main_without_arguments_of_its_own(launched):
    assert demo.main([]) == 0
    assert launched.loaded == [(None, None, None)]  # the bundled checkpoint
    assert launched.launched == [{"server_name": None, "server_port": None}]  # where Gradio's environment says


def test_the_command_explains_itself_and_refuses_in_one_line(launched, capsys, monkeypatch):
    assert cli.main(["demo", "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: d2vlm demo")
    assert "--model" in out
    assert err == ""
    assert cli.main(["demo", "--modle", "x"]) == 2
    told = "d2vlm: error: unrecognized arguments: --modle x (`d2vlm demo --help` shows what there is)\n"
    assert capsys.readouterr().err == told
    assert launched.loaded == []

    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo"]) == 1
    assert "this needs gradio, which is not installed. Run: pip install 'd2vlm-hf[demo]'" in capsys.readouterr().err
    assert launched.loaded == []


def test_a_missing_checkpoint_is_refused(capsys, tmp_path):
    assert cli.main(["demo", "--model", str(tmp_path / "gone")]) == 2
    assert "gone is no checkpoint: no such folder is there" in capsys.readouterr().err


def test_neither_the_package_nor_the_module_of_the_page_loads_gradio():
    code = "import sys, d2vlm_hf, d2vlm_hf.demo; print({'gradio', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_sends_nothing_home(pipe):
    page = demo.build_demo(pipe)
    assert page.analytics_enabled is False
    assert page.title == demo.TITLE


PLAYER, ANSWER = "#d2vlm-player video", "#d2vlm-answer"


def playing(browser: Browser) -> tuple[float, bool]:
    """Where the player stands, and whether it has stopped."""
    now, paused = browser.run(f"const v = document.querySelector('{PLAYER}'); return [v.currentTime, v.paused]")
    return now, paused


@pytest.fixture
def served(pipe, tmp_path, monkeypatch):
    """Address of the page of a saved and loaded checkpoint, as `d2vlm demo` serves it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    save_checkpoint(tmp_path / "checkpoint", pipe.model, pipe.processor)
    page = demo.build_demo(demo.load_pipeline(str(tmp_path / "checkpoint"), "cpu"))
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield url
    page.close(verbose=False)


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver")
def test_in_a_browser(served, expected, tmp_path):
    first, second = expected["evidence"]
    named = expected["references"][0]
    with Browser(tmp_path / "profile") as browser:
        browser.go(served)

        # nothing to look at yet: a message, not a broken page
        browser.click("#d2vlm-ask")
        browser.until(lambda: "There is no video yet" in browser.text(ANSWER))

        # a file that is no video, then the example, which takes the message away
        (tmp_path / "notes.mp4").write_text("no video")
        browser.type("#d2vlm-player input[type=file]", str(tmp_path / "notes.mp4"), clear=False)
        browser.until(lambda: browser.has(PLAYER))
        browser.type("#d2vlm-question textarea", QUESTION)
        browser.click("#d2vlm-ask")
        browser.until(lambda: "notes.mp4" in browser.text(f"{ANSWER} .error"))
        assert str(tmp_path) not in browser.text(ANSWER)
        browser.errors()  # the player has complained about the file, as it should
        browser.click("tbody tr")
        browser.until(lambda: browser.run(f"return document.querySelector('{PLAYER}')?.duration > 10"))
        browser.until(lambda: "The answer and the moments" in browser.text(ANSWER))
        asked = "return document.querySelector('#d2vlm-question textarea').value"
        browser.until(lambda: browser.run(asked) == "When does the red circle appear?")

        # a question, its answer, its picture
        browser.type("#d2vlm-question textarea", QUESTION)
        browser.click("#d2vlm-ask")
        browser.until(lambda: browser.has(f"{ANSWER} .moments"))
        assert browser.text(f"{ANSWER} .answer") == " ".join(expected["answer"].split())
        times = f"{first['start']:.1f}s - {first['end']:.1f}s"
        assert browser.text(f"{ANSWER} .moments li") == f"1 {times} score {first['score']:.2f}"
        browser.until(lambda: browser.run("return document.querySelector('#d2vlm-timeline img')?.naturalWidth") == 1200)
        assert playing(browser) == (0, True)

        # a click on a moment plays it and stops at its end; so does one in the answer
        browser.click(f"{ANSWER} .moments li:nth-child(2) button")
        browser.until(lambda: playing(browser)[0] >= second["start"])
        browser.screenshot(tmp_path / "page.png")
        browser.until(lambda: playing(browser)[1])
        assert second["end"] <= playing(browser)[0] < second["end"] + 1
        browser.click(f"{ANSWER} .answer button")
        browser.until(lambda: named["start"] <= playing(browser)[0] < named["end"] + 1)

        # no word about it to another machine, and no complaint
        loaded = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert [address for address in loaded if not address.startswith((served, f"blob:{served}"))] == []
        assert browser.errors() == []
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 50
