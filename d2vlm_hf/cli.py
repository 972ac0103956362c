# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The command `d2vlm`. Arguments are read before anything large is imported; errors are one line.

Exit codes: 0, 1 for a fault that was found or a failure, 2 for what cannot be done as asked, 130 after Ctrl-C.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import TracebackType


OK, FAILED, REFUSED, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
STATUS_AFTER = 2.0  # seconds before something says what it is doing
MESSAGE_LIMIT = 1500  # characters; libraries have written whole lists of tensors into theirs

# Commands whose arguments are read by the module that does the work: command -> module, its help.
FORWARDED = {
    "sft": ("training.run", "train a model: --config FILE.yaml [--option value ...]"),
    "fpo": ("training.run_fpo", "train on preferences: --config FILE.yaml [--option value ...]"),
    "make-preferences": ("data.build", "make preference data: --config FILE.yaml [--option value ...]"),
    "evaluate": ("evaluation.run", "evaluate a model: --config FILE.yaml [--option value ...]"),
    "demo": ("demo", "serve a web page that answers questions about videos"),
}
# Optional packages -> the extra that installs them.
EXTRAS = {
    **dict.fromkeys(("trl", "peft", "datasets"), "train"),
    **dict.fromkeys(("pycocoevalcap", "sentence_transformers", "matplotlib"), "eval"),
    "gradio": "demo",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:
        self.exit(REFUSED, f"d2vlm: error: {message} (`{self.prog} --help` shows what there is)\n")


class _Border:
    """Between program and person: whatever comes through ends the program with one line and an exit code."""

    def __init__(self) -> None:
        self.code, self.debug = OK, False

    def __enter__(self) -> "_Border":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, BrokenPipeError) or _stdout_is_broken():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
            self.code = PIPE_CLOSED
        elif isinstance(error, KeyboardInterrupt):
            self.code = INTERRUPTED
        elif isinstance(error, SystemExit) and not isinstance(error.code, str):
            self.code = error.code or OK
        elif error is not None:
            refused = isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | NotADirectoryError)
            self.code = REFUSED if refused else FAILED
            if self.debug:
                traceback.print_exception(error)
            print(f"d2vlm: error: {_in_one_line(error)}", file=sys.stderr)
        return True


def _stdout_is_broken() -> bool:
    """Whether the reader of our output has gone, as `head` does."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _in_one_line(error: BaseException) -> str:
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in EXTRAS:
        return f"this needs {package}, which is not installed. Run: pip install 'd2vlm-hf[{EXTRAS[package]}]'"
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | RuntimeError | ImportError | SystemExit) or not text:
        text = f"{type(error).__name__}{text and ': '}{text} (`d2vlm --debug ...` shows where)"
    return text if len(text) <= MESSAGE_LIMIT else f"{text[:MESSAGE_LIMIT]} ... (`d2vlm --debug ...` shows the rest)"


@contextmanager
def _status(doing: str) -> Iterator[None]:
    """A line on standard error if something takes longer than two seconds."""
    timer = threading.Timer(STATUS_AFTER, lambda: print(f"d2vlm: {doing} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _exists(module: str) -> bool:
    return importlib.util.find_spec(f"{__package__}.{module}") is not None


# ---- arguments -------------------------------------------------------------------------------------------------------


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="d2vlm", description="Find out when it happens in the video.", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    _add_ground(command("ground", _ground, "ask a question about a video: the answer, and when"))
    _add_convert(command("convert", _convert, "convert a checkpoint of the authors, or of E.T. Chat, into this format"))
    command("doctor", _doctor, "say what works on this machine and what would add the rest")
    _add_check_data(command("check-data", _check_data, "list row, column and value of every fault in a data file"))
    _add_shapes(command("shapes", _shapes, "generate videos of moving shapes with exact annotations"))
    for name, (module, text) in FORWARDED.items():
        if _exists(module):
            commands.add_parser(name, help=text, add_help=False)
    _add_push(command("push", _push, "push a checkpoint folder to the Hub in one commit"))
    return parser


def _add_ground(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("video", nargs="?", metavar="VIDEO", help="path or URL of a video, or a folder of frames (with --video-fps)")
    add("question", nargs="?", metavar="QUESTION", help="what is asked, with one <evi> for each --question-span")
    add("--demo", action="store_true", help="take the clip and the question that ship with the package")
    span = {"nargs": 2, "type": float, "metavar": ("START", "END"), "action": "append", "default": []}
    add("--question-span", **span, help="seconds of a moment that <evi> names in the question; may be repeated")
    add("--model", metavar="DIR_OR_ID", help="folder or Hub id (default: the checkpoint that ships with the package)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--figure", metavar="FILE.png", help="write a timeline picture: .png, .svg or .pdf")
    add("--device", help="as cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: as the checkpoint says")
    add("--fps", type=float, help="frames per second that the model looks at (default: as it was trained)")
    add("--max-frames", type=int, metavar="N", help="look at N evenly spaced frames of longer videos")
    add("--max-new-tokens", type=int, metavar="N", help="length of the answer at most (default: 256)")
    add("--min-score", type=float, metavar="P", help="leave out evidence with a lower score, 0 to 1")
    add("--video-fps", type=float, metavar="F", help="frames per second of a folder of frames")
    add("--stream", action="store_true", help="print the answer while it is written")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="folder or Hub id of the original")
    add("target", metavar="DST", help="folder to write")
    add("--tokenizer", metavar="DIR_OR_ID", help="tokenizer of the text model (default: the original's own)")
    add("--qformer-tokenizer", metavar="DIR_OR_ID", help="of the Q-Former (default: qformer_vocab.txt of the original)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: as stored)")
    add("--base-model", metavar="DIR_OR_ID", help="what an adapter was trained on (default: what it names)")
    add("--overwrite", action="store_true", help="replace a model in DST")


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", help=".jsonl, .json, .parquet, or a folder of rows")
    add("--preference", action="store_true", help="every row must be a preference row")
    add("--root", metavar="DIR", help="folder that relative paths of videos start from (default: the file's)")
    add("--limit", type=int, metavar="N", help="print at most N faults")
    add("--no-videos", action="store_true", help="do not look whether the videos are there")


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write; a run that was stopped goes on")
    add("--difficulty", default="middle", help="easy, middle or hard (default: middle)")
    add("--split", default="train", help="train, validation, test or heldout (default: train)")
    add("--num-videos", type=int, default=100, metavar="N", help="default: 100")
    add("--rows-per-video", type=int, default=4, metavar="N", help="questions about each at most (default: 4)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--num-proc", type=int, default=1, metavar="N", help="processes (default: 1)")


def _add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help="checkpoint folder")
    add("repo", metavar="REPO", help="owner/name; made if there is none")
    add("--private", action="store_true", help="a new repository is private")
    add("--revision", metavar="BRANCH", help="default: main")
    add("--force", action="store_true", help="overwrite what this folder does not know")
    add("--dry-run", action="store_true", help="only check the folder and list its files")


# ---- commands --------------------------------------------------------------------------------------------------------


def _ground(arguments: argparse.Namespace) -> int:
    _check_ground(arguments)
    figure = _figure_of(arguments)
    with _status("loading"):
        from .commands import ground
        from .figures import check_path

        if figure is not None:
            check_path(figure)
        inquiry = (
            ground.demonstration()
            if arguments.demo
            else ground.Inquiry(
                arguments.video, arguments.question, arguments.question_span, video_fps=arguments.video_fps
            )
        )
        pipeline = ground.load_pipeline(arguments.model, arguments.device, arguments.dtype)
    names = ("fps", "max_frames", "max_new_tokens", "min_score")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    with _status(f"looking at {inquiry.video}"):
        result = ground.ask(pipeline, inquiry, stream=arguments.stream, **options)
    if arguments.json:
        print(ground.as_json(inquiry, result))
    else:
        print(*ground.as_lines(inquiry, result, with_answer=not arguments.stream), sep="\n", flush=True)
    if figure is not None:
        with _status("drawing"):
            ground.draw(inquiry, result, figure)
        print(f"Timeline  {figure}", file=sys.stderr if arguments.json else sys.stdout)
    return OK


def _figure_of(arguments: argparse.Namespace) -> str | None:
    """Where to write the picture, if one is wanted and can be drawn."""
    figure = arguments.figure or ("demo_timeline.png" if arguments.demo else None)
    if figure is None or importlib.util.find_spec("matplotlib") is not None:
        return figure
    missing = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    if arguments.figure:
        raise missing
    print(f"d2vlm: no picture is drawn: {_in_one_line(missing)}", file=sys.stderr)
    return None


def _check_ground(arguments: argparse.Namespace) -> None:
    """What can be said before a model is loaded."""
    given = [name for name in ("video", "question", "question_span", "video_fps") if getattr(arguments, name)]
    if arguments.demo and given:
        raise ValueError(f"--demo brings its own video and question, but {given[0]} was given. Leave one of them out.")
    if not arguments.demo and arguments.question is None:
        missing = "VIDEO and QUESTION are" if arguments.video is None else "QUESTION is"
        raise ValueError(f"{missing} missing: there is nothing to find. Write d2vlm ground VIDEO QUESTION, or --demo.")
    if arguments.json and arguments.stream:
        raise ValueError("--stream prints words as they come and --json one object at the end. Leave one of them out.")
    if not arguments.demo and "://" not in arguments.video and not os.path.exists(arguments.video):
        raise ValueError(
            f"{arguments.video} does not exist: no video file is there. Check the path (now in {Path.cwd()})."
        )


def _convert(arguments: argparse.Namespace) -> int:
    with _status("converting"):
        from .hub.convert import convert_checkpoint

        report = convert_checkpoint(
            arguments.source,
            arguments.target,
            tokenizer=arguments.tokenizer,
            qformer_tokenizer=arguments.qformer_tokenizer,
            dtype=arguments.dtype,
            base_model=arguments.base_model,
            overwrite=arguments.overwrite,
        )
    print(report)
    print(f"written to {arguments.target}")
    return OK


def _doctor(arguments: argparse.Namespace) -> int:
    with _status("looking at the packages and decoding a clip"):
        from .doctor import diagnose

        checks = diagnose()
    width = max(len(check.name) for check in checks)
    for check in checks:
        kind = check.status if check.status == "ok" or check.required else f"({check.status})"
        print(f"{kind:<9}  {check.name:<{width}}  {check.detail}")
        if check.remedy:
            print(f"{'':<9}  {'':<{width}}  -> {check.remedy}")
    broken = [check.name for check in checks if check.status != "ok" and check.required]
    optional = sum(check.status != "ok" and not check.required for check in checks)
    if broken:
        print(f"Not everything that is needed works: {', '.join(broken)}.")
        return FAILED
    print("All that is needed works." + (f" In brackets: {optional} optional parts that do not." if optional else ""))
    return OK


def _check_data(arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and arguments.limit < 0:
        raise ValueError(f"--limit {arguments.limit} is no number of faults. Use 0 or more.")
    with _status(f"checking {arguments.file}"):
        from .commands.check_data import check_data

        count, faults = check_data(arguments.file, arguments.preference, arguments.root, not arguments.no_videos)
    shown = faults[: arguments.limit]
    for fault in shown:
        print(" ".join(f"{fault.row}, column '{fault.column}', value {fault.value}: {fault.message}".split()))
    if len(shown) < len(faults):
        print(f"... and {len(faults) - len(shown)} more")
    print(f"{len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'} in {count} rows of {arguments.file}")
    return FAILED if faults else OK


def _shapes(arguments: argparse.Namespace) -> int:
    with _status("generating"):
        from .data.shapes import ShapesConfig, generate, load_rows

        if arguments.num_proc < 1:
            raise ValueError(f"--num-proc {arguments.num_proc} is no number of processes. Use 1 or more.")
        names = ("difficulty", "split", "num_videos", "rows_per_video", "seed")
        config = ShapesConfig(**{name: getattr(arguments, name) for name in names})
        folder = generate(config, arguments.out, num_proc=arguments.num_proc)
    print(f"{len(load_rows(folder))} rows about {config.num_videos} videos in {folder}")
    return OK


def _push(arguments: argparse.Namespace) -> int:
    with _status(f"pushing to {arguments.repo}"):
        from .hub.publish import push

        options = {name: getattr(arguments, name) for name in ("private", "revision", "force", "dry_run")}
        report = push(arguments.folder, arguments.repo, **options)
    print(report)
    if arguments.dry_run:
        print("nothing was sent")
    else:
        print(f"{'pushed as' if report.changed else 'already there, unchanged:'} {report.commit}  {report.url}")
    return OK


def _forward(name: str, rest: list[str]) -> int:
    """Hand the rest of the arguments to the module of a command."""
    rest = [part for word in rest for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if rest[-1:] == ["--config"]:
        raise ValueError("--config needs the path of a YAML file behind it. Write --config FILE.yaml.")
    config = rest[rest.index("--config") + 1] if "--config" in rest else None
    if config is not None and not os.path.isfile(config):
        raise ValueError(f"the configuration {config} is not there. Check the path (now in {Path.cwd()}).")
    with _status("loading"):
        from yaml import YAMLError

        run = importlib.import_module(f"{__package__}.{FORWARDED[name][0]}").main
    try:
        return run(rest) or OK
    except YAMLError as error:
        raise ValueError(f"the configuration {config} is no YAML: {error}") from error


def _version() -> str:
    try:
        return metadata.version("d2vlm-hf")
    except metadata.PackageNotFoundError:
        return "of a folder that is not installed"


def _run(argv: list[str], border: _Border) -> int:
    parser = _build_parser()
    before = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    forwarded = argv[before : before + 1] if argv[before : before + 1] and argv[before] in FORWARDED else []
    arguments = parser.parse_args(argv[: before + 1] if forwarded else argv)
    border.debug = arguments.debug
    if arguments.version:
        print(f"d2vlm {_version()}")
        return OK
    if forwarded:
        return _forward(arguments.command, argv[before + 1 :])
    if arguments.command is None:
        parser.error("no command was given")
    return arguments.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv (sequence of `str`, *optional*):
            Arguments after the name of the program, by default those of the process.

    Returns:
        `int`: The exit code.
    """
    border = _Border()
    with border:
        border.code = _run(list(sys.argv[1:] if argv is None else argv), border)
    return border.code


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["main"]
