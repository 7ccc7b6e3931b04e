"""A worker process and its end: `fetch.process` and the loop of `fetch.worker`, as far as no store is needed."""

from __future__ import annotations

import logging
import os
import socket
import time

import pytest
import trio

from valohai_fuse.fetch import process
from valohai_fuse.fetch.process import WorkerProcess
from valohai_fuse.fetch.transfer import Staged
from valohai_fuse.fetch.wire import Configure
from valohai_fuse.fetch.worker import Worker


@pytest.mark.timeout(30)
def test_a_worker_that_cannot_be_killed_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It hangs in the kernel, in a disk whose server is gone: the mount ends all the same, and says so."""
    wait_until_dead = process._wait_until_dead

    async def never(pid: int) -> None:
        await trio.sleep_forever()

    async def main() -> int:
        worker = WorkerProcess(Configure(connections=1, connect_timeout_s=1, stall_timeout_s=1, ca_file=None))
        worker.close()
        with trio.fail_after(10):
            await worker.serve(lambda message: None)
            await wait_until_dead(worker.pid)
        return worker.pid

    monkeypatch.setattr(process, "_ENDS_WITHIN_S", 0.2)
    monkeypatch.setattr(process, "_wait_until_dead", never)
    with caplog.at_level(logging.WARNING):
        pid = trio.run(main)
    assert [record.getMessage() for record in caplog.records] == [
        f"worker {pid} hangs in a system call and cannot be ended"
    ]


class _Landing:
    """Counts how often it was closed."""

    closed = 0

    def copy_out(self, *where: object) -> None:
        time.sleep(5)

    def close(self) -> None:
        self.closed += 1


class _Order:
    """As much of an order as that needs."""

    start, size = 0, 1024
    segment_path = b"/nowhere"


def test_what_is_not_written_behind_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refused piece would cost the worker a descriptor and up to 8 MiB of mapped memory, for as long as the disk is slow."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker = Worker(theirs)
        monkeypatch.setattr(worker._behind, "offer", lambda job: False)
        landing = _Landing()
        staged = Staged(_Order, landing, "v", 1024)  # type: ignore[arg-type]
        assert not worker._write_behind(staged, None)
        assert landing.closed == 1
        os.close(worker._behind.fd)
