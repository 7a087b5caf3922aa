from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cluster.serving import own_folder
from penstock.cluster.serving.own_folder import OwnFolder


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(own_folder, "_ROOT", tmp_path)
    return tmp_path


_KILLED = """
import os, pathlib, sys
from penstock.cluster.serving import own_folder

own_folder._ROOT = pathlib.Path(sys.argv[1])
folder = own_folder.OwnFolder()
(folder.path / "session").mkdir()
os.kill(os.getpid(), 9)
"""


def test_a_killed_server_leaves_its_folder_to_the_next(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(root)], timeout=60, check=False)
    assert done.returncode == -9
    (abandoned,) = root.iterdir()
    folder = OwnFolder()
    assert not abandoned.exists()
    folder.remove()
    assert not list(root.iterdir())


def test_what_is_anothers_stays(root: Path) -> None:
    living = OwnFolder()
    unlocked = root / "penstock-without-a-lock"
    unlocked.mkdir()
    log = root / "penstock-1.log"
    log.touch()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "lock").touch()
    (root / "penstock-link").symlink_to(root / "elsewhere")
    OwnFolder().remove()
    assert {path.name for path in root.iterdir()} == {
        living.path.name,
        unlocked.name,
        log.name,
        "elsewhere",
        "penstock-link",
    }
    assert (root / "elsewhere" / "lock").exists()
    living.remove()
