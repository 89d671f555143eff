"""The page: a tab for each thing that the library does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from flashsvd._version import __version__
from flashsvd.common.config import Config, config_from
from flashsvd.compression.config import CompressConfig
from flashsvd.errors import FlashSVDError, one_line
from flashsvd.evaluate import EvalConfig
from flashsvd.profiling.config import ProfileConfig
from flashsvd.training.config import FinetuneConfig
from flashsvd.ui import markup
from flashsvd.ui.downloads import Downloads
from flashsvd.ui.jobs import Job, SavedProfile
from flashsvd.ui.machine import Machine
from flashsvd.ui.news import shortened
from flashsvd.ui.root import Root
from flashsvd.ui.run import WAITING, View, no_files, watch
from flashsvd.ui.show import show_info
from flashsvd.ui.visitors import Visitors
from flashsvd.ui.widgets import values_of, widgets_for

# What a shell prints as one line.
REFUSALS = (FlashSVDError, OSError)
# Jobs that wait for their turn.
QUEUE_SIZE = 20


@dataclass(frozen=True)
class Site:
    """What all tabs share."""

    root: Root
    machine: Machine
    downloads: Downloads
    visitors: Visitors


@dataclass(frozen=True)
class Form:
    """A form of widgets, and the configs that it describes.

    Attributes:
        widgets: by the names that callers of the API know them by.
        configs: from the widgets' values, in their order.
    """

    widgets: Mapping[str, Any]
    configs: Callable[..., tuple[Config, ...]]


@dataclass(frozen=True)
class Tab:
    """A job that the page can start.

    Attributes:
        command: what does the same in a shell; it begins the ids of everything in the tab.
        intro: what it is for.
        essential: the fields to show first.
    """

    command: str
    title: str
    intro: str
    config_class: type[Config]
    essential: tuple[str, ...]


COMPRESS = Tab(
    "compress",
    "Compress",
    "Factor a model's linear layers and save a smaller checkpoint.",
    CompressConfig,
    ("model", "method", "task", "ratio", "rank", "calib_data", "output"),
)
EVALUATE = Tab(
    "eval",
    "Evaluate",
    "Score and time a checkpoint, compressed or dense, on a task.",
    EvalConfig,
    ("checkpoint", "task", "data", "backend"),
)
FINETUNE = Tab(
    "finetune",
    "Fine-tune",
    "Train a model, or what compression left of it, on a task or on text.",
    FinetuneConfig,
    ("model", "mode", "task", "data", "epochs", "teacher", "output"),
)
COMPARE = Tab(
    "profile",
    "Compare",
    "Measure one or several checkpoints against the dense model on this machine: score, latency, memory and size.",
    ProfileConfig,
    ("task", "data", "variants"),
)


def build_page(site: Site) -> gr.Blocks:
    with gr.Blocks(title="flashsvd", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>flashsvd</h1><p>Compress transformers with SVD methods, train what is left, and measure what it "
            f"gained. Version {__version__}, in {escape(str(site.root.directory))}.</p>",
            elem_classes="page-head",
        )
        with gr.Tabs(overflow_behavior="wrap"):
            for tab in (COMPRESS, EVALUATE, FINETUNE):
                with gr.Tab(tab.title):
                    _job_tab(site, tab)
            with gr.Tab("Info"):
                _info_tab(site)
            with gr.Tab(COMPARE.title):
                _job_tab(site, COMPARE)
    return page.queue(max_size=QUEUE_SIZE, api_open=False)


def _form(tab: Tab) -> Form:
    widgets = widgets_for(tab.config_class, tab.command, tab.essential)
    names = list(widgets)

    def configs(*values: Any) -> tuple[Config, ...]:
        return (config_from(tab.config_class, values_of(tab.config_class, names, values)),)

    return Form(widgets, configs)


def _comparison_form(tab: Tab) -> Form:
    """A config for each checkpoint that is named. What they write would be in one place, so nothing is."""
    checkpoints = gr.Textbox(
        label="Checkpoints",
        info="compressed checkpoints, dense models, or profile.json files of earlier runs; one on each line",
        value="",
        lines=3,
        max_lines=8,
        elem_id=f"{tab.command}-checkpoints",
    )
    widgets = widgets_for(tab.config_class, tab.command, tab.essential, left_out=("checkpoint", "output", "overwrite"))
    names = list(widgets)

    def config(name: str, values: tuple[Any, ...]) -> Config:
        if name.endswith(".json"):
            return SavedProfile(name)
        return config_from(tab.config_class, values_of(tab.config_class, names, values) | {"checkpoint": name})

    def configs(checkpoints: Any, *values: Any) -> tuple[Config, ...]:
        named = [line.strip() for line in _text(checkpoints).splitlines() if line.strip()]
        # Without any, the config says what is missing.
        return tuple(config(name, values) for name in named or [""])

    return Form({"checkpoints": checkpoints, **widgets}, configs)


def _job_tab(site: Site, tab: Tab) -> None:
    """A form on the left, what its job does on the right; below each other where the page is narrow."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown(tab.intro, elem_classes="intro")
            form = _comparison_form(tab) if tab is COMPARE else _form(tab)
            with gr.Row():
                start = gr.Button(tab.title, variant="primary", min_width=120, elem_id=f"{tab.command}-start")
                cancel = gr.Button("Cancel", interactive=False, min_width=120, elem_id=f"{tab.command}-cancel")
        with gr.Column(scale=7, min_width=320):
            view = _view(tab.command)
    buttons, inputs = [start, cancel], list(form.widgets.values())

    def job_of(values: tuple[Any, ...]) -> Job:
        job = Job(tab.command, form.configs(*values), site.root)
        job.check_paths()
        return job

    def check(*values: Any) -> Iterator[tuple[Any, ...]]:
        """Refuse at once what can be, without a place in the queue.

        Raises:
            gr.Error: the options cannot be used, in the line that is shown before.
        """
        try:
            job_of(values)
        except REFUSALS as error:
            yield (markup.failed(_line(error)), "", "", *no_files(), *_ready())
            raise _error(_line(error)) from error
        yield (markup.state(WAITING), gr.Textbox("", visible=True), "", *no_files(), *_started())

    def run(*values: Any) -> Iterator[View]:
        """Do the job and show how far it is.

        Raises:
            gr.Error: the options cannot be used, or the visitor has gone.
        """
        *values, request = values  # type: ignore[assignment]  # the tuple becomes a list
        try:
            job = job_of(tuple(values))
        except REFUSALS as error:
            yield (markup.failed(_line(error)), "", "", *no_files())
            raise _error(_line(error)) from error
        if not site.visitors.wait_for(request.session_hash):
            raise _error("nobody listens for what comes of the job, so it was not begun")
        yield from watch(site.machine, site.downloads, job)

    _name_parameters(run, form.widgets)
    checked = start.click(
        check, inputs, [*view, *buttons], show_progress="hidden", concurrency_limit=None, preprocess=False,
        api_visibility="private",
    )  # fmt: skip
    ran = checked.success(
        run,
        inputs,
        view,
        show_progress="hidden",
        concurrency_id="machine",
        concurrency_limit=1,
        # What a widget would refuse with a traceback, such as a choice that is none, the config does in a line.
        preprocess=False,
        api_name=tab.command,
    )
    # Of the run itself, so that nothing it still says comes later; the page tells a failure apart from other ends.
    for over in (ran.then, ran.failure):
        over(
            _last_word, view[0], [view[0], *buttons],
            show_progress="hidden", queue=False, preprocess=False, api_visibility="private",
        )  # fmt: skip
    cancel.click(None, cancels=[ran])


def _info_tab(site: Site) -> None:
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            gr.Markdown("Show what a compressed checkpoint is, how large, and how to use it.", elem_classes="intro")
            checkpoint = gr.Textbox(
                label="Checkpoint",
                info="A directory that was written by Compress",
                max_lines=1,
                elem_id="info-checkpoint",
            )
            show = gr.Button("Show", variant="primary", elem_id="info-start")
        with gr.Column(scale=7, min_width=320):
            state, result, data, info = _info_view("info")

    def read(checkpoint: Any) -> Iterator[tuple[Any, ...]]:
        """Show what a checkpoint is.

        Raises:
            gr.Error: it cannot be read.
        """
        try:
            yield show_info(site.root, site.downloads, _text(checkpoint))
        except REFUSALS as error:
            yield (markup.failed(_line(error)), "", *no_files())
            raise _error(_line(error)) from error

    outputs = [state, result, data, info]
    gr.on(
        [show.click, checkpoint.submit], read, checkpoint, outputs,
        show_progress="hidden", preprocess=False, api_name="info",
    )  # fmt: skip


def _view(tab: str) -> list[Any]:
    state = gr.HTML(markup.state("Nothing has been started"), label="State", elem_id=f"{tab}-state")
    result = gr.HTML(label="Result", elem_id=f"{tab}-result")
    with gr.Row():
        data, info = _download_buttons(tab)
    log = gr.Textbox(
        label="Log",
        visible=False,
        lines=8,
        max_lines=16,
        interactive=False,
        autoscroll=True,
        elem_classes="log",
        buttons=["copy"],
        elem_id=f"{tab}-log",
    )
    return [state, log, result, data, info]


def _info_view(tab: str) -> list[Any]:
    state, result = gr.HTML(label="State", elem_id=f"{tab}-state"), gr.HTML(label="Result", elem_id=f"{tab}-result")
    with gr.Row():
        data, info = _download_buttons(tab)
    return [state, result, data, info]


def _download_buttons(tab: str) -> tuple[Any, Any]:
    return (
        gr.DownloadButton(
            "Download result as JSON", visible=False, size="md", min_width=200, elem_id=f"{tab}-download"
        ),
        gr.DownloadButton(
            "Download compression_info.json", visible=False, size="md", min_width=200, elem_id=f"{tab}-info-file"
        ),
    )


def _started() -> tuple[Any, Any]:
    return gr.Button(interactive=False), gr.Button(interactive=True)


def _ready() -> tuple[Any, Any]:
    return gr.Button(interactive=True), gr.Button(interactive=False)


def _last_word(state: Any) -> tuple[Any, ...]:
    """The state to leave when a run is over, however it ended: one that was cancelled could not say so itself."""
    return (gr.skip() if markup.is_end(_text(state)) else markup.cancelled(), *_ready())


def _name_parameters(run: Callable[..., Any], names: Iterable[str]) -> None:
    """Give a function of any values named parameters, and the request after them, where Gradio looks for both."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in (*names, "request")]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Gradio reads it
    run.__annotations__ = {"request": gr.Request}


def _text(value: Any) -> str:
    """What a text field holds: its value is whatever a client sent."""
    return "" if value is None else str(value)


def _line(error: Exception) -> str:
    return shortened(one_line(error))


def _error(line: str) -> gr.Error:
    """For whoever calls the page as an API; what the page shows says so already."""
    return gr.Error(line, visible=False, print_exception=False)
