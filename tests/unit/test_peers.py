"""Which addresses are never asked, in every spelling that a resolver would take."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valohai_fuse.model import peers, urls

METADATA = [
    "169.254.169.254",
    "169.254.169.254.",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xfe.0xa9.0xfe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "169.254.0.1",
    "[fe80::1]",
    "[FE80::1%25eth0]",
    "[febf:ffff::1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[0:0:0:0:0:ffff:a9fe:a9fe]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::]",
    "[fd00:ec2::254]",
    "[fd00:0ec2:0:0::254]",
    "100.100.100.200",
    "168.63.129.16",
]
STORES = [
    "127.0.0.1",
    "10.0.0.1",
    "169.253.255.255",
    "169.255.0.0",
    "s3.amazonaws.com",
    "169.254.169.254.example.com",
    "[::1]",
    "[fec0::1]",
    "[fd00::1]",
    "[2001:db8::1]",
    "100.100.100.201",
    "0xa9fea9fe.example",
    "099.1",
]


@pytest.mark.parametrize("host", METADATA)
def test_an_address_of_the_machine_itself_is_no_store(host: str) -> None:
    """Link-local addresses and the clouds' metadata services."""
    assert peers.is_forbidden_host(host)
    if "%" not in host:
        assert (
            urls.unsupported_reason(f"http://{host}/latest/meta-data/iam")
            == "its host is an address of this machine's own network"
        )
        assert urls.unsupported_reason(f"https://user:pass@{host}:8080/x") is not None


@pytest.mark.parametrize("host", STORES)
def test_other_addresses_and_names_are_fine(host: str) -> None:
    """A store may be anywhere else, the private networks included."""
    assert not peers.is_forbidden_host(host)
    assert urls.supported(f"http://{host}/x")


@given(st.ip_addresses())
def test_what_the_system_writes_is_what_is_read(address: object) -> None:
    """An address that is connected to is judged as its text in a URL is."""
    text = str(address)
    bracketed = f"[{text}]" if ":" in text else text
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    seen = socket.inet_ntop(family, socket.inet_pton(family, text))
    assert peers.is_forbidden(seen) == peers.is_forbidden_host(bracketed)


@given(st.text())
def test_any_text_as_a_host(host: str) -> None:
    """Yes or no, never an error."""
    assert peers.is_forbidden_host(host) in {True, False}
