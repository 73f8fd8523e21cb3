"""Models of the hub: the copy in the local cache, else a download that is announced first."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from flowcache.errors import UserError, first_line
from flowcache.runtime.ending import Place
from flowcache.runtime.stats import scaled

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 20
"""How long the hub may take to say what a repository holds."""
_FAULTS = (HTTPError, OSError, ValueError, RuntimeError)
"""What its client raises: of the network, the disk, wrong names, its fast transfer."""


@dataclass(frozen=True)
class Hub:
    """What is asked of the hub's client.

    Attributes:
        info: as `HfApi.model_info`.
        snapshot: as `snapshot_download`.
    """

    info: Callable[..., Any] = HfApi().model_info
    snapshot: Callable[..., Any] = snapshot_download


HUB = Hub()


@dataclass(frozen=True)
class Missing:
    """Files of a repository that the local cache lacks."""

    repository: str
    num_files: int
    num_bytes: int
    cache: Path

    @property
    def free_bytes(self) -> int:
        """Room on the disk of the cache."""
        existing = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        return shutil.disk_usage(existing).free

    def describe(self) -> str:
        """Say what is to be downloaded, how large it is, and where to."""
        return (
            f"{self.repository}, {self.num_files} files, {scaled(self.num_bytes, 'B')}, "
            f"to {self.cache} ({scaled(self.free_bytes, 'B')} free)"
        )

    def check_room(self) -> None:
        """Check that the disk has room for the files."""
        if self.num_bytes > self.free_bytes:
            raise UserError(
                f"{self.repository}: {scaled(self.num_bytes, 'B')} are to be downloaded, but "
                f"{self.cache} has {scaled(self.free_bytes, 'B')} free: set HF_HOME to a folder on "
                "a larger disk"
            )


def local_copy(
    repository: str,
    *,
    patterns: list[str] | None = None,
    is_whole: Callable[[Path], bool],
    hub: Hub = HUB,
) -> Path | None:
    """Return the folder of a whole copy in the local cache, or None; no network is used.

    Args:
        patterns: of the files that are wanted; None: all.
    """
    try:
        options = {"allow_patterns": patterns, "local_files_only": True}
        folder = Path(hub.snapshot(repository, **options))
    except OSError:  # not there, or not whole
        return None
    except ValueError as error:
        _refuse(repository, error)
    return folder if is_whole(folder) else None


def find_missing(repository: str, *, patterns: list[str] | None = None, hub: Hub = HUB) -> Missing:
    """Ask the hub what a repository holds, and return what of it the local cache lacks."""
    try:
        found = hub.info(repository, files_metadata=True, timeout=ANSWER_SECONDS)
    except _FAULTS as error:
        _refuse(repository, error)
    wanted = filter_repo_objects(found.siblings, allow_patterns=patterns, key=_name)
    lacking = [
        file
        for file in wanted
        if not isinstance(
            try_to_load_from_cache(repository, file.rfilename, revision=found.sha), str
        )
    ]
    return Missing(
        repository,
        num_files=len(lacking),
        num_bytes=sum(file.size or 0 for file in lacking),
        cache=Path(constants.HF_HUB_CACHE),
    )


def _name(file: Any) -> str:
    return file.rfilename


def fetch(
    repository: str,
    *,
    patterns: list[str] | None = None,
    is_whole: Callable[[Path], bool],
    hub: Hub = HUB,
) -> Path:
    """Return the folder of a repository: the local copy, or else a download.

    Args:
        patterns: of the files that are wanted; None: all.
    """
    found = local_copy(repository, patterns=patterns, is_whole=is_whole, hub=hub)
    if found is not None:
        return found
    missing = find_missing(repository, patterns=patterns, hub=hub)
    missing.check_room()
    if missing.num_files and Place.of(os.environ).rank == 0:
        logger.info("downloading  %s", missing.describe())
    try:
        return Path(hub.snapshot(repository, allow_patterns=patterns))
    except _FAULTS as error:
        _refuse(repository, error)


def split_file(text: str) -> tuple[str, str]:
    """Return repository and file of `ORG/NAME/FILE`.

    Raises:
        UserError: it is something else, as the path of a file that is missing.
    """
    parts = text.split("/", 2)
    if len(parts) < 3 or not all(parts) or parts[0] in (".", "..", "~"):
        raise UserError(f"{text}: no such file; give its path, or ORG/NAME/FILE of the hub")
    return "/".join(parts[:2]), parts[2]


def fetch_file(text: str, *, hub: Hub = HUB) -> Path:
    """Return a file of the hub, `ORG/NAME/FILE`: the local copy, or else a download."""
    repository, file = split_file(text)
    folder = fetch(repository, patterns=[file], is_whole=lambda at: (at / file).is_file(), hub=hub)
    return folder / file


def find_missing_file(text: str, *, hub: Hub = HUB) -> Missing | None:
    """Return what `fetch_file` would download; None: nothing."""
    repository, file = split_file(text)
    is_there = local_copy(
        repository, patterns=[file], is_whole=lambda at: (at / file).is_file(), hub=hub
    )
    return None if is_there else find_missing(repository, patterns=[file], hub=hub)


def _refuse(repository: str, error: Exception) -> NoReturn:
    """Raise the line that says why a repository is not to be had."""
    causes = list(_causes(error))

    def has(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    copy = "or give the folder of a copy"
    if has(GatedRepoError):
        reason = (
            "its owner asks every user to accept terms: do so on its page of the hub and log in "
            f"with `hf auth login`, {copy}"
        )
    elif has(RepositoryNotFoundError):
        reason = (
            "the hub has no such model, or a private one: check the name, log in with "
            f"`hf auth login`, {copy}"
        )
    elif has(OfflineModeIsEnabled):
        reason = f"HF_HUB_OFFLINE forbids a download to {constants.HF_HUB_CACHE}: unset it, {copy}"
    else:
        first = first_line(error)
        reason = f"not to be had from the hub ({first}): check name and network, {copy}"
    raise UserError(f"{repository}: no local copy, and {reason}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
