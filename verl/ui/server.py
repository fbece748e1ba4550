"""`verl ui`: serves the page on this machine until Ctrl-C, with a new token each time."""

import importlib.util
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.regular_file import check_directory

LOOPBACK = "127.0.0.1"
PORT = 7860  # the first free one from there on
PORTS = 100
START_SECONDS = 60
END_SECONDS = 2  # for open requests when the page ends
INSTALL = 'pip install -c constraints.txt -e ".[ui]"'


def open_ui(directory: Path, port: int | None = None) -> None:
    """Serve the page until Ctrl-C or SIGTERM. A run that is going on is then stopped, and saves a checkpoint.

    Args:
        directory: folder of runs and uploaded files.
        port: None: 7860, or the next free one.
    Raises:
        UserError: gradio is not installed, the folder is a file, the port is taken, or the folder cannot be written.
    """
    check_directory(directory, f"--dir {directory}", "give a folder, such as verl ui --dir experiments; it is made if it is missing")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("gradio is not installed", where="verl ui", fix=INSTALL)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made: {error.strerror}", where=f"--dir {directory}", fix="give another folder") from error
    listener = _listen(port)
    with listener, tempfile.TemporaryDirectory(prefix="verl-ui-") as temporary:
        _stay_local(Path(temporary))
        _serve(directory.resolve(), Path(temporary), listener)


def _listen(port: int | None) -> socket.socket:
    """Return a socket that listens on this machine alone. Raises UserError: the port is taken, or all are."""
    for number in [port] if port is not None else range(PORT, PORT + PORTS):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, number))
            listener.listen()
            return listener
        except OSError:
            listener.close()
    raise UserError("is taken", where=f"--port {port or PORT}", fix="give another port, or none")


def _stay_local(temporary: Path) -> None:
    """Set what gradio reads when it is imported: no telemetry, no sharing, files in a folder that ends with the page."""
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_SHARE="False",
        GRADIO_MCP_SERVER="False",
        GRADIO_SSR_MODE="False",
        GRADIO_RUN_HISTORY="False",
        GRADIO_TEMP_DIR=str(temporary / "gradio"),
        HF_HUB_DISABLE_TELEMETRY="1",
    )


def _serve(directory: Path, temporary: Path, listener: socket.socket) -> None:
    import uvicorn

    from verl.ui.gate import Gate
    from verl.ui.jobs import Jobs

    token, port = secrets.token_urlsafe(24), listener.getsockname()[1]
    jobs = Jobs(temporary)
    gate = Gate(application(jobs, directory), token, port)
    settings = uvicorn.Config(gate, log_level="warning", access_log=False, timeout_graceful_shutdown=END_SECONDS, ws="none")
    server, ended = uvicorn.Server(settings), threading.Event()
    previous = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    try:
        thread.start()
        print(f"verl ui: open http://{LOOPBACK}:{port}/?token={token}", flush=True)
        print(f"runs and uploaded files go into {directory}; Ctrl-C ends the page", flush=True)
        while thread.is_alive() and not ended.wait(0.5):
            pass
        if jobs.running is not None:
            print("ending the page; the run that is going on stops after its step, and saves a checkpoint", flush=True)
        jobs.close()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)  # the requests of tabs that are open end as errors
        server.should_exit = True
        thread.join(END_SECONDS + 3)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def application(jobs: Any, directory: Path) -> Any:
    """Return the application: the page in each language, and the files that its calls wrote."""
    import gradio
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, Response

    from verl.ui.page import CSS, Page, theme
    from verl.ui.texts import LANGUAGES

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/")
    def front() -> Response:
        return Response(status_code=303, headers={"location": "/en/"})

    @app.get("/manifest.json")  # the page names it; it cannot be installed as an app, as its address changes
    def manifest() -> dict[str, str]:
        return {"name": "verl", "display": "browser", "start_url": "/"}

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/pages/{name}")
    def made(name: str) -> Response:
        path = jobs.pages.get(name)
        return FileResponse(path, media_type="text/html") if path is not None and path.is_file() else Response(status_code=404)

    for language in LANGUAGES:
        blocks = Page(language, jobs, directory).build()
        app = gradio.mount_gradio_app(
            app, blocks, path=f"/{language}", theme=theme(), css=CSS, footer_links=[], run_history=False, ssr_mode=False, mcp_server=False
        )
    return app
