"""Who is measured: valohai-fuse, the mounts that exist, and the downloads that people write instead.

A peer is data: how its command line is made for a `Place`, and whether it mounts or downloads. Every peer shows an input's
files at `place.inputs_dir/<input>/<name>`, so the reader is the same for all. `running` starts one, says when it answers,
and leaves no mount, process or file behind whatever happens.

Peers that cannot mount a URL with a query string get the same bytes unsigned, from a listing (which ours does without), or
from a public bucket.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import store as bench_store
from benchmarks.dataset import DataFile
from benchmarks.meters import Tree
from benchmarks.provision import Tools

_READY_WITHIN_S = 60.0
_STOP_WITHIN_S = 15.0
_LOOP = Path(__file__).with_name("requests_loop.py")

OURS = "valohai-fuse"
PLAIN = "plain"


class PeerFailedError(Exception):
    """A peer did not start, answer, download or stop; the message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and for what a peer runs: one input of the store, seen at one distance, and a directory of its own."""

    tools: Tools
    store: bench_store.Store
    profile: bench_store.Profile
    input_name: str
    files: tuple[DataFile, ...]
    root: Path
    threads: int = 1

    @property
    def inputs_dir(self) -> Path:
        """The peer's files are below `<input>/` of this."""
        return self.root / "inputs"

    @property
    def mountpoint(self) -> Path:
        """Where the input's files appear."""
        return self.inputs_dir / self.input_name

    @property
    def cache_dir(self) -> Path:
        """Empty before each run."""
        return self.root / "cache"

    @property
    def ca(self) -> str | None:
        """The store's certificate, where the profile has TLS."""
        return str(self.store.ca_path) if self.profile.tls else None

    @property
    def listing_url(self) -> str:
        """The input as a directory listing, unsigned."""
        return self.store.plain_url(self.profile, f"{self.input_name}/")


@dataclass(frozen=True, slots=True)
class Peer:
    """`command` may write configuration below `place.root`; `kind` is mount, download or plain."""

    name: str
    kind: str
    command: Callable[[Place], list[str]]
    needs: str = ""
    """The tool without which it is left out."""
    caches: bool = False
    only: re.Pattern[str] | None = None
    """Workloads that this form is meant for; None: all."""


# --- command lines ----------------------------------------------------------------------------------------------------


def _locations(place: Place) -> list[str]:
    return [
        *("--config-dir", str(place.root / "config"), "--inputs-dir", str(place.inputs_dir)),
        *("--cache-dir", str(place.cache_dir), "--runtime-dir", str(place.root / "run")),
    ]


def _write_config(place: Place) -> None:
    inputs = {place.input_name: place.files}
    bench_store.write_config(place.root / "config", place.store, place.profile, inputs, place.inputs_dir)


def valohai_fuse(place: Place, *, foreground: bool = True) -> list[str]:
    """Ours, with nothing but its locations set: what is measured is the defaults."""
    _write_config(place)
    flags = ["--foreground"] if foreground else []
    trust = ["--ca-file", place.ca] if place.ca else []
    return [sys.executable, "-m", "valohai_fuse", "mount", *flags, *_locations(place), *trust]


def _rclone(*options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        trust = ["--ca-cert", place.ca] if place.ca else []
        return [
            *(str(place.tools.rclone), "mount", ":http:", str(place.mountpoint), "--http-url", place.listing_url),
            *("--config", str(place.root / "rclone.conf"), "--cache-dir", str(place.cache_dir), "--read-only"),
            *("--dir-cache-time", "1h", "--attr-timeout", "1h", *options, *trust),
        ]

    return command


def _httpdirfs(*options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        trust = ["--cacert", place.ca] if place.ca else []
        located = ["--cache-location", str(place.cache_dir)] if "--cache" in options else []
        # Version 1.2.5 looks for Accept-Ranges in a 206, where nginx does not repeat it, and exits.
        return [
            "httpdirfs",
            "-f",
            "--no-range-check",
            *options,
            *located,
            *trust,
            place.listing_url,
            str(place.mountpoint),
        ]

    return command


def _s3fs(place: Place) -> list[str]:
    place.store.list_bucket(place.input_name, place.files)
    trust = ["env", f"CURL_CA_BUNDLE={place.ca}"] if place.ca else []
    located = f"url={place.store.bucket_url(place.profile)},use_path_request_style,public_bucket=1,ro"
    # Its defaults are 5 parts of 10 MB at once, a listing of 1,000 files and stats that are asked again after 15 minutes.
    tuned = f"use_cache={place.cache_dir},parallel_count=8,max_stat_cache_size=1000000,stat_cache_expire=3600"
    return [*trust, "s3fs", place.input_name, str(place.mountpoint), "-f", "-o", f"{located},{tuned}"]


def _urls(place: Place) -> list[tuple[str, str]]:
    return [
        (place.store.signed_url(place.profile, file.path), str(place.inputs_dir / file.path)) for file in place.files
    ]


def _curl(place: Place) -> list[str]:
    config = place.root / "curl.conf"
    config.write_text("".join(f'url = "{url}"\noutput = "{path}"\n' for url, path in _urls(place)))
    trust = ["--cacert", place.ca] if place.ca else []
    parallel = ["--parallel", "--parallel-max", str(place.threads)] if place.threads > 1 else []
    return ["curl", "--silent", "--show-error", "--fail", *parallel, *trust, "--config", str(config)]


def _aria2c(place: Place) -> list[str]:
    listed = place.root / "aria2.txt"
    listed.write_text(
        "".join(f"{url}\n dir={Path(path).parent}\n out={Path(path).name}\n" for url, path in _urls(place))
    )
    trust = [f"--ca-certificate={place.ca}"] if place.ca else []
    shape = ["-x8", "-s8", "-k1M", f"-j{place.threads}", "--file-allocation=none", "--quiet", "--no-conf"]
    return ["aria2c", *shape, *trust, "-i", str(listed)]


def _requests(place: Place) -> list[str]:
    listed = place.root / "urls.txt"
    listed.write_text("".join(f"{url}\t{path}\n" for url, path in _urls(place)))
    return [str(place.tools.peers_python), str(_LOOP), str(listed), str(place.threads), place.ca or ""]


def _valohai_utils(place: Place) -> list[str]:
    _write_config(place)
    variables = [f"VH_CONFIG_DIR={place.root / 'config'}", f"VH_INPUTS_DIR={place.inputs_dir}", "VH_JOB_ID=bench"]
    trust = [f"REQUESTS_CA_BUNDLE={place.ca}"] if place.ca else []
    code = f"import valohai; assert len(list(valohai.inputs({place.input_name!r}).paths())) == {len(place.files)}"
    return ["env", *variables, *trust, str(place.tools.peers_python), "-c", code]


def _nothing(_place: Place) -> list[str]:
    return []


_STREAMS = ("--vfs-cache-mode", "off", "--vfs-read-chunk-streams", "8", "--vfs-read-chunk-size", "8M")
_SMALL_CHUNKS = ("--vfs-cache-mode", "off", "--vfs-read-chunk-size", "256k", "--buffer-size", "0")

PEERS: tuple[Peer, ...] = (
    Peer(OURS, "mount", valohai_fuse, caches=True),
    Peer("rclone", "mount", _rclone("--vfs-cache-mode", "off"), needs="rclone"),
    Peer("rclone-full", "mount", _rclone("--vfs-cache-mode", "full"), needs="rclone", caches=True),
    Peer(
        "rclone-streams", "mount", _rclone(*_STREAMS), needs="rclone", only=re.compile("seq|files-4|mmap-seq|skip|back")
    ),
    Peer(
        "rclone-256k",
        "mount",
        _rclone(*_SMALL_CHUNKS),
        needs="rclone",
        only=re.compile("random|records|first|stride|head|zip|parquet"),
    ),
    Peer("httpdirfs", "mount", _httpdirfs("--cache"), needs="httpdirfs", caches=True),
    Peer(
        "httpdirfs-nocache",
        "mount",
        _httpdirfs(),
        needs="httpdirfs",
        only=re.compile("random|records|first|head|find|stride|parquet"),
    ),
    Peer("s3fs", "mount", _s3fs, needs="s3fs", caches=True),
    Peer("curl", "download", _curl, needs="curl"),
    Peer("aria2c", "download", _aria2c, needs="aria2c"),
    Peer("requests", "download", _requests, needs="peers_python"),
    Peer("valohai-utils", "download", _valohai_utils, needs="peers_python", only=re.compile("region|seq-near|small")),
    Peer(PLAIN, "plain", _nothing),
)


# --- running one ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(peer: Peer, place: Place) -> Iterator[Tree]:
    """Starts a mount, yields its process tree once it answers, takes it away at the end. Raises PeerFailedError."""
    place.mountpoint.mkdir(parents=True, exist_ok=True)
    place.cache_dir.mkdir(parents=True, exist_ok=True)
    said = place.root / "peer.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            peer.command(place), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=Path.cwd()
        )
    try:
        wait_mounted(place.mountpoint, process, said)
        yield Tree([process.pid])
    finally:
        stop(process, place.mountpoint)


def download(peer: Peer, place: Place, *, timeout_s: float) -> tuple[float, subprocess.Popen[bytes]]:
    """Starts the download; the caller meters it and calls `finish_download`. Returns (start, process)."""
    if timeout_s <= 0:
        raise PeerFailedError("no time left")
    place.mountpoint.mkdir(parents=True, exist_ok=True)
    command = peer.command(place)
    with (place.root / "peer.log").open("wb") as log:
        began_s = time.perf_counter()
        return began_s, subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def last_words(log: Path) -> str:
    """The end of what a peer said, on one line, queries of URLs cut off."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return re.sub(r"\?\S*", "?...", " | ".join(text.strip().splitlines()[-4:]))[-400:]


def stop(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """Unmounts, ends the process by its pid, and insists. Raises PeerFailedError when the mount is still there."""
    unmount(mountpoint)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_WITHIN_S / 3)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_WITHIN_S)
    if _mounted(mountpoint):
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, capture_output=True)
    if _mounted(mountpoint):
        raise PeerFailedError(f"{mountpoint} is still mounted")


def unmount(mountpoint: Path) -> None:
    """Asks once, nicely."""
    if _mounted(mountpoint):
        tool = "fusermount3" if shutil.which("fusermount3") else "fusermount"
        subprocess.run([tool, "-u", str(mountpoint)], check=False, capture_output=True)


def _mounted(path: Path) -> bool:
    """From the kernel's table: a stat could hang on a dead mount."""
    escaped = str(path).replace(" ", "\\040")
    return any(line.split()[4] == escaped for line in Path("/proc/self/mountinfo").read_text().splitlines())


def wait_mounted(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when `path` is a mount that answers a stat. Raises PeerFailedError when it does not come up."""
    give_up_at_s = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < give_up_at_s:
        if _mounted(path):
            os.stat(path)  # returns when the peer answers
            return
        if process.poll() is not None:
            raise PeerFailedError(f"ended with {process.returncode}: {last_words(log)}")
        time.sleep(0.005)
    raise PeerFailedError(f"no mount within {_READY_WITHIN_S:.0f} s: {last_words(log)}")
