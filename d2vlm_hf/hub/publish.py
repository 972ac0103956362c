# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Publishing a checkpoint folder on the Hub, in one commit that replaces nothing it does not know."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from .checkpoint_folder import RECORD, check_folder, is_stale, list_files, safe_save


logger = logging.getLogger(__name__)


class PushError(RuntimeError):
    """A push that did not happen; the message says why, what stands on the Hub, and what to do."""


@dataclass(frozen=True)
class PushReport:
    """What a push did, or would do.

    Args:
        repo_id (`str`): The repository.
        revision (`str`): The branch.
        files (`list[tuple[str, int]]`): Path and size in bytes of every file of the folder that belongs on the Hub.
        deleted (`list[str]`): Files that were removed from the Hub because the folder has none in their place.
        commit (`str`, *optional*): The revision that now stands on the Hub; None for a dry run.
        url (`str`, *optional*): Page of the repository.
        changed (`bool`): Whether a commit was made; False if the Hub had all of it.
        warnings (`list[str]`): What is missing, though it keeps nobody from loading the checkpoint.
    """

    repo_id: str
    revision: str
    files: list[tuple[str, int]]
    deleted: list[str] = field(default_factory=list)
    commit: str | None = None
    url: str | None = None
    changed: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Size of all files together."""
        return sum(size for _, size in self.files)

    def __str__(self) -> str:
        lines = [f"{size:>15,}  {path}" for path, size in self.files]
        lines.append(f"{self.total_bytes:>15,}  bytes in {len(self.files)} files for {self.repo_id} ({self.revision})")
        return "\n".join(lines + [f"note: {warning}" for warning in self.warnings])


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    commit_message: str = "Upload D2VLM checkpoint",
) -> PushReport:
    """Push a saved checkpoint (model, processor, pipeline code, card, licence) to the Hub in one commit.

    What is on the Hub stays as it is unless all of the new files have arrived. A revision that this folder does not
    know (one that somebody else pushed) is not overwritten, and the server is asked to refuse if one comes in between.

    Args:
        folder (`str`): Folder of the checkpoint.
        repo_id (`str`): "owner/name"; the repository is made if there is none.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        token (`str`, *optional*): Token of the Hub, by default that of the login.
        revision (`str`, *optional*): Branch, by default "main"; it is made if there is none.
        force (`bool`, *optional*, defaults to `False`): Overwrite a revision that this folder does not know.
        dry_run (`bool`, *optional*, defaults to `False`): Only check the folder and list files; nothing is asked of the
            Hub.
        commit_message (`str`, *optional*): Title of the commit.

    Returns:
        `PushReport`: Files, sizes and the revision on the Hub.

    Raises:
        ValueError: If the folder is no complete checkpoint or `repo_id` is no "owner/name".
        PushError: If the Hub could not be reached, refused, or holds a revision that this folder does not know.
    """
    folder, branch = Path(folder), revision or "main"
    warnings = check_folder(folder)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo_id):
        raise ValueError(
            f"repo_id is {repo_id!r}, but the Hub names a repository by owner and name: write 'owner/name'."
        )
    paths = list_files(folder)
    report = PushReport(repo_id, branch, [(path, (folder / path).stat().st_size) for path in paths], warnings=warnings)
    if dry_run:
        return report
    if not (token or get_token()):
        raise PushError(f"Not pushed to {repo_id}: there is no token of the Hub. Run `hf auth login`, or set HF_TOKEN.")
    api = HfApi(token=token)
    with _explained(repo_id, "looking at the repository"):
        url, head, new = _prepare(api, repo_id, branch, private)
        tree = api.list_repo_tree(repo_id, recursive=True, revision=head)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    known = new or head in _known_revisions(folder, repo_id) or set(remote) <= {".gitattributes"}
    # the same content: a push whose answer was lost
    if not (known or force or _same_content(folder, paths, remote)):
        raise PushError(
            f"Not pushed to {repo_id}: {branch!r} stands at {head[:8]}, which this folder was neither pushed to nor "
            "downloaded from, so a push would overwrite somebody's work. Look at it, or push with force=True (--force)."
        )
    gone = [path for path in remote if path not in paths and is_stale(path)]
    operations = [CommitOperationAdd(path, str(folder / path)) for path in paths]
    with _explained(repo_id, "uploading", head):
        commit = api.create_commit(
            repo_id,
            [*operations, *(CommitOperationDelete(path) for path in gone)],
            commit_message=commit_message,
            revision=branch,
            parent_commit=head,
        )
    record_revision(folder, repo_id, commit.oid, branch)
    return PushReport(repo_id, branch, report.files, gone, commit.oid, url, commit.oid != head, warnings)


def record_revision(folder: str | os.PathLike[str], repo_id: str, commit: str, revision: str = "main") -> None:
    """Note in the folder which revision of a repository it holds, so that the next push knows what it replaces.

    Args:
        folder (`str`): Folder of the checkpoint.
        repo_id (`str`): The repository.
        commit (`str`): Revision that the folder was pushed to or downloaded from.
        revision (`str`, *optional*, defaults to `"main"`): The branch.
    """
    known = _read_record(Path(folder))
    known.setdefault(repo_id, {})[revision] = commit
    path = Path(folder) / RECORD
    path.with_suffix(".tmp").write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def _prepare(api: HfApi, repo_id: str, branch: str, private: bool) -> tuple[str, str, bool]:
    """Make the repository and the branch if there are none; return page, revision, and whether the branch is new."""
    url, new = f"{api.endpoint}/{repo_id}", False
    try:
        info = api.model_info(repo_id, revision=branch)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
        info, new = api.model_info(repo_id), True
    except RevisionNotFoundError:
        info, new = api.model_info(repo_id), True
    if private and not info.private:
        raise PushError(
            f"Not pushed to {repo_id}: a private push was asked for, and the repository is public. Make it private on "
            "its page of settings first, or push without private=True (--private)."
        )
    if new and branch != "main":
        api.create_branch(repo_id, branch=branch, revision=info.sha)
    return url, info.sha, new


def _read_record(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        logger.warning("%s is broken and counts as empty", path)
        return {}


def _known_revisions(folder: Path, repo_id: str) -> set[str]:
    """Return the revisions that the folder was pushed to or downloaded from."""
    known = set(_read_record(folder).get(repo_id, {}).values())
    for name in ("config.json", "adapter_config.json"):
        downloaded = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"  # of `local_dir=` downloads
        if downloaded.is_file():
            known.add(downloaded.read_text(encoding="utf-8").split("\n", 1)[0].strip())
    return known


def _same_content(folder: Path, paths: list[str], remote: dict[str, Any]) -> bool:
    """Tell whether the Hub holds exactly the files of the folder, sizes first."""
    leftover = [path for path in remote if path not in paths and is_stale(path)]
    if leftover or any(path not in remote or remote[path].size != (folder / path).stat().st_size for path in paths):
        return False
    for path in paths:
        with open(folder / path, "rb") as file:
            lfs = remote[path].lfs
            local = sha_fileobj(file).hex() if lfs else git_hash(file.read())
        if local != (lfs.sha256 if lfs else remote[path].blob_id):
            return False
    return True


@contextmanager
def _explained(repo_id: str, doing: str, head: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence for people."""
    try:
        yield
    except PushError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        raise PushError(_explain(error, repo_id, doing, head)) from error


def _explain(error: BaseException, repo_id: str, doing: str, head: str | None) -> str:
    """Say what went wrong, what stands on the Hub, and what to do."""
    cause = error
    while not isinstance(cause, HTTPError) and cause.__cause__ is not None:
        cause = cause.__cause__
    stands = f"{repo_id} still stands at {head[:8]}." if head else "Nothing was changed."
    if isinstance(cause, OfflineModeIsEnabled):
        return f"Not pushed to {repo_id}: HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it and push again."
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        told = " ".join((cause.server_message or str(cause)).split())
        return f"Not pushed to {repo_id}: {_REFUSALS.get(status, _FAULT if status >= 500 else _OTHER)} " + (
            f"{stands} (The Hub says {status}: {told})"
        )
    told = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    if not isinstance(cause, HTTPError):
        return f"Not pushed to {repo_id}: {doing} failed ({told}). {stands}"
    if head is None:
        return f"Not pushed to {repo_id}: the Hub cannot be reached ({told}). Look at the network and push again."
    return (
        f"The push to {repo_id} was cut off: the connection broke while {doing} ({told}). Unless the last request had "
        f"arrived, {stands} Push again: what has arrived is not sent twice, and a push that was complete is noticed."
    )


_REFUSALS = {
    401: "the Hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to a valid one.",
    403: "this token has no right to write there. Take a token with write access, or ask the owner for it.",
    404: "the Hub did not find it. Check the name of the repository and the branch.",
    409: "a repository of that name exists, but it is none that you can see: it belongs to somebody else or is of "
    "another type. Choose another name.",
    412: "somebody else pushed in the meantime. Look at what they pushed, then push again.",
}
_FAULT = "the Hub has a fault of its own. Push again later."
_OTHER = "the Hub refused."

__all__ = ["PushError", "PushReport", "check_folder", "list_files", "push", "record_revision", "safe_save"]
