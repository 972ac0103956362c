# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A web page that answers questions about videos: every moment it names can be clicked and is played.

As a Space, `app.py` is `from d2vlm_hf.demo import main; main(["--model", "owner/name"])`.
"""

import argparse
import re
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .commands.ground import DTYPES, Inquiry, ask, demonstration, draw, load_pipeline
from .figures import PALETTE
from .model.answers_d2vlm import format_span
from .model.pipeline_d2vlm import VideoGroundingPipeline


if TYPE_CHECKING:
    from gradio import Blocks
    from PIL.Image import Image


TITLE = "When does it happen in the video?"
HINT = '<p class="none">The answer and the moments that it rests on will be here.</p>'
NO_EVENT = "#9a9a9a"  # of a moment that is named in the answer and belongs to no evidence
KEPT = (3600, 86400)  # seconds: how often uploads and pictures are looked through, and how old they may become
_TIME = r"(?:(\d+):)?(\d+(?:\.\d+)?)\s*s?"
_MOMENT = re.compile(rf"\s*{_TIME}\s*(?:-|–|to)\s*{_TIME}\s*")

# The player is looked for where the page is: a Space that is embedded in another page lives in a shadow tree of it.
SEEK = """
element.addEventListener("click", (event) => {
    const moment = event.target.closest("[data-start]");
    const video = element.getRootNode().querySelector("#d2vlm-player video");
    if (!moment || !video) return;
    const start = Number(moment.dataset.start), end = Number(moment.dataset.end);
    video.removeEventListener("timeupdate", element.watch);
    element.watch = () => {
        const there = video.currentTime;
        if (there > start - 0.5 && there < end) return;
        video.removeEventListener("timeupdate", element.watch);
        if (there >= end && there < end + 1) video.pause();
    };
    video.currentTime = start;
    video.addEventListener("seeked", () => video.addEventListener("timeupdate", element.watch), { once: true });
    video.play();
    video.scrollIntoView({ block: "nearest", behavior: "smooth" });
});
"""
STYLE = """
.answer { font-size: 1.15em; line-height: 1.7; margin: 0 0 1em; }
.label { font-size: 0.85em; opacity: 0.7; margin: 0 0 0.3em; }
.none { opacity: 0.7; }
.error { border-left: 4px solid #D55E00; padding: 0.6em 1em; background: #D55E0020; overflow-wrap: anywhere; }
.moments { list-style: none; margin: 0; padding: 0; max-height: 22em; overflow-y: auto; }
.moments li { margin: 0 0 0.4em; }
button { font: inherit; color: inherit; border: 0; cursor: pointer; }
button { background: color-mix(in srgb, var(--event) 35%, transparent); }
button:hover, button:focus-visible { background: color-mix(in srgb, var(--event) 60%, transparent); }
.answer button { border-radius: 4px; padding: 0 0.3em; }
.moments button { border-radius: 6px; padding: 0.4em 0.8em; width: 100%; text-align: left; display: flex; gap: 1em; }
.number { font-weight: bold; }
.score { margin-left: auto; }
"""


# ---- what is asked ---------------------------------------------------------------------------------------------------


def parse_moments(text: str) -> list[list[float]]:
    """Moments as people write them.

    Args:
        text (`str`): As `"4.5 - 7, 1:02 - 1:10"`: seconds, or minutes and seconds; nothing where none is given.

    Returns:
        `list[[start, end]]`: In seconds.

    Raises:
        ValueError: If a part of it is no moment.
    """
    moments = []
    for part in filter(str.strip, re.split(r"[,;\n]", text)):
        found = _MOMENT.fullmatch(part)
        if found is None:
            raise ValueError(
                f"'{part.strip()}' is no moment of a video: it needs a start and an end. Write seconds or minutes and "
                "seconds, as in 4.5 - 7, and a comma between two moments."
            )
        times = found.groups()
        moments.append([60 * int(minutes or 0) + float(seconds) for minutes, seconds in (times[:2], times[2:])])
    return moments


def make_inquiry(video: str | None, question: str, moments: str = "") -> Inquiry:
    """Check what can be said in the words of the page; the pipeline checks the rest.

    Args:
        video (`str`, *optional*): Path of the file.
        question (`str`): With one `<evi>` for each given moment.
        moments (`str`, *optional*): See [`parse_moments`].

    Raises:
        ValueError: If video or question is missing, or question and moments do not match.
    """
    if not video:
        raise ValueError("There is no video yet. Upload one, or click the example.")
    if not question.strip():
        raise ValueError("There is no question yet. Write one, such as 'When does the red circle appear?'")
    spans = parse_moments(moments)
    if question.count("<evi>") != len(spans):
        raise ValueError(
            f"<evi> in the question: {question.count('<evi>')}, given moments: {len(spans)}. Each <evi> stands for one "
            "moment: write as many moments as <evi>, or neither."
        )
    return Inquiry(video, question.strip(), spans)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    """Text as HTML that shows it, whatever is in it; braces and dollar signs would be read by Gradio's templates."""
    shown = escape(text)
    for sign in "{}$":
        shown = shown.replace(sign, f"&#{ord(sign)};")
    return shown


def _button(entry: Mapping[str, Any], event: int | None, inner: str) -> str:
    """Something to click that names one moment."""
    colour = NO_EVENT if event is None else PALETTE[event % len(PALETTE)]
    span = format_span(entry["start"], entry["end"])
    return (
        f'<button type="button" data-start="{entry["start"]}" data-end="{entry["end"]}" style="--event: {colour}" '
        f'title="Play {span}">{inner}</button>'
    )


def show_result(result: Mapping[str, Any]) -> str:
    """The answer and its evidence as HTML, each moment a button that plays it.

    Args:
        result (`dict`): One result of the pipeline.

    Returns:
        `str`: HTML; text of the model is escaped.
    """
    answer, pieces, position = result["answer"], [], 0
    for reference in sorted(result["references"], key=lambda reference: reference["char_start"]):
        start, end = reference["char_start"], reference["char_end"]
        pieces += [_text(answer[position:start]), _button(reference, reference["evidence"], _text(answer[start:end]))]
        position = end
    pieces.append(_text(answer[position:]))
    shown = "".join(pieces) if answer.strip() else '<span class="none">The answer is empty.</span>'
    rows = [
        f'<span class="number">{number + 1}</span><span>{format_span(entry["start"], entry["end"])}</span>'
        f'<span class="score">score {entry["score"]:.2f}</span>'
        for number, entry in enumerate(result["evidence"])
    ]
    listed = "".join(f"<li>{_button(result['evidence'][k], k, row)}</li>" for k, row in enumerate(rows))
    evidence = f'<ol class="moments">{listed}</ol>' if rows else '<p class="none">No moment of the video was found.</p>'
    return f'<p class="label">Answer</p><p class="answer">{shown}</p><p class="label">Evidence</p>{evidence}'


def show_error(message: str) -> str:
    """What was wrong, as HTML."""
    return f'<div class="error" role="alert">{_text(message)}</div>'


def _picture(inquiry: Inquiry, result: Mapping[str, Any]) -> "Image":
    """The timeline."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.png"
        draw(inquiry, result, path)
        with Image.open(path) as picture:
            return picture.convert("RGB")


def answer(
    pipe: VideoGroundingPipeline, video: str | None, question: str, moments: str = ""
) -> tuple[str, "Image | None"]:
    """Answer one request of the page.

    Args:
        pipe (`VideoGroundingPipeline`): The model.
        video (`str`, *optional*): Path of the file.
        question (`str`): With one `<evi>` for each given moment.
        moments (`str`, *optional*): See [`parse_moments`].

    Returns:
        HTML and the timeline; for a request that cannot be answered, HTML that says why and `None`.
    """
    try:
        inquiry = make_inquiry(video, question, moments)
        result = ask(pipe, inquiry)
        return show_result(result), _picture(inquiry, result)
    except ValueError as error:
        # where the server keeps uploads says nothing to the person who has uploaded one
        return show_error(str(error).replace(str(video), Path(str(video)).name)), None


# ---- the page --------------------------------------------------------------------------------------------------------


def _import_gradio() -> ModuleType:
    """Gradio, and a look at whether the picture of every answer can be drawn."""
    import gradio
    import matplotlib  # noqa: F401

    return gradio


def build_demo(pipe: VideoGroundingPipeline) -> "Blocks":
    """The page, to be launched: `build_demo(pipeline("video-grounding", model=...)).launch()`.

    Args:
        pipe (`VideoGroundingPipeline`): The model; one request at a time goes through it.

    Returns:
        `gradio.Blocks`: Without analytics; files older than a day are deleted.

    Raises:
        ModuleNotFoundError: If gradio, or matplotlib for the timeline, is not installed.
    """
    gr, example = _import_gradio(), demonstration()
    with gr.Blocks(analytics_enabled=False, title=TITLE, delete_cache=KEPT) as page:
        gr.Markdown(f"# {TITLE}\nAsk about a video, and click a moment of the answer to play it.")
        with gr.Row():
            with gr.Column():
                video = gr.Video(label="Video", sources=["upload"], elem_id="d2vlm-player", height=320)
                question = gr.Textbox(
                    label="Question", placeholder=example.question, lines=1, max_lines=4, elem_id="d2vlm-question"
                )
                with gr.Accordion("Ask about a given moment", open=False):
                    moments = gr.Textbox(
                        label="Given moments",
                        info="One for each <evi> in the question, as in: What happens in <evi>?",
                        placeholder="4.5 - 7, 1:02 - 1:10",
                        elem_id="d2vlm-moments",
                    )
                button = gr.Button("Ask", variant="primary", elem_id="d2vlm-ask")
            with gr.Column():
                told = gr.HTML(
                    HINT,
                    css_template=STYLE,
                    js_on_load=SEEK,
                    elem_id="d2vlm-answer",
                    min_height=120,
                )
        timeline = gr.Image(
            label="Timeline",
            show_label=False,
            alt_text="Frames, found moments and similarity over the time of the video",
            format="png",
            interactive=False,
            visible=False,
            buttons=["download", "fullscreen"],
            elem_id="d2vlm-timeline",
        )
        gr.Examples([[example.video, example.question]], [video, question], label="Example", cache_examples=False)

        nothing = HINT, gr.update(value=None, visible=False)
        answered = gr.State()  # the video that was asked about

        def respond(video: str | None, question: str, moments: str) -> tuple[str, dict[str, Any], str | None]:
            html, picture = answer(pipe, video, question or "", moments or "")
            return html, gr.update(value=picture, visible=picture is not None), video

        def clear_if_other(video: str | None, answered: str | None) -> tuple[Any, Any]:
            return (gr.skip(), gr.skip()) if video == answered else nothing

        shown, quietly = [told, timeline], {"show_progress": "hidden", "api_visibility": "private"}
        ask_triggers = [button.click, question.submit]
        asked = gr.on(ask_triggers, respond, [video, question, moments], [*shown, answered], api_name="ask")
        # the moments of an answer belong to its video, which may be replaced while the model looks at it
        asked.then(clear_if_other, [video, answered], shown, **quietly)
        video.change(clear_if_other, [video, answered], shown, **quietly)
    return page


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as `d2vlm` does."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (`{self.prog} --help` shows what there is)")


def main(argv: Sequence[str] | None = None) -> int:
    """Load a model and serve the page until Ctrl-C.

    Args:
        argv (sequence of `str`, *optional*): Arguments, by default those of the process.

    Returns:
        `int`: The exit code.

    Raises:
        ValueError: If an argument is unknown, or the checkpoint cannot be loaded.
    """
    description = "Serve a web page that answers questions about videos."
    parser = _Parser(prog="d2vlm demo", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="folder or Hub id (default: the checkpoint that ships with the package)")
    add("--device", help="as cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, help="default: as the checkpoint says")
    add("--host", help="address to serve at; 0.0.0.0 lets other machines in (default: 127.0.0.1)")
    add("--port", type=int, help="default: the first free one from 7860")
    arguments = parser.parse_args(argv)
    _import_gradio()  # what is missing is said before a model is loaded
    pipe = load_pipeline(arguments.model, arguments.device, arguments.dtype)
    build_demo(pipe).launch(server_name=arguments.host, server_port=arguments.port)
    return 0


if __name__ == "__main__":
    main()


__all__ = ["answer", "build_demo", "main", "make_inquiry", "parse_moments", "show_error", "show_result"]
