"""`--rank-search`: how ranks are divided, which any method leaves open that does not divide them by itself."""

from __future__ import annotations

import dataclasses

from flashsvd.errors import ConfigError
from flashsvd.methods import adasvd
from flashsvd.methods.method import Method, Need

LOSS_NEEDS: frozenset[Need] = frozenset({"covariance", "output_gradients"})


def with_rank_search(method: Method, search: str | None) -> Method:
    """The method with its ranks divided as asked; as it does by itself where nothing is asked.

    Args:
        search: of `ranks.RANK_SEARCHES`.

    Raises:
        ConfigError: the method divides them by itself in another way.
    """
    if search is None or search == method.search:
        return method
    if method.search == "sensitivity":
        raise ConfigError("--asvd-search looks for the ranks, and so does --rank-search; leave out one of them")
    if method.search == "learned":
        base = method.options["adasvd_base"]
        raise ConfigError(
            f"--method {method.name} learns the ranks; for {search} ones name the method of its factors instead: "
            f"--method {base} --rank-search {search}"
        )
    if search == "learned":
        return dataclasses.replace(method, choose_ranks=adasvd.choose_ranks, search="learned")
    return dataclasses.replace(method, needs=method.needs | LOSS_NEEDS, search="loss")
