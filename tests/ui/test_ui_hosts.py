"""Which names are the page's own, and which pages may ask it for anything."""

from __future__ import annotations

import pytest

from flashsvd.errors import ConfigError
from flashsvd.ui.hosts import Hosts, Place, to_open


def place(text: str) -> Place:
    found = Place.read(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "http://127.0.0.1:7860"),
        ("::", "http://[::1]:7860"),
        ("127.0.0.1", "http://127.0.0.1:7860"),
        ("fd00::7", "http://[fd00::7]:7860"),
        ("box.example", "http://box.example:7860"),
    ],
)
def test_the_address_that_is_printed_can_be_opened(host: str, address: str) -> None:
    assert to_open(host, 7860) == address


LOOPBACK = ["localhost", "LOCALHOST:7860", "127.0.0.1", "127.9.9.9:1", "[::1]:7860"]
FOREIGN = ["evil.example", "localhost.evil.example:7860", "127.0.0.1.evil.example", "xlocalhost"]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "192.168.0.7", "box.example"])
def test_loopback_is_always_this_page_and_a_strange_name_never(host: str) -> None:
    hosts = Hosts.of(host, ["proxy.example"])
    assert all(hosts.have(place(name)) for name in LOOPBACK)
    assert not any(hosts.have(place(name)) for name in FOREIGN)


@pytest.mark.parametrize(
    ("host", "allowed", "reached_by", "had"),
    [
        ("127.0.0.1", [], "192.168.0.7:7860", False),
        ("192.168.0.7", [], "192.168.0.7:7860", True),
        ("192.168.0.7", [], "192.168.0.8", False),
        ("Box.Example", [], "box.example:7860", True),
        # No server of names has a say in an address.
        ("0.0.0.0", [], "192.168.0.7", True),
        ("::", [], "[fd00::7]:7860", True),
        ("0.0.0.0", [], "box.example", False),
        ("0.0.0.0", ["box.example"], "box.example:7860", True),
        ("127.0.0.1", ["Box.example:8443"], "box.example:7860", True),
    ],
)
def test_host_and_allow_host_say_what_else_is(host: str, allowed: list[str], reached_by: str, had: bool) -> None:
    assert Hosts.of(host, allowed).have(place(reached_by)) is had


@pytest.mark.parametrize(
    "text", ["", ":80", "a b", "ada@localhost", "localhost/x", "localhost?x", "a:99999", "[::1", "a:b"]
)
def test_what_is_no_place_is_none(text: str) -> None:
    read = Place.read(text)
    assert read is None or not Hosts.of("127.0.0.1", []).have(read)


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://localhost:7860", "localhost:7860", True),
        ("http://127.0.0.1", "127.0.0.1:80", True),
        ("https://svd.example", "svd.example", True),
        # A proxy that says of itself what it likes, and the browser before it.
        ("https://svd.example", "127.0.0.1:7860", True),
        ("https://other.example:8443", "127.0.0.1:7860", True),
        ("https://other.example", "127.0.0.1:7860", False),
        ("http://svd.example:3000", "svd.example:7860", False),
        ("http://localhost:3000", "localhost:7860", False),
        ("http://127.0.0.1:7860", "localhost:7860", False),
        ("https://evil.example", "localhost:7860", False),
        ("http://localhost:7860@evil.example", "localhost:7860", False),
        ("http://localhost:7860/", "localhost:7860", False),
        ("file://", "localhost:7860", False),
        ("null", "localhost:7860", False),
        ("", "localhost:7860", False),
    ],
)
def test_a_page_of_another_port_is_another_page(origin: str, host: str, own: bool) -> None:
    hosts = Hosts.of("127.0.0.1", ["svd.example", "other.example:8443"])
    assert hosts.own(origin, place(host)) is own


@pytest.mark.parametrize("text", ["*", "", "a b", "http://a", "*.example", "a/b", "a:port", "ada@a"])
def test_a_name_that_is_none_cannot_be_allowed(text: str) -> None:
    with pytest.raises(ConfigError, match="allow_host must be a name such as"):
        Hosts.of("127.0.0.1", [text])
