"""Compression methods, one file each, and the one table that names them."""

from __future__ import annotations

from flashsvd.compression import standard_svd
from flashsvd.compression.method import Factors, Method
from flashsvd.errors import ConfigError

METHODS: dict[str, Method] = {method.name: method for method in (standard_svd.METHOD,)}

__all__ = ["METHODS", "Factors", "Method", "get_method"]


def get_method(name: str) -> Method:
    """The method of that name or alias.

    Raises:
        ConfigError: there is none.
    """
    for method in METHODS.values():
        if name == method.name or name in method.aliases:
            return method
    raise ConfigError(f"--method {name!r} is not known; choose from {', '.join(METHODS)}")
