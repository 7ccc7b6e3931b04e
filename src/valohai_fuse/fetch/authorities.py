"""Which certificate authorities a store is checked against: those that this system trusts, wherever it keeps them."""

from __future__ import annotations

import os
import ssl

_CA_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL, Amazon Linux
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",
)


def system_ca_file() -> str | None:
    """The PEM bundle of the authorities that this system trusts ($SSL_CERT_FILE, the distribution's, certifi's). libcurl comes
    in a wheel and does not know where this distribution keeps them."""
    configured = ssl.get_default_verify_paths().cafile
    for path in filter(None, (configured, *_CA_FILES)):
        if os.access(path, os.R_OK):
            return path
    try:
        import certifi  # noqa: PLC0415 - comes with httpx; only needed on images without ca-certificates
    except ImportError:
        return None
    return certifi.where()
