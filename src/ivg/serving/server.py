"""Starts and stops the server."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from ivg.errors import ConfigError
from ivg.factory.recipe import load_models
from ivg.model import GuidedModel
from ivg.models.cached_lm import runners_of
from ivg.serving.app import create_app
from ivg.serving.connections import connection_limits, limited_protocol, throttle_accept_errors
from ivg.serving.logs import configure_logging, log_event
from ivg.serving.served_models import ServedModels
from ivg.serving.worker import Worker
from ivg.settings.recipe import Recipe
from ivg.settings.serve import ServeSettings

ABORT_SECONDS = 2.0
"""After a second signal connections are closed after this time."""


class Server(uvicorn.Server):
    """uvicorn with a two-stage shutdown.

    After the first signal new requests are refused and running ones may finish. A second signal aborts them: their clients receive an
    error, then their connections are closed. uvicorn's own ``force_exit`` would stop the event loop without any response.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker
        self.second_signal: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; a second signal aborts. uvicorn's own handler would raise the signal again after the shutdown."""
        if self.worker.draining:
            self.second_signal = sig
        self.worker.drain(0 if self.worker.draining else None)

    async def on_tick(self, counter: int) -> bool:
        """Keep serving while the worker drains, so that ``/ready`` and new requests are answered (with 503)."""
        ended = self.worker.seconds_left <= 0 or (self.worker.draining and not self.worker.thread.is_alive())
        if ended or self.second_signal is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        throttle_accept_errors(asyncio.get_running_loop())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for running requests, until a second signal."""
        aborting = asyncio.ensure_future(self._abort_connections())
        try:
            await super().shutdown(sockets)
        finally:
            aborting.cancel()

    async def _abort_connections(self) -> None:
        while self.second_signal is None:
            await asyncio.sleep(0.05)
        await asyncio.sleep(ABORT_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(served: ServedModels) -> Server:
    """A server for loaded models."""
    settings = served.settings
    worker = Worker(served)
    limits = connection_limits(settings.max_connections, settings.keep_alive)
    config = uvicorn.Config(
        create_app(worker),
        host=settings.host,
        port=settings.port,
        http=limited_protocol(limits),
        ws="none",
        backlog=limits.backlog,
        timeout_keep_alive=settings.keep_alive,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain) + 5,
        lifespan="on",
    )
    return Server(config, worker)


def _load_all(recipe: Recipe) -> GuidedModel:
    return load_models(recipe, every_guide=True)  # clients choose the method


def serve(recipe: Recipe, settings: ServeSettings, load: Callable[[Recipe], GuidedModel] = _load_all) -> None:
    """Load the models and serve until a signal arrives.

    Args:
        recipe: the models, and the defaults of requests.
        settings: address, keys, limits.
        load: loads the models; give your own function to serve values of your own.

    Raises:
        ConfigError: the address is in use, or not of this machine; a setting that a server does not read.
        ModelError: a model cannot be loaded.
        SystemExit: after a second signal, with the code 128 + signal.
    """
    recipe.check_one_answer("a server")
    configure_logging()
    with _listen(settings) as listener:  # before the models are loaded: an address in use is reported at once
        served = ServedModels(load(recipe), recipe, settings)
        server = make_server(served)
        gc.collect()
        gc.freeze()  # models and modules stay: later collections, between two steps, need not look at them
        host, port = listener.getsockname()[:2]
        log_event("serving", url=f"http://{host}:{port}", model=served.name, methods=len(served.model.methods), keys=len(settings.api_keys))
        server.run(sockets=[listener])
        stuck = server.worker.thread.is_alive()
        rows = sum(runner.live_rows for runner in runners_of(served.model.readers).values())
        log_event("stopped", cache_rows=rows, inside_a_step=stuck, signal=server.second_signal)
    code = 0 if server.second_signal is None else 128 + server.second_signal
    if stuck:
        os._exit(code)  # at a normal exit the interpreter would abort around the thread that computes
    if code:
        sys.exit(code)


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as e:
        listener.close()
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {e.strerror}\n  give another --host or --port") from None
    return listener
