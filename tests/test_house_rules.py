# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""House rules that a reader could check with a finger on the page, checked on the syntax tree instead."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "d2vlm_hf"
HEADER = "# Copyright 2026 The d2vlm_hf Authors\n# SPDX-License-Identifier: Apache-2.0\n"
FILE_LINES, FUNCTION_LINES = 450, 80
PRINTS = {"cli.py"}

# A message that no test can name, with the reason: {"piece of the message": "why it cannot be provoked"}.
UNTESTED_MESSAGES: dict[str, str] = {}
# A message counts as tested when this many characters in a row of it stand in a string of some test.
WINDOW = 15

PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = [*PACKAGE_FILES, *(path for name in ("tests", "recipes", "speed") for path in (ROOT / name).rglob("*.py"))]


def style_faults(source: str, may_print: bool = False) -> list[str]:
    """Asserts, prints, handlers that catch everything, and rooms grown too large."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            faults.append(f"line {node.lineno}: assert; raise a ValueError that says what to do")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and not may_print:
            faults.append(f"line {node.lineno}: print; use logging")
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in caught):
                faults.append(f"line {node.lineno}: catches everything; name what is expected")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "forward":
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                faults.append(
                    f"line {node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES} are wanted"
                )
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        faults.append(f"{lines} lines, at most {FILE_LINES} are wanted")
    return faults


def _message_pieces(node: ast.AST) -> list[str]:
    """The literal text of a message, in pieces between the values put into it."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in _message_pieces(value)]
    if isinstance(node, ast.BinOp):
        return _message_pieces(node.left) + _message_pieces(node.right)
    if isinstance(node, ast.IfExp):
        return _message_pieces(node.body) + _message_pieces(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # "...".format(...), " ".join(...)
        return [piece for part in (node.func.value, *node.args) for piece in _message_pieces(part)]
    if isinstance(node, ast.List | ast.Tuple):
        return [piece for part in node.elts for piece in _message_pieces(part)]
    return []


def raised_messages(source: str) -> list[tuple[int, str]]:
    """Line and longest literal piece of every message that a source raises, also one that is put in a name first."""
    tree = ast.parse(source)
    found: dict[int, list[list[str]]] = {}
    scopes = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))]
    for scope in scopes:  # from the outside in, so that what an inner function assigns counts last
        assigned: dict[str, list[list[str]]] = {}
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    assigned.setdefault(getattr(target, "id", ""), []).append(_message_pieces(node.value))
        for node in ast.walk(scope):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                named = [assigned.get(part.id, []) for part in node.exc.args if isinstance(part, ast.Name)]
                written = [piece for part in node.exc.args for piece in _message_pieces(part)]
                found[node.lineno] = [*(message for messages in named for message in messages), written]
    return [(line, max(pieces, key=len)) for line in sorted(found) for pieces in found[line] if pieces]


def _plain(text: str) -> str:
    """Text without the marks of a regular expression and without regard to white space."""
    return re.sub(r"\s+", " ", text.replace("\\", ""))


def is_named(message: str, corpus: str) -> bool:
    """Whether a stretch of a message stands in the strings of the tests."""
    message = _plain(message).strip()
    width = min(WINDOW, len(message))
    return any(message[i : i + width] in corpus for i in range(len(message) - width + 1))


def strings_of_tests() -> str:
    """Every string in the tests but those of this file."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__).resolve()]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return "\0".join(_plain(n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)
def test_style(path):
    assert style_faults(path.read_text(), may_print=relative(path).removeprefix("d2vlm_hf/") in PRINTS) == []


def test_every_file_states_its_licence():
    assert len(ALL_FILES) > 10
    assert [relative(path) for path in ALL_FILES if not path.read_text().startswith(HEADER)] == []


def test_every_message_is_named_in_a_test():
    corpus = strings_of_tests()
    unnamed = [
        f"{relative(path)}:{line}: {message!r}"
        for path in PACKAGE_FILES
        for line, message in raised_messages(path.read_text())
        if not is_named(message, corpus) and not any(piece in message for piece in UNTESTED_MESSAGES)
    ]
    assert not unnamed, "These messages are raised, and no test names them:\n" + "\n".join(unnamed)


def test_the_list_of_untested_messages_holds_nothing_old():
    raised = "\n".join(message for path in PACKAGE_FILES for _, message in raised_messages(path.read_text()))
    assert [piece for piece in UNTESTED_MESSAGES if piece not in raised] == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("assert x", "assert"),
        ("def f():\n    print(1)", "print"),
        ("try:\n    f()\nexcept:\n    pass", "catches everything"),
        ("try:\n    f()\nexcept Exception:\n    pass", "catches everything"),
        ("try:\n    f()\nexcept (ValueError, BaseException):\n    pass", "catches everything"),
        ("def f():\n" + "    x = 1\n" * 80, "f has 81 lines"),
        ("x = 1\n" * 451, "451 lines"),
    ],
)
def test_style_can_fail(source, fault):
    (found,) = style_faults(source)
    assert fault in found


def test_style_lets_pass():
    source = "def forward():\n" + "    x = 1\n" * 90 + "try:\n    f()\nexcept (OSError, ValueError):\n    pass\n"
    assert style_faults(source) == []
    assert style_faults("print(1)", may_print=True) == []


def test_messages_are_found_however_they_are_written():
    source = (
        "def f(x):\n"
        "    if x:\n"
        "        raise ValueError(f'{x} is far too large' f' for {x}')\n"
        "    message = 'put in a name before it is raised'\n"
        "    if x:\n"
        "        message = 'or this one instead'\n"
        "    raise ValueError(message)\n"
        "    raise StopIteration\n"
        "    raise Stopped(x['no message, but a key'])\n"
        "    raise KeyError(x)\n"
    )
    expected = [(3, " is far too large for "), (7, "put in a name before it is raised"), (7, "or this one instead")]
    assert raised_messages(source) == expected


def test_a_message_without_a_test_is_found():
    corpus = _plain(r"match='spans\[0\] ends before it starts'")
    assert is_named(": it ends before it starts; swap the two times.", corpus)
    assert is_named("spans[0] ends", corpus)
    assert not is_named(": it starts before the video does", corpus)
