"""Samples become CPU seconds by process and by kind; the page shows them with a floor and a sum."""

from __future__ import annotations

import pytest
from benchmarks.profiling import RATE_HZ, kind_of, per_unit, rows, sums

SCRIPT = """\
 100      7f9f5e7a6969 XXH3_128bits_update (/venv/lib/python3.11/site-packages/xxhash/_xxhash.cpython-311.so)
 100  ffffffff8220107c tcp_recvmsg_locked ([kernel.kallsyms])
 200  ffffffff8220107c tcp_recvmsg_locked ([kernel.kallsyms])
 300  ffffffff8220107c tcp_recvmsg_locked ([kernel.kallsyms])
 400  ffffffff8220107c __d_lookup_rcu ([kernel.kallsyms])
nonsense
 100      564c4329a297 [unknown] (/usr/bin/dpkg-query)
"""


@pytest.mark.parametrize(
    ("symbol", "shared_object", "kind"),
    [
        ("fuse_dev_do_write", "[kernel.kallsyms]", "kernel: FUSE"),
        ("rep_movs_alternative", "[kernel.kallsyms]", "kernel: copies and pages"),
        ("_copy_to_iter", "[kernel.kallsyms]", "kernel: copies and pages"),
        ("skb_release_data", "[kernel.kallsyms]", "kernel: sockets"),
        ("do_syscall_64", "[kernel.kallsyms]", "kernel: rest"),
        ("__memmove_avx512_unaligned_erms", "/usr/lib/x86_64-linux-gnu/libc.so.6", "copies"),
        ("_PyEval_EvalFrameDefault", "/usr/lib/libpython3.11.so.1.0", "Python and extensions"),
        ("Curl_multi_xfer", "/venv/lib/libcurl-7.so", "libcurl"),
        ("[unknown]", "/usr/bin/dpkg-query", "other"),
    ],
)
def test_a_sample_is_of_one_kind(symbol: str, shared_object: str, kind: str) -> None:
    assert kind_of(symbol, shared_object) == kind


def test_samples_are_added_up_by_process() -> None:
    """Only those of the bench's own processes; what began to run meanwhile is the reader."""
    shares = sums(SCRIPT, {100: "daemon", 200: "worker"}, {0, 100, 300})
    assert shares == {
        "daemon": {"hashing": 1 / RATE_HZ, "kernel: sockets": 1 / RATE_HZ, "other": 1 / RATE_HZ},
        "worker": {"kernel: sockets": 1 / RATE_HZ},
        "reader": {"kernel: names": 1 / RATE_HZ},
    }


def test_the_table_has_floor_and_sum() -> None:
    """Per GiB, per 10,000 files or reads."""
    shares = {
        "daemon": {"hashing": 1.0, "kernel: sockets": 3.0},
        "worker": {"kernel: FUSE": 0.5},
        "reader": {"other": 0.4},
    }
    metrics = {"mb_s": 2**31 / 1e6, "elapsed_s": 1.0, "files_s": 100.0, "reads_s": 1000.0}
    header, lines = rows(per_unit(shares, metrics, metric="mb_s"))
    assert header == ["CPU s per GiB", "daemon", "worker", "reader"]
    assert lines[-2:] == [["**floor**", "1.50", "0.25", "-"], ["**sum**", "2.00", "0.25", "0.20"]]
    assert per_unit(shares, metrics, metric="files_s")["shares"]["daemon"]["hashing"] == pytest.approx(100)
    by_read = per_unit(shares, metrics, metric="elapsed_s")
    assert by_read["unit"] == "10,000 reads"
    assert by_read["shares"]["daemon"]["hashing"] == pytest.approx(10)
