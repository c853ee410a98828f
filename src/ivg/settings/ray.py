"""Which Ray cluster a run uses, and what each of its workers takes. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from ivg.errors import ConfigError
from ivg.settings import rules as r
from ivg.settings.schema import Setting, validate

LOCAL, AUTO = "local", "auto"
_ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[^\]]+\]|[^\s:/]+):(?P<port>\d+)")


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Which cluster, and what a worker (one copy of all models) takes of it.

    Raises:
        ConfigError: an address of another form, sizes out of range.
    """

    address: Annotated[
        str,
        Setting(
            "Spread the prompts over a Ray cluster: local (start it here), auto (this machine's cluster), HOST:PORT or ray://HOST:PORT.",
            flags=("--ray",),
            unset="no cluster",
        ),
    ]
    workers: Annotated[
        int | None,
        Setting("Copies of the models.", r.count(1, optional=True, label="--workers"), flags=("--workers",), unset="as many as fit"),
    ] = None
    gpus: Annotated[
        float | None,
        Setting(
            "GPUs of each worker; vLLM splits its models over several.", flags=("--gpus-per-worker",), unset="1 if the cluster has any"
        ),
    ] = None
    cpus: Annotated[
        float | None,
        Setting(
            "CPUs of each worker.",
            r.number("more than 0", 0, open_low=True, optional=True, label="--cpus-per-worker"),
            flags=("--cpus-per-worker",),
            unset="1 beside a GPU, else all of a node's",
        ),
    ] = None

    def __post_init__(self) -> None:
        validate(self)
        if self.address not in (LOCAL, AUTO) and not _ADDRESS.fullmatch(self.address):
            raise ConfigError(f"no Ray address: {self.address!r}\n  expected local, auto, HOST:PORT or ray://HOST:PORT")
        if self.gpus is not None and (self.gpus < 0 or (self.gpus > 1 and self.gpus % 1 != 0)):
            raise ConfigError(f"--gpus-per-worker must be a whole number, or a share of one GPU (0.5), got {self.gpus:g}")

    @classmethod
    def of(
        cls, address: str | None = None, workers: int | None = None, gpus: float | None = None, cpus: float | None = None
    ) -> RaySettings | None:
        """From options; None where no cluster is wanted.

        Raises:
            ConfigError: sizes of workers, but no cluster.
        """
        if address is None:
            if (workers, gpus, cpus) != (None, None, None):
                raise ConfigError("--workers, --gpus-per-worker and --cpus-per-worker need a cluster\n  give --ray ADDRESS with them")
            return None
        return cls(address, workers, gpus, cpus)

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Host and port, where the address names them."""
        found = _ADDRESS.fullmatch(self.address)
        return None if found is None else (found["host"].strip("[]"), int(found["port"]))
