"""A checkpoint's metadata as a visitor sees it."""

from __future__ import annotations

from typing import Any

from flashsvd.errors import ConfigError
from flashsvd.info import read_info
from flashsvd.storage.metadata import INFO_FILE
from flashsvd.ui import markup
from flashsvd.ui.downloads import Downloads
from flashsvd.ui.news import Shown
from flashsvd.ui.present import svgs
from flashsvd.ui.root import Root
from flashsvd.ui.run import files


def show_info(root: Root, downloads: Downloads, checkpoint: str | None) -> tuple[Any, ...]:
    """The view of the Info tab: state, result, and the two downloads.

    Raises:
        FlashSVDError: it lies outside of the root, or is not a compressed checkpoint.
    """
    name = (checkpoint or "").strip()
    if not name:
        raise ConfigError("name a checkpoint, a directory that was written by Compress")
    from flashsvd.profiling.figures import layer_figures

    root.check_path("checkpoint", name, "read")
    info = read_info(name)
    about = info.compression
    shown = Shown(
        text=str(info),
        data=info.to_json(),
        info=(INFO_FILE, (info.directory / INFO_FILE).read_bytes()),
        pictures=tuple(svgs(layer_figures(about.module_ranks, about.module_errors, about.module_places))),
    )
    return "", markup.result(shown), *files(shown, "info.json", downloads)
