"""From a recipe to a running server."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from ivg.errors import ConfigError
from ivg.factory.recipe import load_models
from ivg.model import GuidedModel
from ivg.serving.app import create_app
from ivg.serving.connections import fitting, protocol, quiet_accepts
from ivg.serving.logs import say, to_standard_error
from ivg.serving.served_models import ServedModels
from ivg.serving.settings import ServeSettings
from ivg.serving.worker import Worker
from ivg.settings.recipe import Recipe

LAST_SECONDS = 2.0
"""After a second signal: time to tell clients; connections that are still open then are cut off."""


class Server(uvicorn.Server):
    """Uvicorn that tells the worker of the first signal, so that nothing new is taken while answers are finished.

    A second signal ends what runs: its clients are told so, and those that do not listen are cut off. Uvicorn's own way for that
    (``force_exit``) tears the loop down around the application; this one only shortens the orderly way.
    """

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker
        self.hurried_by: int | None = None
        """The signal that came second."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; a second signal stops at once. Uvicorn's own would raise the signal again when all is done, and exit with it."""
        if self.worker.draining:
            self.hurried_by = sig
        self.worker.drain(0 if self.worker.draining else None)

    async def on_tick(self, counter: int) -> bool:
        """While answers are finished, whoever asks whether the server is ready is told that it is not, and new requests that it stops."""
        ended = self.worker.seconds_left <= 0 or (self.worker.draining and not self.worker.thread.is_alive())
        if ended or self.hurried_by is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        quiet_accepts(asyncio.get_running_loop())
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish, as long as it may."""
        hurry = asyncio.ensure_future(self._hurry())
        try:
            await super().shutdown(sockets)
        finally:
            hurry.cancel()

    async def _hurry(self) -> None:
        while self.hurried_by is None:
            await asyncio.sleep(0.05)
        await asyncio.sleep(LAST_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(presets: ServedModels) -> Server:
    """A server around models that are loaded already."""
    settings = presets.settings
    worker = Worker(presets.model, settings)
    limits = fitting(settings.max_connections, settings.keep_alive)
    config = uvicorn.Config(
        create_app(worker, presets),
        host=settings.host,
        port=settings.port,
        http=protocol(limits),
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


def _with_every_guide(recipe: Recipe) -> GuidedModel:
    return load_models(recipe, every_guide=True)  # clients choose the method


def serve(recipe: Recipe, settings: ServeSettings, load: Callable[[Recipe], GuidedModel] = _with_every_guide) -> None:
    """Load the models and answer until a signal comes.

    Args:
        recipe: which models, and the defaults of requests.
        settings: address, keys, ceilings.
        load: makes the models; whoever has values of their own gives their own.

    Raises:
        ConfigError: the address is taken, or not of this machine.
        ModelError: a model that cannot be loaded.
        SystemExit: a second signal came: 128 and its number, as shells have it.
    """
    to_standard_error()
    with _listening(settings) as listener:  # before models are loaded: an address that is taken is known at once
        presets = ServedModels(load(recipe), recipe, settings)
        server = make_server(presets)
        host, port = listener.getsockname()[:2]
        say("serving", url=f"http://{host}:{port}", model=presets.name, methods=len(presets.names) - 1, keys=len(settings.api_keys))
        server.run(sockets=[listener])
        stuck = server.worker.thread.is_alive()
        rows = sum(reader.model.live_rows for reader in presets.model.readers)
        say("stopped", cache_rows=rows, inside_a_round=stuck, signal=server.hurried_by)
    code = 0 if server.hurried_by is None else 128 + server.hurried_by
    if stuck:
        os._exit(code)  # the interpreter would abort: it cannot be taken down around a thread that computes
    if code:
        sys.exit(code)


def _listening(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as e:
        listener.close()
        raise ConfigError(f"cannot listen at {settings.host}:{settings.port}: {e.strerror}\n  give another --host or --port") from None
    return listener
