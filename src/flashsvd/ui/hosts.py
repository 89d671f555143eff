"""The names that visitors reach the page by, and the pages that may ask it for anything: its own."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from flashsvd.errors import ConfigError

_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Place:
    """A host and, where one is named, a port: `localhost:7860`."""

    name: str
    port: int | None

    @classmethod
    def read(cls, text: str) -> Place | None:
        """The place that a Host header or `--allow-host` names; None where it names none."""
        with contextlib.suppress(ValueError):
            parts = urlsplit(f"//{text}")
            # Nothing but a place, and nobody's name before it.
            if parts.hostname and parts.netloc == text and "@" not in text:
                return cls(parts.hostname, parts.port)
        return None


@dataclass(frozen=True)
class Hosts:
    """Which places are this page.

    A name that somebody else's server of names leads to this machine (DNS rebinding) is none of them.

    Attributes:
        names: besides those of this machine's loopback.
        addresses: whether any address will do, as no such server has a say in those.
        origins: places that a proxy in front of the page has, whose browsers name them as their pages' origin.
    """

    names: frozenset[str]
    addresses: bool
    origins: frozenset[Place]

    @classmethod
    def of(cls, host: str, allowed: Iterable[str]) -> Hosts:
        """The places that `--host` and `--allow-host` say.

        Raises:
            ConfigError: one that is allowed is not a host's name.
        """
        places = set()
        for text in allowed:
            place = Place.read(text)
            if place is None or not set(place.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.:"):
                raise ConfigError(f"--allow-host must be a name such as svd.example.org, or NAME:PORT, got {text!r}")
            places.add(place)
        return cls(
            frozenset({host.lower(), *(place.name for place in places)}), _is_every_address(host), frozenset(places)
        )

    def have(self, place: Place) -> bool:
        """Whether a place is this page, whatever the port: it may be another one's that leads here."""
        return place.name in self.names or is_loopback(place.name) or (self.addresses and _is_address(place.name))

    def own(self, origin: str, host: Place) -> bool:
        """Whether an Origin header is that of a page from here.

        Another port is another page, of another user even, also on this machine.

        Args:
            host: what the same request calls this place.
        """
        scheme, _, rest = origin.partition("://")
        place = Place.read(rest)
        if place is None or scheme not in _DEFAULT_PORTS:
            return False
        port = place.port or _DEFAULT_PORTS[scheme]
        same = place.name == host.name and port == (host.port or _DEFAULT_PORTS[scheme])
        return same or any(
            place.name == allowed.name and port == (allowed.port or _DEFAULT_PORTS[scheme]) for allowed in self.origins
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host of that name."""
    with contextlib.suppress(ValueError):
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def to_open(host: str, port: int) -> str:
    """An address that a browser on this machine opens: that of loopback where the page is at every address."""
    if _is_every_address(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _is_every_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_unspecified
    return False


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False
