"""A certificate authority for loopback, made by the openssl command, so that TLS is verified in tests as in production.

Decides nothing but file names. The keys live and die with the sandbox's directory.
"""

from __future__ import annotations

import os
import ssl
import subprocess

from valohai_fuse.errors import ConfigurationError

LOOPBACK = "IP:127.0.0.1,DNS:localhost"
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_authority(directory: str) -> str:
    """Makes `<directory>/tls/` with a certificate for 127.0.0.1 and localhost; the path of the authority's PEM.

    Raises ConfigurationError when the openssl command is missing or fails.
    """
    folder = os.path.join(directory, "tls")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    _openssl(
        folder, "req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", "/CN=sandbox CA"
    )
    make_certificate(directory, "server")
    return os.path.join(folder, "ca.pem")


def make_certificate(directory: str, name: str, *, valid_for: str = LOOPBACK, days: int = 30) -> None:
    """Another certificate of the authority that `make_authority` has made in `directory`: `<directory>/tls/<name>.pem` and .key.

    `valid_for` is a subjectAltName; with negative `days` it has expired. Raises ConfigurationError.
    """
    folder = os.path.join(directory, "tls")
    _openssl(folder, "req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=localhost")
    with open(os.path.join(folder, "names"), "w", encoding="ascii") as file:
        file.write(f"subjectAltName={valid_for}\n")
    _openssl(
        folder,
        *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", f"{name}.pem", "-days", str(days), "-extfile", "names"),
    )


def server_context(directory: str, name: str = "server") -> ssl.SSLContext:
    """A context with the certificate `name` of `<directory>/tls/`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    folder = os.path.join(directory, "tls")
    context.load_cert_chain(os.path.join(folder, f"{name}.pem"), os.path.join(folder, f"{name}.key"))
    return context


def _openssl(folder: str, *arguments: str) -> None:
    try:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        raise ConfigurationError(
            "TLS in the sandbox needs the openssl command", hint="apt-get install openssl"
        ) from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ConfigurationError(f"openssl {arguments[0]} failed: {said}") from None
