"""Which network addresses must never be asked, whatever a manifest, an answer or a redirect says.

A URL that leads to a link-local address reaches what lives on this very host or wire: the cloud's metadata service first of
all, which hands the machine's own credentials to anybody who asks. No store lives there. Decided by the address that a
connection is about to be made to, so that neither a name, a number (`http://2852039166/`) nor a redirect gets past it; by the
text of a URL too, for behind a proxy the address is not ours to see.

Pure and without imports that cost a worker's start anything.
"""

from __future__ import annotations

import re
from typing import Final

_FORBIDDEN: Final = re.compile(
    r"169\.254\.\d+\.\d+"  # RFC 3927; AWS, Azure, GCP and others keep their metadata at 169.254.169.254
    r"|fe[89ab][0-9a-f]:.*"  # RFC 4291, fe80::/10
    r"|100\.100\.100\.200"  # Alibaba Cloud's metadata
    r"|168\.63\.129\.16"  # Azure's wire server
    r"|fd00:ec2::254|fd20:ce::254"  # AWS's and GCP's metadata over IPv6
    r"|(?:64:ff9b::|2002:)a9fe:.*",  # 169.254.0.0/16 through NAT64 and 6to4
    re.IGNORECASE | re.ASCII,
)
_MAPPED: Final = re.compile(r"::ffff:(?=\d+\.)", re.IGNORECASE)
_PART: Final = re.compile(r"0[xX][0-9a-fA-F]{1,8}|\d{1,11}", re.ASCII)


def is_forbidden(address: str) -> bool:
    """Whether `address` must not be connected to. An address as the system writes it (a zone may follow), not a name."""
    return _FORBIDDEN.fullmatch(_MAPPED.sub("", address.partition("%")[0])) is not None


def is_forbidden_host(host: str) -> bool:
    """The same for the host of a URL: an address in any spelling that resolvers take, brackets included. Looks up no name."""
    host = host.rstrip(".").strip("[]")
    if ":" in host:
        return is_forbidden(_compressed(host))
    return is_forbidden(_dotted(host) or host)


def _dotted(host: str) -> str | None:
    """a.b.c.d of an IPv4 address in the spellings of inet_aton(3): one to four parts, decimal, octal or hexadecimal."""
    parts = host.split(".")
    if len(parts) > 4 or not all(_PART.fullmatch(part) for part in parts):
        return None
    try:
        *head, last = (int(part, 0 if part[:2] in {"0x", "0X"} else 8 if part[0] == "0" else 10) for part in parts)
    except ValueError:  # 09 is no octal number
        return None
    if any(part > 255 for part in head) or last >= 1 << 8 * (4 - len(head)):
        return None
    whole = last + sum(part << 8 * (3 - place) for place, part in enumerate(head))
    return ".".join(str(whole >> shift & 255) for shift in (24, 16, 8, 0))


def _compressed(host: str) -> str:
    """An IPv6 address in its one canonical spelling; the text itself where it is none."""
    from ipaddress import AddressValueError, IPv6Address  # noqa: PLC0415 - see the module's text

    try:
        address = IPv6Address(host.partition("%")[0])
    except AddressValueError:
        return host
    mapped = address.ipv4_mapped
    return str(address if mapped is None else mapped)
