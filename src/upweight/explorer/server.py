"""The local web server: the page, the pictures and the table of decisions, behind the guard."""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import Any

from upweight.errors import UpweightError
from upweight.explorer.guard import LOOPBACK, Guard
from upweight.explorer.run import Run

PORT = 7860
"""Tried first; the next free one is taken if it is not free."""

LARGEST_UPLOAD = "20mb"


def application(run: Run, host: str = "127.0.0.1", reviewer: str = "") -> Guard:
    """The whole explorer as one ASGI application.

    Args:
        run: What it shows.
        host: Where it will listen, which decides whose requests are refused.
        reviewer: Name that decisions carry until another one is typed.

    Raises:
        UpweightError: gradio is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it would ask for its newest version
    try:
        import gradio as gr
        from fastapi import FastAPI
        from fastapi.responses import Response
    except ImportError as error:
        raise UpweightError(f"the explorer needs {error.name} -> pip install 'upweight[explore]'") from error
    from upweight.explorer import page

    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def picture(which: str, name: str, large: bool = False) -> Any:
        found = run.picture(which, name, large) if which in ("train", "query", "upload") else None
        if found is None:
            return Response("there is no such picture", 404, media_type="text/plain")
        return Response(found, media_type="image/png", headers={"cache-control": "private, max-age=600"})

    def large(which: str, name: str) -> Any:
        return picture(which, name, large=True)

    def table() -> Any:
        headers = {"content-disposition": 'attachment; filename="decisions.csv"'}
        text = run.decisions.to_csv().encode("utf-8", "backslashreplace")
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    # Without annotations FastAPI takes both for text of the path.
    inner.add_api_route("/picture/{which}/{name}.png", lambda which, name: picture(which, name))
    inner.add_api_route("/picture/{which}/{name}.png/large", lambda which, name: large(which, name))
    inner.add_api_route("/decisions.csv", table)
    whole = gr.mount_gradio_app(
        inner,
        page.build(run, reviewer),
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=LARGEST_UPLOAD,
        theme=page.theme(),
        css=page.asset("page.css"),
    )
    names = LOOPBACK if is_loopback(host) else LOOPBACK | {host.lower(), socket.gethostname().lower()}
    return Guard(whole, names, any_address=not is_loopback(host))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    return host.lower() in LOOPBACK


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens: on this port, or if none is named on the first free one from `PORT`.

    Raises:
        UpweightError: The port is taken, or the host is not this machine's.
    """
    wanted = range(PORT, PORT + 100) if port is None else [port]
    for one in wanted:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, one, type=socket.SOCK_STREAM)[0]
            found = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise UpweightError(
                f"host {host!r} is not known ({error}) -> 127.0.0.1, or one of this machine's"
            ) from error
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen(128)  # now: of two sockets only bound, the second to listen would fail later
            return found
        except OSError as error:
            found.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise UpweightError(
                    f"{host} is no address of this machine -> 127.0.0.1, or one of its own"
                ) from error
            if error.errno == errno.EACCES:
                raise UpweightError(f"port {one} may not be used -> name one from 1024 to 65535") from error
    raise UpweightError(
        f"port {wanted[0]} is taken -> name another one with --port, or none to have one found"
        if port is not None
        else f"ports {PORT} to {PORT + 99} are all taken -> name another one with --port"
    )


def serve(app: Any, opened: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    import uvicorn

    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, lifespan="on")
    try:
        uvicorn.Server(settings).run(sockets=[opened])
    except KeyboardInterrupt:  # how uvicorn hands on Ctrl-C once everything is closed
        pass
    finally:
        opened.close()
