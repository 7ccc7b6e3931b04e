"""Whatever is killed at whatever moment, and whatever becomes of the cache's files: after a remount every byte is right.

A round reads at random through a real mount, kills (daemon, workers, or all) at a random moment, does to the cache what its
variant says, mounts again and compares everything. A run that never found a half-written file has proven nothing and fails.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import cache_damage
from support.mounts import MountedSandbox, read_elsewhere, wait_until
from valohai_fuse.fetch.transfer import LAND_BYTES
from valohai_fuse.model.extents import BLOCK_BYTES
from valohai_fuse.model.manifest import stable_id
from valohai_fuse.model.segment import object_digest
from valohai_fuse.obs.runtime_dir import RuntimeDir
from valohai_fuse.sandbox import Sandbox, ramp
from valohai_fuse.sources import manifest_file

pytestmark = pytest.mark.mount

MIB = 1024 * 1024
FILES = {"big.bin": ramp(19 * MIB + 77), "other.bin": ramp(9 * MIB), "small.bin": ramp(70_001), "tiny": ramp(5)}
SETS = ("a", "b")
"""Two directories with these files each. Rounds take turns with them, for what one mount has compared the kernel has the pages
of: they would answer the next round's readers although the cache is empty."""
READERS = 4
KILL_AFTER_MAX_S = 0.1

Aftermath = Callable[[str, random.Random], None]


def nothing(cache_dir: str, chance: random.Random) -> None:
    """The kill alone."""


def rot(cache_dir: str, chance: random.Random) -> None:
    """One thing of each kind in each region, as far as there are files that have it."""
    files = cache_damage.paths(cache_dir)
    done = 0
    for region in cache_damage.REGIONS:
        for kind in cache_damage.KINDS:
            done += bool(files) and cache_damage.damage(chance.choice(files), region, kind, chance)
    assert done or not files


class Rounds:
    """Kills and remounts one sandbox's mount again and again."""

    def __init__(self, mounted: MountedSandbox, seed: int, aftermath: Aftermath) -> None:
        self.partial_rounds = 0
        """Kills that left a file without all of its blocks."""
        self.torn_rounds = 0
        """Those that fell between writing the bytes and writing what vouches for them."""
        self.behind_rounds = 0
        """Those among them that fell into writing a stream's bytes from memory to the disk, behind the readers' backs."""
        self._wrong: list[str] = []
        self._mounted = mounted
        self._chance = random.Random(seed)
        self._aftermath = aftermath
        self._sets = deque(SETS)
        self._digests = _digests(mounted.sandbox.config_dir)
        self._files: dict[str, str] = {}
        """Those of the set whose turn it is, with their digests."""

    def run(self, count: int) -> None:
        """`count` rounds; each begins with an empty cache, or every third time with what the last one left."""
        for number in range(count):
            continues = number % 3 == 2
            files = self._files if continues else self._turn()
            with self._load(list(files)):
                if not continues:
                    wait_until("something lands", lambda: bool(self._landed()), timeout_s=60)
                threading.Event().wait(self._chance.uniform(0.0, KILL_AFTER_MAX_S))
                self._kill(self._chance.choice(("daemon", "daemon", "workers", "all")))
            unmounted = self._mounted.unmount()
            assert unmounted.returncode == 0, unmounted.stderr
            for path in set(cache_damage.paths(self._mounted.cache_dir)) - set(self._landed()):
                path.unlink()  # of the other set
            self.partial_rounds += bool(cache_damage.partial_files(self._mounted.cache_dir))
            torn_bytes = cache_damage.torn_bytes(self._mounted.cache_dir)
            self.torn_rounds += torn_bytes > BLOCK_BYTES // 2
            self.behind_rounds += torn_bytes > 2 * LAND_BYTES
            self._aftermath(self._mounted.cache_dir, self._chance)
            again = self._mounted.mount()
            assert again.returncode == 0, again.stderr
            self._compare(number)

    def _turn(self) -> dict[str, str]:
        """Takes the other set."""
        self._sets.rotate()
        prefix = self._sets[0] + "/"
        self._files = {name: digest for name, digest in self._digests.items() if name.startswith(prefix)}
        return self._files

    def _landed(self) -> list[Path]:
        """What the cache holds of the set whose turn it is."""
        digests = set(self._files.values())
        return [path for path in cache_damage.paths(self._mounted.cache_dir) if path.stem in digests]

    @contextlib.contextmanager
    def _load(self, names: list[str]) -> Iterator[None]:
        """Readers at random places, until the block ends or their mount is gone."""
        over = threading.Event()
        readers = [
            threading.Thread(target=self._read, args=(names, random.Random(self._chance.random()), over))
            for _ in range(READERS)
        ]
        for reader in readers:
            reader.start()
        try:
            yield
        finally:
            over.set()
            for reader in readers:
                reader.join()
            assert not self._wrong

    def _read(self, names: list[str], chance: random.Random, over: threading.Event) -> None:
        """What is read before the kill has to be right as well."""
        while not over.is_set():
            name = chance.choice(names)
            start = chance.randrange(FILES[name.partition("/")[2]].size)
            with contextlib.suppress(OSError):  # the mount was shot
                with open(self._mounted.path("data", name), "rb", buffering=0) as file:
                    found = os.pread(file.fileno(), chance.choice((4096, MIB, 8 * MIB)), start)
                expected = self._mounted.sandbox.expected_bytes("data", name, start, start + len(found))
                if found != expected:
                    self._wrong.append(f"{name} at {start}, {len(found)} bytes")

    def _kill(self, whom: str) -> None:
        (record,) = RuntimeDir(self._mounted.runtime_dir).records()
        workers = _children(record.pid)
        for pid in workers if whom == "workers" else [record.pid, *workers] if whom == "all" else [record.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if whom != "workers":
            wait_until("the daemon's workers end with it", lambda: not any(map(_is_running, workers)))

    def _compare(self, number: int) -> None:
        for name in self._files:
            found = read_elsewhere(self._mounted.path("data", name))
            assert found == self._mounted.sandbox.expected_bytes("data", name), f"round {number}: {name}"


def _digests(config_dir: str) -> dict[str, str]:
    """File name -> how its segments' names begin."""
    manifest = manifest_file.load(config_dir)
    try:
        records = [(manifest.record(index), manifest.size(index)) for index in range(len(manifest))]
    finally:
        manifest.close()
    return {record.name: object_digest(stable_id(record), size or 0).hex() for record, size in records}


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


VARIANTS: dict[str, Aftermath] = {"kill": nothing, "rot": rot, "power": cache_damage.lose_power}
EXPECTED = ("failed its check", r"a fetch worker .* died", "cannot be read", "worker", "killed by signal 9")


def play(root: Path, variant: str, *, rounds: int, seed: int) -> Rounds:
    """Runs that many rounds on a sandbox of their own."""
    files = {f"{one}/{name}": content for one in SETS for name, content in FILES.items()}
    with Sandbox({"data": files}, root=root / "valohai") as sandbox:
        with MountedSandbox(sandbox, expected_warnings=EXPECTED) as mounted:
            played = Rounds(mounted, seed, VARIANTS[variant])
            played.run(rounds)
        return played


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_crashes(own_directories: Path, variant: str) -> None:
    """The short form; the long one is run by scripts/stress."""
    assert play(own_directories, variant, rounds=5, seed=7).partial_rounds > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_hundred_crashes(own_directories: Path, variant: str) -> None:
    """Half of the kills at least must have left a half-filled file, some a torn one, some in the middle of writing behind."""
    played = play(own_directories, variant, rounds=200, seed=11)
    print(
        f"{variant}: of 200 rounds {played.partial_rounds} left half-filled files, {played.torn_rounds} torn ones, "
        f"{played.behind_rounds} of them while a stream was written behind"
    )
    assert played.partial_rounds >= 100
    assert played.torn_rounds > 0
    assert played.behind_rounds > 0
