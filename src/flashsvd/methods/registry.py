"""The one table that names the compression methods."""

from __future__ import annotations

from typing import Any

from flashsvd.common.options import flag
from flashsvd.errors import ConfigError
from flashsvd.methods import adasvd, asvd, drone, fwsvd, standard_svd
from flashsvd.methods.method import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (standard_svd.METHOD, fwsvd.METHOD, drone.METHOD, asvd.METHOD, adasvd.METHOD)
}


def get_method(name: str, **options: Any) -> Method:
    """The method of that name or alias, with its options set.

    Args:
        options: by name; None and False mean not given.

    Raises:
        ConfigError: there is no such method, it has no such option, or an option's value cannot be used.
    """
    method = _find(name)
    given = {option: value for option, value in options.items() if value is not None and value is not False}
    for option in given:
        if option not in method.options:
            owners = [other.name for other in METHODS.values() if option in other.options]
            raise ConfigError(f"{flag(option)} is an option of --method {' or '.join(owners)}, not of {method.name}")
    return method.configure(**{**method.options, **given}) if method.configure else method


def _find(name: str) -> Method:
    for method in METHODS.values():
        if name == method.name or name in method.aliases:
            return method
    known = (" or ".join((method.name, *method.aliases)) for method in METHODS.values())
    raise ConfigError(f"--method {name!r} is not known; choose from {', '.join(known)}")
