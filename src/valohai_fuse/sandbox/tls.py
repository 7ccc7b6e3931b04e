"""A certificate authority for loopback, made by the openssl command, so that TLS is verified in tests as in production.

Decides nothing but file names. The keys live and die with the sandbox's directory.
"""

from __future__ import annotations

import os
import ssl
import subprocess

from valohai_fuse.errors import ConfigurationError


def make_authority(directory: str) -> str:
    """Makes `<directory>/tls/` with a certificate for 127.0.0.1 and localhost; the path of the authority's PEM.

    Raises ConfigurationError when the openssl command is missing or fails.
    """
    folder = os.path.join(directory, "tls")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    _openssl(
        folder, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", "/CN=sandbox CA"
    )
    _openssl(folder, "req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    with open(os.path.join(folder, "names"), "w", encoding="ascii") as file:
        file.write("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    _openssl(
        folder,
        *("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
        *("-out", "server.pem", "-days", "30", "-extfile", "names"),
    )
    return os.path.join(folder, "ca.pem")


def server_context(directory: str) -> ssl.SSLContext:
    """A context with the server's certificate of `<directory>/tls/`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    folder = os.path.join(directory, "tls")
    context.load_cert_chain(os.path.join(folder, "server.pem"), os.path.join(folder, "server.key"))
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
