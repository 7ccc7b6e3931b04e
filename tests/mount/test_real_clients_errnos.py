"""What a program is told when it cannot have its bytes, and what it never notices: every row of the table in docs/semantics.md.

Readers are other processes (`read_elsewhere`), so a read that would hang fails its test and not the run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator

import pytest

from support.mounts import GIVEN_UP, MountInputs, read_elsewhere
from valohai_fuse.sandbox import faults
from valohai_fuse.sandbox.content import Ramp, ramp

SIZE_BYTES = 3_000_000
ALWAYS = None


@contextlib.contextmanager
def fails_with(number: int) -> Iterator[None]:
    """The block must end with an OSError of that errno."""
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}]")):
        yield


def test_a_name_that_does_not_exist(mount_inputs: MountInputs) -> None:
    """No such name: ENOENT, without asking anybody."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}})
    with fails_with(errno.ENOENT):
        read_elsewhere(mounted.path("data", "b.bin"))
    assert mounted.sandbox.requests == []


def test_a_write(mount_inputs: MountInputs) -> None:
    """Any write, create, rename, unlink, chmod: EROFS."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}})
    path = mounted.path("data", "a.bin")
    for write in (
        lambda: os.open(path, os.O_WRONLY),
        lambda: os.open(path.with_name("new"), os.O_WRONLY | os.O_CREAT),
        lambda: os.unlink(path),
        lambda: os.rename(path, path.with_name("new")),
        lambda: os.chmod(path, 0o777),
        lambda: os.mkdir(path.with_name("new")),
        lambda: os.truncate(path, 0),
    ):
        with fails_with(errno.EROFS):
            write()


@pytest.mark.parametrize("code", [404, 410])
def test_an_object_that_is_gone(code: int, mount_inputs: MountInputs) -> None:
    """The store says 404 or 410: the read fails with EIO, and the next open with ENOENT."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}}, expected_warnings=GIVEN_UP)
    mounted.sandbox.store.faults.add(faults.status(code), count=ALWAYS)
    with fails_with(errno.EIO):
        read_elsewhere(mounted.path("data", "a.bin"))
    with fails_with(errno.ENOENT):
        read_elsewhere(mounted.path("data", "a.bin"))


def test_access_that_stays_refused(mount_inputs: MountInputs) -> None:
    """Access refused after one renewal: EACCES, after exactly one POST."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}}, expected_warnings=GIVEN_UP)
    mounted.sandbox.store.faults.add(faults.denied(), count=ALWAYS)
    with fails_with(errno.EACCES):
        read_elsewhere(mounted.path("data", "a.bin"))
    assert len(mounted.sandbox.api.exchanges()) == 1


def test_a_dead_token(mount_inputs: MountInputs) -> None:
    """The URLs are dead and the execution's token too: EACCES."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}}, expected_warnings=GIVEN_UP)
    mounted.sandbox.expire_urls()
    mounted.sandbox.api.faults.add(faults.status(401), count=ALWAYS)
    with fails_with(errno.EACCES):
        read_elsewhere(mounted.path("data", "a.bin"))


def test_an_object_that_changes_while_it_is_read(mount_inputs: MountInputs) -> None:
    """The ETag is not what it was: ESTALE, and never bytes of two versions."""
    size = 200_000_000
    mounted = mount_inputs({"data": {"a.bin": ramp(size)}}, options=("--readahead=0",), expected_warnings=GIVEN_UP)
    with open(mounted.path("data", "a.bin"), "rb", buffering=0) as file:
        assert file.read(100) == mounted.sandbox.expected_bytes("data", "a.bin", 0, 100)
        mounted.sandbox.replace_object("data", "a.bin", Ramp(size, shift=7))
        with fails_with(errno.ESTALE):
            os.pread(file.fileno(), 100, size - 4096)


def test_an_object_that_is_smaller_than_it_was(mount_inputs: MountInputs) -> None:
    """The size is not what inputs.json says: ESTALE, never a short read."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}}, expected_warnings=GIVEN_UP)
    mounted.sandbox.replace_object("data", "a.bin", ramp(SIZE_BYTES - 1))
    with fails_with(errno.ESTALE):
        read_elsewhere(mounted.path("data", "a.bin"))


def test_a_store_that_stays_away(mount_inputs: MountInputs) -> None:
    """A read ends within --read-timeout, then ETIMEDOUT; `ls` and `stat` stay fast meanwhile."""
    mounted = mount_inputs(
        {"data": {"a.bin": ramp(SIZE_BYTES)}}, options=("--read-timeout=3",), expected_warnings=GIVEN_UP
    )
    mounted.sandbox.stop_store()
    began = time.monotonic()
    with fails_with(errno.ETIMEDOUT):
        read_elsewhere(mounted.path("data", "a.bin"))
    assert 2.5 < time.monotonic() - began < 8
    began = time.monotonic()
    assert os.listdir(mounted.path("data")) == ["a.bin"]
    assert time.monotonic() - began < 1


def test_a_redirect_to_a_file(mount_inputs: MountInputs) -> None:
    """Nothing makes it read outside the stores: a redirect to file: is EIO."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}}, expected_warnings=GIVEN_UP)
    mounted.sandbox.store.faults.add(faults.redirect_to("file:///etc/passwd"), count=ALWAYS)
    with fails_with(errno.EIO):
        read_elsewhere(mounted.path("data", "a.bin"))


def test_what_a_reader_never_notices(mount_inputs: MountInputs) -> None:
    """Resets, cuts, 503, a wrong range, expired URLs and a store that is away for a moment cost time, not bytes."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}}, expected_warnings=GIVEN_UP)
    script = mounted.sandbox.store.faults
    for number, fault in enumerate(
        [
            faults.reset_after(100_000),
            faults.truncate_after(70_000),
            faults.throttled(503),
            faults.bad_gateway(),
            faults.wrong_range_start(),
            faults.expired(),
        ],
        start=1,
    ):
        script.add(fault, first=number)
    mounted.sandbox.expire_urls()
    assert read_elsewhere(mounted.path("data", "a.bin")) == mounted.sandbox.expected_bytes("data", "a.bin")
    mounted.sandbox.assert_token_never_leaked()


def test_a_cached_file_needs_nobody(mount_inputs: MountInputs) -> None:
    """A cached byte is served without the network, also when the store and the API are down, also after a remount."""
    mounted = mount_inputs({"data": {"a.bin": ramp(SIZE_BYTES)}})
    whole = mounted.sandbox.expected_bytes("data", "a.bin")
    assert read_elsewhere(mounted.path("data", "a.bin")) == whole
    mounted.sandbox.stop_store()
    mounted.sandbox.stop_api()
    assert mounted.unmount().returncode == 0
    assert mounted.mount().returncode == 0
    assert read_elsewhere(mounted.path("data", "a.bin")) == whole
