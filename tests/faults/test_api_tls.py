"""An API whose certificate is not good is not asked for URLs, for it would be told the token."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from support.mounts import GIVEN_UP, MountInputs, wait_until
from support.reader_process import Readers, digest_of
from valohai_fuse.sandbox import tls
from valohai_fuse.sandbox.content import Ramp, read_all

REASONS = {
    "expired": "certificate has expired",
    "wrong-name": "IP address mismatch|Hostname mismatch",
    "stranger": "self.signed|local issuer",
}


def test_an_api_whose_certificate_is_not_good(own_directories: Path, mount_inputs: MountInputs) -> None:
    """Expired, for another host, of an unknown authority: the read ends at its deadline and the log says which; the API saw no
    request, and with a good certificate everything is well."""
    root = own_directories / "valohai"
    mounted = mount_inputs(
        {name: {"a.bin": Ramp(100_000)} for name in REASONS},
        options=("--read-timeout=1", f"--ca-file={root}/tls/ca.pem", *REASONS),
        expected_warnings=GIVEN_UP,
        tls=True,
    )
    tls.make_certificate(str(root), "expired", days=-1)
    tls.make_certificate(str(root), "wrong-name", valid_for="DNS:valohai.example,IP:127.0.0.9")
    tls.make_authority(str(root / "stranger"))
    contexts = {name: tls.server_context(str(root), name) for name in ("expired", "wrong-name")}
    contexts["stranger"] = tls.server_context(str(root / "stranger"))
    mounted.sandbox.expire_urls()
    right = digest_of(read_all(Ramp(100_000), 0, 100_000))
    with Readers() as readers:
        for name, reason in REASONS.items():
            mounted.sandbox.api.use_tls(contexts[name])
            assert readers.read(mounted.path(name, "a.bin")).errno == errno.ETIMEDOUT
            assert re.search(f" INFO {name} .*asking Valohai at .* again .*({reason})", mounted.log())
        assert not mounted.sandbox.api.exchanges()
        mounted.sandbox.api.use_tls(tls.server_context(str(root)))
        for name in REASONS:
            wait_until("it reads", lambda name=name: readers.read(mounted.path(name, "a.bin")).digest == right, 30)  # type: ignore[misc]  # a default binds it
