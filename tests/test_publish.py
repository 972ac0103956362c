# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""A push is whole or did not happen; it replaces nothing that the folder does not know; a save is whole as well."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hub_server import REPO_ROOT, LocalHub, run_script
from safetensors.numpy import load_file, save_file

from d2vlm_hf.hub.checkpoint_folder import check_folder, list_files
from d2vlm_hf.hub.publish import PushError, push, record_revision, safe_save


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own call

CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- video-grounding\n---\n# A checkpoint\n"


def make_checkpoint(folder: Path, seed: int = 0, size: int = 1000) -> Path:
    """Write what a saved checkpoint consists of, small and with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    auto_map = {"AutoConfig": "configuration_d2vlm.D2VLMConfig", "AutoModel": "modeling_d2vlm.D2VLMModel"}
    pipelines = {"video-grounding": {"impl": "pipeline_d2vlm.VideoGroundingPipeline", "pt": ["AutoModel"]}}
    processor = {"auto_map": {"AutoProcessor": "processing_d2vlm.D2VLMProcessor"}, "video_processor": {"fps": 1}}
    files = {
        "config.json": json.dumps({"model_type": "d2vlm", "auto_map": auto_map, "custom_pipelines": pipelines}),
        "processor_config.json": json.dumps(processor),
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}}),
        "tokenizer.json": "{}",
        "README.md": CARD,
        "LICENSE": "Apache License",
        "configuration_d2vlm.py": "import torch\n",
        "modeling_d2vlm.py": "from .configuration_d2vlm import D2VLMConfig\nfrom .evidence_d2vlm import pool\n",
        "evidence_d2vlm.py": "pool = None\n",
        "pipeline_d2vlm.py": "from .processing_d2vlm import D2VLMProcessor\n",
        "processing_d2vlm.py": "D2VLMProcessor = None\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    weights = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    save_file({"weight": weights}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint folder with things beside it that stay on this machine."""
    folder = make_checkpoint(tmp_path / "model")
    run = ("checkpoint-10/model.safetensors", "warmup-words.safetensors", "eval-shapes/videos/a.mp4", "optimizer.pt")
    for name in (*run, "training_args.bin", "__pycache__/a.pyc", "runs/events.out.tfevents.1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"local")
    return folder


@pytest.fixture
def repo_id(hub: LocalHub, request: pytest.FixtureRequest) -> str:
    """A repository of its own for each test."""
    return f"org/{request.node.name[:60].replace('[', '-').rstrip(']')}"


# -- what is pushed ---------------------------------------------------------------------------------------------------


def test_push_makes_one_commit_of_what_belongs_there(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    report = push(folder, repo_id, commit_message="First")
    repo = hub_here.repo(repo_id)
    assert [commit.title for commit in repo.history(report.commit)] == ["First", "initial commit"]
    assert (report.commit, report.changed, repo.private) == (hub_here.head(repo_id), True, False)
    there = hub_here.files(repo_id)
    assert sorted(set(there) - {".gitattributes"}) == list_files(folder) == [path for path, _ in report.files]
    assert not {"optimizer.pt", "training_args.bin", ".d2vlm_push.json"} & set(there)
    assert all(there[path] == (folder / path).read_bytes() for path, _ in report.files)
    assert report.warnings == []
    assert report.url == f"{hub_here.url}/{repo_id}"

    again = push(folder, repo_id)
    assert (again.commit, again.changed) == (report.commit, False)

    make_checkpoint(folder, seed=1)
    third = push(folder, repo_id, commit_message="Second")
    assert repo.history(third.commit)[1].oid == report.commit
    assert hub_here.files(repo_id)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_new_repository_can_be_private(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id, private=True)
    assert hub_here.repo(repo_id).private
    make_checkpoint(folder, seed=2)
    assert push(folder, repo_id, private=True).changed


def test_private_push_to_a_public_repository_is_refused(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    hub_here.create(repo_id)
    with pytest.raises(PushError, match="a private push was asked for, and the repository is public"):
        push(folder, repo_id, private=True)
    assert set(hub_here.files(repo_id)) == {".gitattributes"}


def test_weights_of_an_older_push_do_not_stay(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    """One file after two shards: the shards and the old code go in the same commit, other files stay."""
    weights = load_file(folder / "model.safetensors")["weight"]
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, part in zip(names, np.split(weights, 2), strict=True):
        save_file({name: part}, folder / name)
    index = {"weight_map": {name: name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "old_d2vlm.py").write_text("")
    (folder / "loss.png").write_bytes(b"picture")
    push(folder, repo_id)
    assert set(names) <= set(hub_here.files(repo_id))
    for name in [*names, "model.safetensors.index.json", "old_d2vlm.py", "loss.png"]:
        (folder / name).unlink()
    make_checkpoint(folder)
    report = push(folder, repo_id)
    assert report.deleted == [*names, "model.safetensors.index.json", "old_d2vlm.py"]
    there = hub_here.files(repo_id)
    assert "model.safetensors" in there
    assert "loss.png" in there
    assert not set(report.deleted) & set(there)


def test_dry_run_lists_files_and_asks_nothing(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    (folder / "LICENSE").unlink()
    before = len(hub_here.requests)
    report = push(folder, repo_id, dry_run=True)
    assert len(hub_here.requests) == before
    assert (report.commit, report.changed) == (None, False)
    assert dict(report.files)["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert report.total_bytes == sum((folder / path).stat().st_size for path in list_files(folder))
    shown = str(report)
    assert f"{report.total_bytes:,}  bytes in 11 files for {repo_id} (main)" in shown
    assert "note: there is no LICENSE file; the card says 'apache-2.0'" in shown
    assert not (folder / ".d2vlm_push.json").exists()


# -- what is not overwritten ------------------------------------------------------------------------------------------


def test_a_revision_of_somebody_else_is_not_overwritten(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    push(folder, repo_id)
    theirs = hub_here.write(repo_id, {"config.json": b'{"theirs": 1}'})
    make_checkpoint(folder, seed=3)
    with pytest.raises(PushError, match=rf"'main' stands at {theirs[:8]}, which this folder was neither pushed to nor"):
        push(folder, repo_id)
    assert hub_here.head(repo_id) == theirs
    forced = push(folder, repo_id, force=True)
    assert hub_here.repo(repo_id).history(forced.commit)[1].oid == theirs
    assert push(folder, repo_id).changed is False


def test_a_folder_without_a_record_is_refused(hub_here: LocalHub, folder: Path, repo_id: str, tmp_path: Path) -> None:
    push(folder, repo_id)
    other = make_checkpoint(tmp_path / "other", seed=4)
    (other / ".d2vlm_push.json").write_text("no json")
    with pytest.raises(PushError, match="would overwrite somebody's work"):
        push(other, repo_id)
    record_revision(other, repo_id, hub_here.head(repo_id))
    assert push(other, repo_id).changed


def test_a_downloaded_folder_may_be_pushed_back(hub_here: LocalHub, folder: Path, repo_id: str, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    push(folder, repo_id)
    copy = Path(snapshot_download(repo_id, local_dir=tmp_path / "copy"))
    make_checkpoint(copy, seed=5)
    assert push(copy, repo_id).changed
    assert not any(path.startswith(".cache") for path in hub_here.files(repo_id))
    make_checkpoint(folder, seed=6)
    with pytest.raises(PushError, match="neither pushed to nor downloaded from"):
        push(folder, repo_id)  # the first folder is behind now


def test_a_branch_is_made(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    first = push(folder, repo_id)
    make_checkpoint(folder, seed=7)
    on_branch = push(folder, repo_id, revision="v2")
    assert (on_branch.revision, hub_here.head(repo_id), hub_here.head(repo_id, revision="v2")) == (
        "v2",
        first.commit,
        on_branch.commit,
    )
    make_checkpoint(folder, seed=8)
    new = push(folder, repo_id + "-new", revision="v1")
    assert hub_here.head(repo_id + "-new", revision="v1") == new.commit


# -- failures ---------------------------------------------------------------------------------------------------------


def test_no_token(hub_here: LocalHub, folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match=r"there is no token of the Hub\. Run `hf auth login`"):
        push(folder, repo_id)


@pytest.mark.parametrize(
    ("token", "owner", "message"),
    [
        ("hf_wrong", "org", r"the Hub does not accept the token.*Nothing was changed.*The Hub says 401"),
        ("hf_reader", "org", r"this token has no right to write there.*403: Forbidden: you must use a write token"),
        ("hf_me", "stranger", r"this token has no right to write there.*403: You don't have the rights"),
    ],
)
def test_no_rights(hub_here: LocalHub, folder: Path, token: str, owner: str, message: str) -> None:
    with pytest.raises(PushError, match=message):
        push(folder, f"{owner}/none-of-yours", token=token)
    assert ("model", f"{owner}/none-of-yours") not in hub_here.repos


def test_name_is_taken(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    """The real Hub says 409 where the name belongs to something that the user cannot see."""
    refused = hub_here.fail("POST", "/api/repos/create", 409, "This name is taken")
    with refused, pytest.raises(PushError, match=r"a repository of that name exists, but it is none .* 409: This name"):
        push(folder, repo_id)
    private = hub_here.create(f"other/{repo_id[4:]}", private=True)
    with pytest.raises(PushError, match="this token has no right to write there"):
        push(folder, private.id)


def test_somebody_pushes_at_the_same_time(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    """The other push comes in between our look and our commit: the server refuses it by the parent that we name."""
    before = push(folder, repo_id).commit
    make_checkpoint(folder, seed=9)
    between = hub_here.before("POST", "/commit/", lambda: hub_here.write(repo_id, {"notes.txt": b"theirs"}))
    with (
        between,
        pytest.raises(PushError, match=r"somebody else pushed in the meantime.*still stands at .* 412: A commit"),
    ):
        push(folder, repo_id)
    theirs = hub_here.head(repo_id)
    assert hub_here.files(repo_id)["notes.txt"] == b"theirs"
    assert hub_here.repo(repo_id).history(theirs)[1].oid == before
    with pytest.raises(PushError, match="neither pushed to nor downloaded from"):
        push(folder, repo_id)
    between = hub_here.before("POST", "/commit/", lambda: hub_here.write(repo_id, {"notes.txt": b"again"}))
    with between, pytest.raises(PushError, match="somebody else pushed in the meantime"):
        push(folder, repo_id, force=True)  # force overwrites what was there when it looked, nothing newer


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", r"/api/models/", 500, r"the Hub has a fault of its own.*Nothing was changed.*500: broken inside"),
        ("POST", r"/preupload/", 503, r"the Hub has a fault of its own.*still stands at"),
        ("POST", r"/commit/", 500, r"the Hub has a fault of its own.*still stands at"),
        ("PUT", r"/__lfs/", 500, r"the Hub has a fault of its own.*still stands at"),
        ("POST", r"/commit/", 401, r"the Hub does not accept the token"),
        ("POST", r"/commit/", 403, r"this token has no right to write there"),
        ("POST", r"/commit/", 404, r"the Hub did not find it"),
        ("POST", r"/commit/", 418, r"the Hub refused\..*418: broken inside"),
    ],
)
def test_refusals_leave_the_old_revision(
    hub_here: LocalHub, folder: Path, method: str, path: str, status: int, message: str
) -> None:
    repo_id = f"org/refusals-{path.strip('/_').replace('/', '-')}-{status}"
    first = push(folder, repo_id)
    make_checkpoint(folder, seed=1000 * len(path) + status)
    with hub_here.fail(method, path, status, "broken inside"), pytest.raises(PushError, match=message) as caught:
        push(folder, repo_id)
    assert "\n" not in str(caught.value)
    assert hub_here.head(repo_id) == first.commit
    assert push(folder, repo_id).changed


def test_network_down(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    with hub_here.down(), pytest.raises(PushError, match=r"the Hub cannot be reached \(ConnectError") as caught:
        push(folder, repo_id)
    assert "\n" not in str(caught.value)
    assert push(folder, repo_id).changed


def test_offline_mode(hub_here: LocalHub, folder: Path, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set, so the Hub is not asked"):
        push(folder, repo_id)


def test_upload_cut_halfway(hub_here: LocalHub, tmp_path: Path, repo_id: str) -> None:
    """What is on the Hub stays the old revision, and a second push completes."""
    folder = make_checkpoint(tmp_path / "model", size=300_000)
    first = push(folder, repo_id)
    old = hub_here.files(repo_id)
    make_checkpoint(folder, seed=11, size=300_000)
    with (
        hub_here.cut("PUT", "/__lfs/", after_bytes=400_000) as fault,
        pytest.raises(PushError, match=r"was cut off: the connection broke while uploading .*Push again") as caught,
    ):
        push(folder, repo_id)
    assert fault.hits == 6
    assert f"still stands at {first.commit[:8]}" in str(caught.value)
    assert (hub_here.head(repo_id), hub_here.files(repo_id)) == (first.commit, old)
    second = push(folder, repo_id)
    assert hub_here.files(repo_id)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub_here.repo(repo_id).history(second.commit)[1].oid == first.commit


def test_first_upload_cut_halfway(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    make_checkpoint(folder, seed=20)
    with hub_here.cut("PUT", "/__lfs/"), pytest.raises(PushError, match="was cut off"):
        push(folder, repo_id)
    assert set(hub_here.files(repo_id)) == {".gitattributes"}
    assert push(folder, repo_id).changed


def test_lost_answer_is_noticed(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    """The commit was made and its answer lost: the next push finds its own work there and does not call it foreign."""
    push(folder, repo_id)
    make_checkpoint(folder, seed=12)
    lost = hub_here.lose_answer("POST", "/commit/", times=1)
    with lost, pytest.raises(PushError, match="a push that was complete is noticed"):
        push(folder, repo_id)
    made = hub_here.head(repo_id)
    again = push(folder, repo_id)
    assert (again.commit, again.changed) == (made, False)
    make_checkpoint(folder, seed=13)
    assert push(folder, repo_id).changed


def test_a_file_that_cannot_be_read(hub_here: LocalHub, folder: Path, repo_id: str) -> None:
    from huggingface_hub import HfApi

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_commit", fail)
        with pytest.raises(PushError, match=r"uploading failed \(PermissionError: .*Permission denied\)"):
            push(folder, repo_id)


def test_push_in_a_process_of_its_own(hub: LocalHub, folder: Path, repo_id: str) -> None:
    """With nothing patched: the environment of a user, and a repository name that is none."""
    code = f"""
import json
from d2vlm_hf.hub.publish import push
print(json.dumps(push({str(folder)!r}, {repo_id!r}).commit))
try:
    push({str(folder)!r}, "no-owner")
except ValueError as error:
    print(error)
"""
    commit, error = run_script(code, hub).stdout.strip().splitlines()[-2:]
    assert json.loads(commit) == hub.head(repo_id)
    assert error.startswith("repo_id is 'no-owner', but the Hub names a repository by owner and name")


# -- what a checkpoint folder must hold -------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 2000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("config.json"), "config.json is missing"),
        (drop("processor_config.json"), "processor_config.json is missing"),
        (drop("tokenizer_config.json"), "tokenizer_config.json is missing"),
        (drop("tokenizer.json"), r"there is no tokenizer \(tokenizer.json\)"),
        (drop("model.safetensors"), "model.safetensors is missing"),
        (drop("evidence_d2vlm.py"), "the code file evidence_d2vlm.py is missing"),
        (drop("pipeline_d2vlm.py"), "the code file pipeline_d2vlm.py is missing"),
        (drop("processing_d2vlm.py"), "the code file processing_d2vlm.py is missing"),
        (drop("README.md"), "the card README.md is missing"),
        (truncate, r"model.safetensors is broken \("),
        (write("config.json", "{"), r"config.json is no JSON \("),
        (write("config.json", "[1]"), "config.json holds no JSON object"),
        (
            write("config.json", '{"model_type": "d2vlm"}'),
            "config.json has no auto_map, so it would load with the pack",
        ),
        (write("config.json", '{"auto_map": {}}'), "no custom_pipelines entry for 'video-grounding'"),
        (write("processor_config.json", '{"a": 1}'), "processor_config.json has no auto_map"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing"),
        (write("README.md", "# No metadata"), "the card README.md names no licence"),
        (write("README.md", "---\na: [1\n---\n"), "the metadata of README.md cannot be read"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    assert check_folder(folder) == []
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        check_folder(folder)
    assert str(caught.value).startswith(f"{folder} is no complete checkpoint: ")
    assert "Who downloads it could not use it. Save model, processor and pipeline" in str(caught.value)


def test_all_faults_are_named_at_once(folder: Path) -> None:
    for name in ("config.json", "README.md", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(
        ValueError, match=r"config.json is missing; there is no tokenizer .*; the card README.md is miss"
    ):
        push(folder, "org/never")
    with pytest.raises(ValueError, match="is no folder, so there is nothing to push"):
        push(folder / "nothing", "org/never")


def test_adapter_folder(hub_here: LocalHub, tmp_path: Path, repo_id: str) -> None:
    (tmp_path / "README.md").write_text(CARD)
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="on this machine as its base model; put its Hub id there"):
        push(tmp_path, repo_id)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    push(tmp_path, repo_id)
    assert "adapter_model.safetensors" in hub_here.files(repo_id)


# -- saving -----------------------------------------------------------------------------------------------------------


def test_safe_save_swaps_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "model"
    safe_save(lambda folder: make_checkpoint(folder, seed=0) and None, target)
    kept = ("checkpoint-5/state.txt", "warmup-words.safetensors", "loss.png")
    for name in (*kept, "model-00001-of-00002.safetensors", "old_d2vlm.py"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("old")
    assert safe_save(lambda folder: make_checkpoint(folder, seed=1) and None, target) == target
    expected = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    assert np.array_equal(load_file(target / "model.safetensors")["weight"], expected)
    assert [(target / name).read_text() for name in kept] == ["old"] * 3
    assert not (target / "model-00001-of-00002.safetensors").exists()  # would be loaded beside the new weights
    assert not (target / "old_d2vlm.py").exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyError("no such layer")

    with pytest.raises(KeyError, match="no such layer"):
        safe_save(half, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_save_is_cleared_up(tmp_path: Path) -> None:
    """Killed while writing, or between the two renames: the next save starts from the old folder."""
    target, partial, previous = tmp_path / "model", tmp_path / ".model.partial", tmp_path / ".model.previous"
    make_checkpoint(partial)
    make_checkpoint(previous)
    (previous / "loss.png").write_text("old")
    safe_save(lambda folder: (folder / "config.json").write_text("new"), target)
    assert (target / "config.json").read_text() == "new"
    assert (target / "loss.png").read_text() == "old"
    make_checkpoint(previous)  # killed after the second rename
    safe_save(lambda folder: (folder / "config.json").write_text("newer"), target)
    assert (target / "config.json").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits on the size of files are POSIX")
def test_disk_full_while_saving(tmp_path: Path) -> None:
    """Real writers under a real limit of the system; each of them words the error in its own way."""
    target = make_checkpoint(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    code = """
import resource
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models
from d2vlm_hf.hub.checkpoint_folder import safe_save
tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(20_000)}, unk_token="0"))
writers = [
    lambda folder: save_file({"weight": np.zeros(1_000_000, np.float32)}, folder / "model.safetensors"),
    lambda folder: tokenizer.save(str(folder / "tokenizer.json")),
    lambda folder: (folder / "model.bin").write_bytes(bytes(1_000_000)),
]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for writer in writers:
    try:
        safe_save(writer, Path("model"))
    except OSError as error:
        print(type(error.__cause__).__name__, error.errno, error)
"""
    env = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert [line.split()[:2] for line in said] == [["SafetensorError", "28"], ["Exception", "28"], ["OSError", "28"]]
    assert all("could not be saved: there is no room for it" in line for line in said), done.stderr
    assert all("What was there before is unchanged. Make room and save again" in line for line in said)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_no_space_left_on_device(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "config.json").write_text("new")
        Path("/dev/full").write_text("x" * 100_000)

    make_checkpoint(tmp_path / "model")
    with pytest.raises(OSError, match="could not be saved: there is no room for it") as caught:
        safe_save(save, tmp_path / "model")
    assert caught.value.errno == 28
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "d2vlm"
