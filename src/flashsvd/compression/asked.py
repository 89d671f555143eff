"""What a config asks of a compression, and options that are refused beside a method."""

from __future__ import annotations

import logging
from pathlib import Path

from flashsvd.calibration.store import INDEX_FILE
from flashsvd.common.options import flag
from flashsvd.common.paths import expand
from flashsvd.compression.config import CompressConfig
from flashsvd.errors import ConfigError
from flashsvd.methods.method import Method

log = logging.getLogger("flashsvd")


def searches_ranks(config: CompressConfig, method: Method) -> bool:
    """Whether data say what the ranks are; where a file gives them they do not."""
    return method.search != "uniform" and not config.ranks_json


def asks_for_losses(config: CompressConfig, method: Method) -> bool:
    """Whether the search runs the model on data, beside what statistics say of them."""
    return method.choose_ranks is not None and searches_ranks(config, method)


def reads_data_otherwise(config: CompressConfig, method: Method) -> bool:
    """Whether calibration data are read for something else than statistics of the dense model."""
    return asks_for_losses(config, method) or config.refine > 0


def looks_for_ranks(config: CompressConfig, method: Method) -> bool:
    """Whether there are ranks to find: for a ratio, or by a search."""
    return config.ratio is not None or searches_ranks(config, method)


def check_inputs(config: CompressConfig, method: Method) -> None:
    """Refuse inputs that the method, without a search for ranks, makes nothing of.

    Raises:
        ConfigError: naming the option.
    """
    if config.calib_inputs == "compressed":
        if not method.needs:
            raise ConfigError(
                f"--calib-inputs is not used: {method.name} needs no statistics; pass --calib-inputs dense"
            )
        if "row_gradients" in method.needs:
            raise ConfigError(
                f"--calib-inputs compressed is not for {method.name} here, which weighs by gradients of the dense "
                "model; pass --calib-inputs dense, or choose drone or asvd"
            )


def check_options(config: CompressConfig, method: Method, output: Path) -> None:
    """Refuse options that would do nothing or undo each other, and say which calibration data is not read.

    Raises:
        ConfigError: naming the option.
    """
    for name in ("asvd_search", "rank_search"):
        if config.ranks_json and getattr(config, name):
            raise ConfigError(f"--ranks-json gives the ranks that {flag(name)} would look for; leave out one of them")
    if config.rank_steps == "fine" and not looks_for_ranks(config, method):
        raise ConfigError("--rank-steps fine is for ranks that are looked for, and these are given; leave it out")
    for name in ("stats", "save_stats"):
        if getattr(config, name) and not method.needs:
            raise ConfigError(f"{flag(name)} is not used: {method.name} needs no statistics; leave it out")
    if config.save_stats:
        ours, theirs = expand(config.save_stats).absolute(), output.absolute()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise ConfigError(
                f"--save-stats {config.save_stats} and the output {output} lie in each other; separate them"
            )
    if config.stats and not (expand(config.stats) / INDEX_FILE).is_file():
        raise ConfigError(f"{config.stats} holds no {INDEX_FILE}; give a directory that --save-stats wrote")
    if config.calib_data and (config.stats or not method.needs) and not reads_data_otherwise(config, method):
        log.warning("the calibration data are not read: %s needs none here", method.name)
