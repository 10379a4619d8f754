"""Other hosts and other installations than this one, for real: commands whose /dev/kvm is hidden or forbidden, and a
Python that has not got a library, or has a broken one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDE = """
set -e
new=$1; shift
mount -t tmpfs -o mode=755 none "$new"
for name in null zero full random urandom tty; do
    [ -e /dev/$name ] || continue
    : >"$new/$name"
    mount --bind /dev/$name "$new/$name"
done
for name in fd stdin stdout stderr; do ln -s "$(readlink /dev/$name)" "$new/$name"; done
mkdir "$new/shm"
mount --bind "$new" /dev
exec "$@"
"""
"""A /dev that has all that a program needs, and no kvm."""
FORBID = """
set -e
new=$1; shift
: >"$new/kvm"
chmod 000 "$new/kvm"
mount --bind "$new/kvm" /dev/kvm
exec setpriv --bounding-set -dac_override,-dac_read_search --inh-caps -dac_override,-dac_read_search "$@"
"""
"""A /dev/kvm that root itself may not open, being without the power over permissions."""


@cache
def _namespace() -> tuple[str, ...]:
    """The command that gives a mount namespace; empty where none may be had."""
    for command in (("unshare", "-m"), ("unshare", "-Urm")):
        try:
            if not subprocess.run([*command, "mount", "--bind", "/dev", "/dev"], capture_output=True).returncode:
                return command
        except OSError:
            pass
    return ()


def without_kvm(command: Sequence[str], folder: Path, *, how: str = HIDE) -> list[str]:
    """The command as it runs on a host without /dev/kvm (HIDE), or where it may not be opened (FORBID).

    `folder`: an empty one, for mounts that end with the command. Skips the test where namespaces are not to be had.
    """
    if not _namespace():
        pytest.skip("no mount namespace may be made here")
    if how is FORBID and not (os.path.exists("/dev/kvm") and shutil.which("setpriv")):
        pytest.skip("needs a /dev/kvm to forbid, and setpriv")
    return [*_namespace(), "sh", "-c", how, "sh", str(folder), *command]


def site_packages() -> Path:
    return Path(sysconfig.get_paths()["platlib"])


def other_python(folder: Path, without: Iterable[str] = ()) -> tuple[list[str], dict[str, str]]:
    """A Python with the same packages as this one but for those named: its command, and its environment. `folder` is
    where it finds them, and where a test may put others."""
    missing = tuple(without)
    for path in site_packages().iterdir():
        if not path.name.endswith(".pth") and not path.name.startswith(missing or "\0"):
            (folder / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("LIBUNICORN_PATH", None)
    return [sys.executable, "-S"], environment


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
