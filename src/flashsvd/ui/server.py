"""The page behind an address: Gradio's application, and what stands before it."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from flashsvd.ui.gate import Gate
from flashsvd.ui.hosts import Hosts
from flashsvd.ui.limits import Limits
from flashsvd.ui.login import Login
from flashsvd.ui.theme import CSS, theme
from flashsvd.ui.visitors import Attendance, Visitors


def application(page: Any, visitors: Visitors, hosts: Hosts, auth: tuple[str, str] | None) -> ASGIApp:
    """The page as an ASGI application."""
    queue = page._queue
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lambda _: visitors.dropping(queue))
    gr.mount_gradio_app(
        outer, page, "/", auth=auth, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False,
        pwa=False, mcp_server=False, max_file_size=1, theme=theme(), css=CSS,
    )  # fmt: skip
    # With the theme, which comes later than the one that it makes.
    page.config = page.get_config_file()
    gradio: Any = outer.routes[-1]
    app: ASGIApp = Limits(Attendance(outer, visitors, queue), page.fns)
    if auth is not None:
        app = Login(app, gradio.app.tokens)
    return Gate(app, hosts)


def start(app: ASGIApp, sockets: list[socket.socket]) -> None:
    """Serve an application in a thread that ends with the program; returns when visitors can come.

    Raises:
        RuntimeError: the application cannot be started.
    """
    server = uvicorn.Server(
        # What a request says that is no HTTP is not worth a line; and who sent it is whoever is at the other end.
        uvicorn.Config(app, log_level="error", ws="none", proxy_headers=False, server_header=False)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server ended before it began")
        time.sleep(0.01)
