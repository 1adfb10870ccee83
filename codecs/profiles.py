"""Where codecs find profiles by id: those this process was given, then the directories of `KVSTORE_PROFILES`.

A profile's file is named `<id in hex>.kvprofile`. Files are mapped, not read, so that a large basis costs memory once
for all processes of a host and only where it is used.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from kvstore.codecs.profile import Profile, parse_profile
from kvstore.errors import ContainerError
from kvstore.outcome import Reason

SUFFIX = ".kvprofile"
DIRECTORIES_VARIABLE = "KVSTORE_PROFILES"
KNOWN_MAX = 256

_known: dict[bytes, Profile] = {}
_lock = threading.Lock()


def add(profile: Profile) -> None:
    """Make a profile known to this process. Raises ContainerError (full) if there are KNOWN_MAX others."""
    with _lock:
        if profile.id not in _known and len(_known) >= KNOWN_MAX:
            raise ContainerError(Reason.FULL, f"{KNOWN_MAX} profiles are known already")
        _known[profile.id] = profile


def get(profile_id: bytes) -> Profile:
    """The profile of that id.

    Raises:
        ContainerError: unknown_profile if it is nowhere; another reason if its file is damaged.
    """
    with _lock:
        found = _known.get(profile_id)
    if found is not None:
        return found
    for directory in filter(None, os.environ.get(DIRECTORIES_VARIABLE, "").split(os.pathsep)):
        path = Path(directory) / f"{profile_id.hex()}{SUFFIX}"
        if path.is_file():
            profile = load(path, profile_id=profile_id)
            add(profile)
            return profile
    raise ContainerError(
        Reason.UNKNOWN_PROFILE, f"profile {profile_id.hex()[:12]} is not here; fetch it from the store or calibrate"
    )


def load(path: str | Path, *, profile_id: bytes | None = None) -> Profile:
    """The profile in a file, mapped and checked. Raises ContainerError with the reason."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file cannot be mapped
        raise ContainerError(Reason.TRUNCATED, f"{path} is empty") from error
    except OSError as error:
        raise ContainerError(Reason.IO_ERROR, f"{path}: {error.strerror}") from error
    return parse_profile(memoryview(mapped), profile_id=profile_id)


def save(blob: bytes | memoryview, directory: str | Path) -> Path:
    """Write a profile under its name into a directory, whole or not at all; answers the path."""
    return save_as(blob, Path(directory) / f"{parse_profile(blob).id.hex()}{SUFFIX}")


def save_as(blob: bytes | memoryview, path: str | Path) -> Path:
    """Write a profile to a file, whole or not at all; answers the path."""
    profile = parse_profile(blob)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_bytes(profile.blob)
    partial.replace(target)
    return target
