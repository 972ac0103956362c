# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""The local Hub of the tests behaves like the real one, as far as the HF libraries look; and it fails on demand."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hub_server import LocalHub, run_script


def answer_of(code: str, hub: LocalHub, **options: Any) -> Any:
    """Run a script and return the JSON of the last line that it prints."""
    return json.loads(run_script(code, hub, **options).stdout.strip().splitlines()[-1])


def write_clip(path: Path, frames: int = 12, size: int = 64, fps: int = 8) -> bytes:
    """Write a real H.264 file in which a bright square moves to the right, and return its bytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            image = np.full((size, size, 3), 30, np.uint8)
            image[20:36, 4 * index : 4 * index + 16] = 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def test_model_repo_round_trip(hub: LocalHub, tmp_path: Path) -> None:
    """Folder up, single file, pinned revision and snapshot down; a second identical upload makes no commit."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "sub" / "notes.txt").write_text("hello")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "README.md").write_text("---\ntags:\n- video-grounding\nlibrary_name: transformers\n---\n# Title\n")
    code = """
import json, os, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api, folder = HfApi(), os.environ["FOLDER"]
api.create_repo("org/round", exist_ok=True)
first = api.upload_folder(repo_id="org/round", folder_path=folder).oid
again = api.upload_folder(repo_id="org/round", folder_path=folder).oid
second = api.upload_file(repo_id="org/round", path_or_fileobj=b'{"a": 2}', path_in_repo="config.json").oid
read = lambda revision: json.load(open(hf_hub_download("org/round", "config.json", revision=revision)))["a"]
api.create_branch("org/round", branch="old", revision=first)
api.create_tag("org/round", tag="v1", revision=first)
info = api.model_info("org/round", files_metadata=True)
tree = {row.path: row.size for row in api.list_repo_tree("org/round", recursive=True) if hasattr(row, "size")}
print(json.dumps({
    "unchanged": first == again, "moved": first != second, "head": info.sha == second,
    "values": [read("main"), read(first), read("old"), read("v1")],
    "titles": [commit.title for commit in api.list_repo_commits("org/round")],
    "files": sorted(os.listdir(snapshot_download("org/round"))), "tree": tree,
    "lfs": [row.rfilename for row in info.siblings if row.lfs],
    "sha_prefix": api.model_info("org/round", revision=first[:8]).sha == first,
    "found": [row.id for row in api.list_models(filter="video-grounding", search="round") if row.id == "org/round"],
    "missed": [row.id for row in api.list_models(filter="audio")],
    "branches": sorted(ref.name for ref in api.list_repo_refs("org/round").branches),
    "who": api.whoami()["name"], "exists": api.file_exists("org/round", "sub/notes.txt"),
}))
"""
    got = answer_of(code, hub, env={"FOLDER": str(tmp_path)})
    assert got["unchanged"]
    assert got["moved"]
    assert got["head"]
    assert got["sha_prefix"]
    assert got["exists"]
    assert got["values"] == [2, 1, 1, 1]
    assert got["titles"][-1] == "initial commit"
    assert len(got["titles"]) == 3
    assert got["files"] == [".gitattributes", "README.md", "config.json", "model.safetensors", "sub"]
    assert got["tree"]["sub/notes.txt"] == 5
    assert got["tree"]["model.safetensors"] == 10240
    assert got["lfs"] == ["model.safetensors"]
    assert (got["found"], got["missed"], got["branches"]) == (["org/round"], [], ["main", "old"])
    assert got["who"] == "me"
    assert hub.files("org/round")["model.safetensors"] == bytes(range(256)) * 40


def test_big_files_ranges_and_pages(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file above the LFS threshold, in one piece and in parts; byte ranges; a tree of several pages; deletions."""
    monkeypatch.setattr(hub, "lfs_threshold", 1_000_000)
    monkeypatch.setattr(hub, "page_size", 7)
    code = """
import json, random
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, get_session, hf_hub_url
api = HfApi()
api.create_repo("org/big")
data = random.Random(0).randbytes(3_000_001)
api.upload_file(repo_id="org/big", path_or_fileobj=data, path_in_repo=NAME)
url = hf_hub_url("org/big", NAME)
part = lambda spec: get_session().get(url, headers={"Range": "bytes=" + spec})
ranges = [part(spec) for spec in ("0-9", "100-", "-5", "9999999-")]
many = [CommitOperationAdd(f"d/{i:02d}.txt", b"%d" % i) for i in range(20)]
api.create_commit("org/big", many, commit_message="many")
listed = [row.path for row in api.list_repo_tree("org/big", "d")]
gone = [CommitOperationDelete("d/00.txt"), CommitOperationDelete("d/", is_folder=True)]
api.create_commit("org/big", gone[:1], commit_message="one less")
left = len(list(api.list_repo_tree("org/big", "d")))
api.create_commit("org/big", gone[1:], commit_message="all gone")
with HfFileSystem().open("org/big/" + NAME) as file:
    file.seek(2_999_990)
    tail = file.read()
info = api.get_paths_info("org/big", [NAME])[0]
print(json.dumps({"range_status": [r.status_code for r in ranges], "first": ranges[0].content == data[:10],
    "rest": ranges[1].content == data[100:], "last": ranges[2].content == data[-5:], "tail": tail == data[-11:],
    "span": ranges[0].headers["Content-Range"], "listed": listed, "left": left, "lfs": info.lfs is not None,
    "whole": open(api.hf_hub_download("org/big", NAME), "rb").read() == data,
    "files": api.list_repo_files("org/big")}))
api.delete_repo("org/big")
"""
    for name, parts in (("data.txt", None), ("parts.dat", 1_000_000)):
        monkeypatch.setattr(hub, "part_size", parts)
        seen = len(hub.requests)
        got = answer_of(code.replace("NAME", repr(name)), hub)
        assert got["range_status"] == [206, 206, 206, 416]
        assert all(got[key] for key in ("first", "rest", "last", "tail", "whole", "lfs"))
        assert got["span"] == "bytes 0-9/3000001"
        assert got["listed"] == [f"d/{i:02d}.txt" for i in range(20)]
        assert (got["left"], got["files"]) == (19, [".gitattributes", name])
        uploads = [path for method, path, _ in hub.requests[seen:] if method == "PUT"]
        # the second time the same content is there already, but under the same name: nothing is sent twice
        assert len(uploads) == (1 if parts is None else 0)
    hub.blobs.clear()  # now nothing is there: the file goes up in four parts
    seen = len(hub.requests)
    answer_of(code.replace("NAME", "'parts.dat'"), hub)
    puts = [path for method, path, _ in hub.requests[seen:] if method == "PUT"]
    assert [path.rsplit("/", 1)[1] for path in puts] == ["1", "2", "3", "4"]
    assert any("cursor=14" in path for _, path, _ in hub.requests[seen:])


def test_transformers_model_round_trip(hub: LocalHub, tmp_path: Path) -> None:
    """A stock model is pushed by transformers and comes back from the Hub, not from a folder of this machine."""
    code = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     vocab_size=32))
model.push_to_hub("org/tiny-llama", private=True)
again = AutoModelForCausalLM.from_pretrained("org/tiny-llama")
equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
print(int(equal))
"""
    assert answer_of(code, hub, home=tmp_path, block=("d2vlm_hf",)) == 1
    assert hub.repo("org/tiny-llama").private
    assert any(path.startswith("/org/tiny-llama/resolve/") and method == "GET" for method, path, _ in hub.requests)


def test_dataset_with_video_round_trip(hub: LocalHub, tmp_path: Path) -> None:
    """A `Video` column goes up with its bytes embedded; it loads plain and streaming, with the feature intact."""
    clip = write_clip(tmp_path / "clip.mp4")
    push = """
import os
from datasets import Dataset, Features, Value, Video, List
features = Features({"id": Value("string"), "video": Video(), "spans": List(List(Value("float64")))})
spans = [[[0.0, 0.5]], [], [[0.25, 1.0], [1.0, 1.25]]]
rows = {"id": ["a", "b", "c"], "video": [os.environ["CLIP"]] * 3, "spans": spans}
Dataset.from_dict(rows, features=features).push_to_hub("org/clips")
"""
    pull = """
import io, json
import av
from datasets import Video, load_dataset
plain = load_dataset("org/clips", split="train")
stream = load_dataset("org/clips", split="train", streaming=True)
raw = plain.cast_column("video", Video(decode=False))[0]["video"]["bytes"]
streamed = [row["id"] for row in stream.cast_column("video", Video(decode=False))]
with av.open(io.BytesIO(raw)) as container:
    count, codec = sum(1 for _ in container.decode(video=0)), container.streams.video[0].codec_context.name
print(json.dumps({"feature": str(plain.features["video"]), "same": str(stream.features["video"]), "ids": streamed,
    "spans": plain["spans"][:], "bytes": len(raw), "frames": count, "codec": codec}))
"""
    plain = ("d2vlm_hf", "torch", "torchcodec", "transformers")  # `datasets` needs none of them for this
    run_script(push, hub, block=plain, env={"CLIP": str(tmp_path / "clip.mp4")})
    got = answer_of(pull, hub, home=tmp_path / "home", block=plain)
    assert got["feature"] == got["same"]
    assert got["feature"].startswith("Video(")
    assert got["spans"] == [[[0.0, 0.5]], [], [[0.25, 1.0], [1.0, 1.25]]]
    assert (got["bytes"], got["frames"], got["codec"]) == (len(clip), 12, "h264")
    assert got["ids"] == ["a", "b", "c"]
    stored = [path for path in hub.files("org/clips", "dataset") if path.endswith(".parquet")]
    assert stored == ["data/train-00000-of-00001.parquet"]


def test_errors_reach_the_client_as_the_right_exceptions(hub: LocalHub) -> None:
    """Tokens, rights, missing things and injected statuses give the exceptions of huggingface_hub."""
    hub.create("org/errors")
    hub.create("org/secret", private=True)
    code = """
import json
from huggingface_hub import HfApi
def kind(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status]
    return ["fine", None]
CARD = b"---\\na: [1\\n---\\n"
api, put = HfApi(), {"path_or_fileobj": b"x", "path_in_repo": "x.txt"}
print(json.dumps({
    "no repo": kind(api.model_info, "org/nothing"), "no revision": kind(api.model_info, "org/errors", revision="v9"),
    "no file": kind(api.hf_hub_download, "org/errors", "nothing.txt"),
    "private": kind(api.model_info, "org/secret", token="hf_other"),
    "bad token": kind(api.model_info, "org/errors", token="hf_wrong"),
    "no login": kind(api.create_repo, "org/new", token=False),
    "read token": kind(api.upload_file, repo_id="org/errors", token="hf_reader", **put),
    "not mine": kind(api.create_repo, "other/new"), "exists": kind(api.create_repo, "org/errors"),
    "bad card": kind(api.upload_file, repo_id="org/errors", path_or_fileobj=CARD, path_in_repo="README.md"),
    "old parent": kind(api.upload_file, repo_id="org/errors", parent_commit="0" * 40, **put),
    "tag twice": [kind(api.create_tag, "org/errors", tag="t"), kind(api.create_tag, "org/errors", tag="t")][1],
    "delete nothing": kind(api.delete_file, "nothing.txt", "org/errors"),
}))
"""
    assert answer_of(code, hub) == {
        "no repo": ["RepositoryNotFoundError", 404],
        "no revision": ["RevisionNotFoundError", 404],
        "no file": ["RemoteEntryNotFoundError", 404],
        "private": ["RepositoryNotFoundError", 404],
        "bad token": ["HfHubHTTPError", 401],
        "no login": ["HfHubHTTPError", 401],
        "read token": ["HfHubHTTPError", 403],
        "not mine": ["HfHubHTTPError", 403],
        "exists": ["HfHubHTTPError", 409],
        "bad card": ["ValueError", None],
        "old parent": ["HfHubHTTPError", 412],
        "tag twice": ["HfHubHTTPError", 409],
        "delete nothing": ["RemoteEntryNotFoundError", 404],
    }
    commits = """
import json
from huggingface_hub import HfApi
seen = []
for _ in range(5):
    try:
        HfApi().upload_file(repo_id="org/errors", path_or_fileobj=b"y", path_in_repo="y.txt")
    except Exception as error:
        seen.append([error.response.status_code, error.server_message])
print(json.dumps(seen))
"""
    head, statuses = hub.head("org/errors"), (401, 403, 409, 412, 500)
    with ExitStack() as stack:
        for status in statuses:
            stack.enter_context(hub.fail("POST", "/commit/", status, message=f"no: {status}", times=1))
        assert answer_of(commits, hub) == [[status, f"no: {status}"] for status in statuses]
    assert hub.head("org/errors") == head


def test_broken_lines(hub: LocalHub) -> None:
    """A cut upload leaves the old revision and the next one completes; a cut download goes on; a Hub may be down."""
    hub.create("org/broken")
    before = hub.head("org/broken")
    push = """
import json, random
from huggingface_hub import HfApi
try:
    data = random.Random(1).randbytes(2_000_000)
    HfApi().upload_file(repo_id="org/broken", path_or_fileobj=data, path_in_repo="w.safetensors")
    print(json.dumps("done"))
except Exception as error:
    print(json.dumps([type(error).__name__, type(error.__cause__).__name__]))
"""
    with hub.cut("PUT", "/__lfs/", after_bytes=700_000) as fault:
        name, cause = answer_of(push, hub, fast_retries=True)
    assert name == "RuntimeError"
    assert cause in ("WriteError", "ReadError", "RemoteProtocolError")
    assert fault.hits == 6  # the first try and five more
    assert hub.head("org/broken") == before
    assert "w.safetensors" not in hub.files("org/broken")
    assert answer_of(push, hub) == "done"
    assert len(hub.files("org/broken")["w.safetensors"]) == 2_000_000

    pull = """
import json
from huggingface_hub import HfApi
try:
    print(json.dumps(len(open(HfApi().hf_hub_download("org/broken", "w.safetensors"), "rb").read())))
except Exception as error:
    print(json.dumps(type(error).__name__))
"""
    with hub.cut("GET", "/resolve/", after_bytes=1_000_000, times=1) as fault:
        assert answer_of(pull, hub, home=hub.home / "other", fast_retries=True) == 2_000_000
    assert fault.hits == 1
    with hub.down():
        assert answer_of(pull, hub, home=hub.home / "third", fast_retries=True) == "LocalEntryNotFoundError"
    assert answer_of(pull, hub, home=hub.home / "third") == 2_000_000

    head = hub.head("org/broken")
    with hub.lose_answer("POST", "/commit/", times=1):
        lost = """
import json
from huggingface_hub import HfApi
try:
    HfApi().upload_file(repo_id="org/broken", path_or_fileobj=b"z", path_in_repo="z.txt")
except Exception as error:
    print(json.dumps(type(error).__name__))
"""
        assert answer_of(lost, hub) in ("RemoteProtocolError", "ReadError")
    assert hub.head("org/broken") != head  # the commit was made all the same


def test_scripts_are_alone(hub: LocalHub) -> None:
    """A script reaches this host only, sees no blocked module and has no token unless it is given one."""
    code = """
import importlib.util, json, os, socket
found = [importlib.util.find_spec(name) is not None for name in ("yaml", "av")]
try:
    import yaml
except ModuleNotFoundError as error:
    imported = str(error)
try:
    socket.create_connection(("example.org", 80), timeout=1)
except OSError as error:
    reached = str(error)
print(json.dumps([found, imported, reached, os.environ.get("HF_TOKEN")]))
"""
    found, imported, reached, token = answer_of(code, hub, block=("yaml",), token=None)
    assert (found, imported, token) == ([False, True], "No module named 'yaml'", None)
    assert reached == "tests reach no host but this one, not example.org"
    with pytest.raises(pytest.fail.Exception, match=r"the script ended with 3"):
        run_script("raise SystemExit(3)", hub)
