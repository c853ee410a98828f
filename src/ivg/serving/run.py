"""From a recipe to a running server."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn

from ivg.build import load_models
from ivg.config import Recipe
from ivg.errors import ConfigError
from ivg.serving.app import create_app
from ivg.serving.logs import say, to_standard_error
from ivg.serving.presets import Presets
from ivg.serving.settings import ServeSettings
from ivg.serving.worker import Worker


class Server(uvicorn.Server):
    """Uvicorn that tells the worker of the first signal, so that nothing new is taken while answers are finished."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; a second signal stops at once."""
        self.worker.drain(None if not self.should_exit else 0)
        self.force_exit = self.should_exit
        self.should_exit = True  # uvicorn's own would raise the signal again when all is done, and exit with it


def make_server(presets: Presets) -> Server:
    """A server around models that are loaded already."""
    settings = presets.settings
    worker = Worker(presets.model, settings)
    config = uvicorn.Config(
        create_app(worker, presets),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain) + 5,
        lifespan="on",
    )
    return Server(config, worker)


def serve(recipe: Recipe, settings: ServeSettings) -> None:
    """Load the models and answer until a signal comes.

    Raises:
        ConfigError: the address is taken, or not of this machine.
        ModelError: a model that cannot be loaded.
    """
    to_standard_error()
    with _listening(settings) as listener:  # before models are loaded: an address that is taken is known at once
        presets = Presets(load_models(recipe), recipe, settings)
        server = make_server(presets)
        host, port = listener.getsockname()[:2]
        say("serving", url=f"http://{host}:{port}", model=presets.name, methods=len(presets.names) - 1, keys=len(settings.api_keys))
        server.run(sockets=[listener])
        say("stopped")


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
