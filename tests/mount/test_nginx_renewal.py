"""Renewal proven against a server that nobody here wrote: nginx, whose secure_link refuses URLs after their time."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest

from support.mounts import MountInputs, read_elsewhere, wait_until
from support.nginx import Nginx
from valohai_fuse.sandbox.content import ramp
from valohai_fuse.sandbox.dataset import Dataset

MIB = 1024 * 1024


def _is_refused(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            answer.read(1)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code == 403
    return False


@pytest.mark.skipif(Nginx.missing() is not None, reason=f"needs {Nginx.missing()}; ./scripts/setup --tests installs it")
def test_reads_go_on_after_nginx_has_begun_to_refuse_the_urls(own_directories: Path, mount_inputs: MountInputs) -> None:
    """Signed URLs are renewed unseen: by one request to Valohai for all readers, whose bytes are right before and after."""
    size = 48 * MIB
    inputs = {"data": {"big.bin": ramp(size)}}
    served = own_directories / "served"
    Dataset(inputs).materialise(str(served))
    with Nginx(served) as nginx:
        mounted = mount_inputs(inputs, url_for=nginx.url_for, url_lifetime_s=2)
        path = mounted.path("data", "big.bin")
        first = mounted.sandbox.mint("data", "big.bin")
        for start in (0, 20 * MIB, 30 * MIB, 40 * MIB):
            stop = start + 70_000
            expected = mounted.sandbox.expected_bytes("data", "big.bin", start, stop)
            assert read_elsewhere(path, start, stop) == expected
            wait_until("nginx refuses the URLs of the manifest", lambda: _is_refused(first))
        assert mounted.status()["mounts"][0]["renewals"] >= 1
        assert {request.status for request in nginx.requests() if request.path == "data/big.bin"} >= {206}
        assert not any(request.authorization for request in nginx.requests()), "the token goes to Valohai only"
