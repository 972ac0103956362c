# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The plan of the house: a module imports only from lower floors, and `model/` travels on its own.

`model/` is copied next to a checkpoint and loaded there without the package, so it is one flat folder that knows only
its siblings and the libraries every user of transformers has.
"""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports


PACKAGE = Path(__file__).resolve().parent.parent / "d2vlm_hf"

# A room may import from the floors below its own, never from its own or a higher one. Rooms named here and not yet
# built are fine; a module that is not named here is an error. The `__init__` of a sub-package holds no imports.
FLOORS = {
    8: [
        "__init__",
        "cli",
        "training.run_fpo",
    ],
    7: [
        "training.run",
    ],
    6: [
        "demo",
        "lmms_plugin.wrapper",
        "training.fpo_trainer",
        "training.sft_trainer",
    ],
    5: [
        "training.warmup",
        "commands.ground",
        "data.build",
        "evaluation.run",
        "hub.convert",
        "training.grounding_mixin",
        "training.teacher_forced",
    ],
    4: [
        "model.pipeline_d2vlm",
        "commands.check_data",
        "data.preference",
        "evaluation.plots",
        "evaluation.report",
        "lmms_plugin.answers",
        "lmms_plugin.task",
        "training.scratch",
        "training.lesson_losses",
    ],
    3: [
        "model.modeling_d2vlm",
        "data.collators",
        "data.perturb",
        "data.shapes_builder",
        "data.shapes_lessons",
        "data.sources",
        "evaluation.dense_captioning",
        "evaluation.etbench",
        "evaluation.moment_retrieval",
        "evaluation.multiple_choice",
        "evaluation.shapes_benchmark",
        "hub.render_cards",
    ],
    2: [
        "model.backbone_d2vlm",
        "model.processing_d2vlm",
        "data.edits",
        "data.importers",
        "data.shapes",
        "evaluation.benchmarks",
        "evaluation.clean_protocol",
        "evaluation.dense_metrics",
        "evaluation.etbench_tasks",
        "hub.cards",
        "hub.measured",
        "hub.pictures",
    ],
    1: [
        "model.answers_d2vlm",
        "model.connector_d2vlm",
        "model.generation_d2vlm",
        "model.requests_d2vlm",
        "model.sequence_d2vlm",
        "model.video_processing_d2vlm",
        "data.import_captions",
        "data.import_conversations",
        "data.parquet_files",
        "data.rewriting",
        "data.shapes_render",
        "data.shapes_tasks",
        "data.vocabulary",
        "doctor",
        "evaluation.metrics",
        "evaluation.parsing",
        "figures",
        "hub.card_data",
        "hub.key_maps",
        "hub.publish",
        "training.fpo_config",
    ],
    0: [
        "model.chat_templates_d2vlm",
        "model.configuration_d2vlm",
        "model.evidence_d2vlm",
        "model.spans_d2vlm",
        "model.tokens_d2vlm",
        "model.video_decoding_d2vlm",
        "model.video_sources_d2vlm",
        "model.video_transforms_d2vlm",
        "bundled",
        "data.clauses",
        "data.import_formats",
        "data.schema",
        "data.shapes_language",
        "data.shapes_world",
        "evaluation.prediction_files",
        "evaluation.statistics",
        "evaluation.text_metrics",
        "figure_text",
        "hub.checkpoint_folder",
        "hub.original_weights",
        "hub.records",
        "lmms_plugin.manifest",
        "training.configs",
        "training.muon",
    ],
}
PLAN = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

TRAVELLING = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors", *sys.stdlib_module_names}
GUARDED = {"av", "torchcodec", "PIL"}  # only inside `try:` or `if is_..._available():`, which the loader does not scan


def room_of(path: Path) -> str:
    """`.../d2vlm_hf/data/schema.py` -> `data.schema`; a sub-package's `__init__.py` -> `data`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported_rooms(source: str, room: str) -> set[str]:
    """Every module of the package that a source imports, wherever in the file: also in functions and for typing."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = [] if node.level == 0 else ["d2vlm_hf", *room.split(".")[:-1]][: -(node.level - 1) or None]
            base = ".".join([*above, *filter(None, [node.module])])
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] == "d2vlm_hf":
                module = module.removeprefix("d2vlm_hf").removeprefix(".")
                inner = f"{module}.{name}".removeprefix(".")  # `from x import y` may name a module or what is in one
                rooms.add(inner if inner in PLAN else module or "__init__")
    return rooms


def floor_faults(source: str, room: str) -> list[str]:
    """What a module imports against the plan."""
    if room not in PLAN:
        return [f"{room} is not in the plan; give it a floor in FLOORS"]
    return [
        f"{room} (floor {PLAN[room]}) imports {other} (floor {PLAN[other]})"
        for other in sorted(imported_rooms(source, room))
        if other in PLAN and PLAN[other] >= PLAN[room]
    ]


def travelling_faults(path: Path) -> list[str]:
    """What would keep a file of `model/` from being loaded beside a checkpoint, without the package."""
    faults, siblings, roots = [], set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            if node.level != 1 or node.module is None or "." in node.module:
                faults.append(f"line {node.lineno}: only `from .sibling import name` is copied with a checkpoint")
            else:
                siblings.add(node.module)
    faults += [
        f"{name}.py is imported but does not exist" for name in siblings if not path.with_name(f"{name}.py").exists()
    ]
    # transformers finds the files to copy with a regular expression, which also reads docstrings
    if set(get_relative_imports(path)) != siblings and not faults:
        faults.append(f"transformers would copy {sorted(get_relative_imports(path))}, needed are {sorted(siblings)}")
    faults += [f"imports {name}, which its users may not have" for name in sorted(roots - TRAVELLING - GUARDED)]
    unguarded = set(get_imports(path)) & GUARDED  # transformers' own scan of what must be installed
    faults += [f"imports {name} outside `try:` and `if is_..._available():`" for name in sorted(unguarded)]
    return [f"{path.name}: {fault}" for fault in faults]


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def is_subpackage(path: Path) -> bool:
    return path.name == "__init__.py" and path.parent != PACKAGE


def test_every_module_imports_downwards_only():
    rooms = [path for path in package_files() if not is_subpackage(path)]
    assert len(rooms) > 5
    assert [fault for path in rooms for fault in floor_faults(path.read_text(), room_of(path))] == []


def test_subpackages_hold_no_code():
    for path in filter(is_subpackage, package_files()):
        body = ast.parse(path.read_text()).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), path


def test_a_room_stands_on_one_floor():
    assert len(PLAN) == sum(len(rooms) for rooms in FLOORS.values())


def test_model_is_flat_and_travels_on_its_own():
    files = [path for path in (PACKAGE / "model").rglob("*.py") if path.name != "__init__.py"]
    assert files
    assert all(path.parent == PACKAGE / "model" and path.stem.endswith("_d2vlm") for path in files)
    assert [fault for path in files for fault in travelling_faults(path)] == []


@pytest.mark.parametrize(
    ("room", "source", "fault"),
    [
        (
            "model.spans_d2vlm",
            "from .modeling_d2vlm import D2VLMModel",
            f"imports model.modeling_d2vlm (floor {PLAN['model.modeling_d2vlm']})",
        ),
        (
            "data.schema",
            "def f():\n    from ..cli import main",
            f"data.schema (floor {PLAN['data.schema']}) imports cli (floor {PLAN['cli']})",
        ),
        (
            "data.schema",
            "if TYPE_CHECKING:\n    from ..hub import cards",
            f"imports hub.cards (floor {PLAN['hub.cards']})",
        ),
        ("data.preference", "from . import build", f"imports data.build (floor {PLAN['data.build']})"),
        (
            "data.perturb",
            "import d2vlm_hf.evaluation.run as run",
            f"imports evaluation.run (floor {PLAN['evaluation.run']})",
        ),
        ("data.perturb", "from d2vlm_hf import evaluate", f"imports __init__ (floor {PLAN['__init__']})"),
        ("figures", "from . import __version__", f"imports __init__ (floor {PLAN['__init__']})"),
        ("data.stray", "", "data.stray is not in the plan"),
    ],
)
def test_the_plan_can_fail(room, source, fault):
    (found,) = floor_faults(source, room)
    assert fault in found


def test_the_plan_allows_what_is_below():
    assert floor_faults("import torch\nfrom ..model.spans_d2vlm import Span\nfrom . import schema", "data.shapes") == []
    assert floor_faults("from .model.processing_d2vlm import D2VLMProcessor", "cli") == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from ..data.schema import TASKS", "only `from .sibling import name` is copied"),
        ("from . import spans_d2vlm", "only `from .sibling import name` is copied"),
        ("from .nested.spans import Span", "only `from .sibling import name` is copied"),
        ("from .gone_d2vlm import Span", "gone_d2vlm.py is imported but does not exist"),
        ('"""Write\nfrom .other_d2vlm import x\n"""', "transformers would copy ['other_d2vlm']"),
        ("import d2vlm_hf", "imports d2vlm_hf, which its users may not have"),
        ("def f():\n    import datasets", "imports datasets, which its users may not have"),
        ("def f():\n    import av", "imports av outside `try:`"),
        ("if TYPE_CHECKING:\n    import torchcodec", "imports torchcodec outside `try:`"),
    ],
)
def test_what_cannot_travel_is_found(tmp_path, source, fault):
    path = tmp_path / "spare_d2vlm.py"
    path.write_text(source)
    (found,) = travelling_faults(path)
    assert fault in found


def test_what_can_travel_passes(tmp_path):
    (tmp_path / "spans_d2vlm.py").write_text("")
    path = tmp_path / "spare_d2vlm.py"
    path.write_text(
        "import torch\nfrom transformers.utils import is_av_available\nfrom .spans_d2vlm import Span\n"
        "def f():\n    try:\n        import torchcodec\n    except ImportError:\n        torchcodec = None\n"
        "if is_av_available():\n    import av\n"
    )
    assert travelling_faults(path) == []
