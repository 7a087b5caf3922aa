"""A server's own folder: locked as long as it lives, so that the next server can remove what a killed one has left."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

# Ray's socket paths have at most 107 characters (103 on macOS): no place for a long TMPDIR
_ROOT = Path("/tmp")
_PREFIX = "penstock-"
_LOCK = "lock"


class OwnFolder:
    """Makes a folder, and removes those whose servers are gone."""

    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_ROOT))
        made = self.path / "unlocked"
        self._lock = made.open("w")  # not inherited by Ray's processes: when we die, the system lets go of it
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # under its name it is locked from the start
        made.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove it; what cannot be removed is left to the next server."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned() -> None:
    for path in _ROOT.glob(f"{_PREFIX}*"):
        try:
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            with (path / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # locked by its server, without a lock yet, or gone meanwhile
            continue
