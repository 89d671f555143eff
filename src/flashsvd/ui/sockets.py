"""The sockets that the page is reached by, taken before anything is imported that takes seconds."""

from __future__ import annotations

import errno
import socket
from typing import Any

from flashsvd.errors import ConfigError


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets at every address that a host has here.

    Raises:
        ConfigError: there is none, or another program has the port.
    """
    taken: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                taken.append(_bound(family, address))
            except OSError as error:
                # `localhost` has an address of IPv6 by name where the system has none.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
        if not taken:
            raise OSError("this machine has no such address")
    except (OSError, UnicodeError) as error:
        for one in taken:
            one.close()
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"cannot serve on port {port} of {host}, which another program may have; choose another --port"
            ) from error
        raise ConfigError(f"cannot serve on --host {host}: {getattr(error, 'strerror', None) or error}") from error
    return taken


def _bound(family: int, address: Any) -> socket.socket:
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one
