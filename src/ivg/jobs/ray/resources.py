"""How the nodes of a cluster are divided into workers, and what of a recipe depends on that. Independent of Ray.

A worker is one copy of all models: it may have several GPUs of its node (tensor parallelism stays inside a node), and there
are as many of them as fit (data parallelism goes over the nodes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ivg.errors import ConfigError, IVGError
from ivg.settings.placement import Device, is_spread
from ivg.settings.ray import RaySettings
from ivg.settings.recipe import ModelRef, NamedValue, Recipe


class RayError(IVGError, RuntimeError):
    """A cluster that cannot do the work: not reached, no room, nodes that differ, workers that crash again and again."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """Number of workers, and the CPUs and GPUs that each asks Ray for."""

    workers: int
    cpus: float
    gpus: float


def plan_workers(
    settings: RaySettings, nodes: Sequence[Mapping[str, float]], tasks: int, devices: Sequence[Device | None] = (None,)
) -> WorkerPlan:
    """Divide the nodes into workers; never more workers than tasks.

    Args:
        settings: of the cluster.
        nodes: resources of each, by Ray's names (``CPU``, ``GPU``).
        tasks: number of tasks.
        devices: of the models; None: a GPU if there is one.

    Raises:
        RayError: no node has room for one worker.
    """
    node_cpus = [n.get("CPU", 0.0) for n in nodes if n.get("CPU", 0.0) >= 1]
    may_use_gpus = any(device is None or is_spread(device) or str(device).startswith("cuda") for device in devices)
    gpus = settings.gpus if settings.gpus is not None else float(may_use_gpus and any(n.get("GPU", 0.0) >= 1 for n in nodes))
    one_per_node = settings.cpus is None and not gpus and bool(node_cpus)
    if settings.cpus is not None:
        cpus = settings.cpus
    elif one_per_node:
        smallest = min(node_cpus)
        cpus = smallest if settings.workers is None else min(smallest, max(1.0, sum(node_cpus) // settings.workers))
    else:
        cpus = 1.0
    room = sum(int(min(n.get("CPU", 0.0) // cpus, n.get("GPU", 0.0) // gpus if gpus else float("inf"))) for n in nodes)
    if not room:
        available = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes) or "none"
        raise RayError(
            f"no node has room for a worker of {cpus:g} CPUs and {gpus:g} GPUs; the nodes have: {available}"
            "\n  give --cpus-per-worker and --gpus-per-worker that fit"
        )
    wanted = settings.workers if settings.workers is not None else len(node_cpus) if one_per_node else room
    return WorkerPlan(max(1, min(wanted, tasks)), cpus, gpus)


def reconcile_gpus(recipe: Recipe, settings: RaySettings) -> tuple[Recipe, RaySettings]:
    """Make the GPUs of a worker and the engine's tensor parallelism the same number, whichever was given.

    Raises:
        ConfigError: both are given and differ, or the engine uses one GPU only.
    """
    split = recipe.vllm.tensor_parallel_size
    if recipe.run.engine != "vllm":
        return recipe, _with_gpus_of_models(recipe, settings)
    if settings.gpus is None:
        return recipe, settings if split is None else replace(settings, gpus=float(split))
    if split not in (None, max(1, settings.gpus)):
        raise ConfigError(f"--gpus-per-worker {settings.gpus:g}, but vllm.tensor_parallel_size is {split}\n  give one of the two")
    return recipe.model_copy(update={"vllm": recipe.vllm.model_copy(update={"tensor_parallel_size": max(1, int(settings.gpus))})}), settings


def _with_gpus_of_models(recipe: Recipe, settings: RaySettings) -> RaySettings:
    """As many GPUs for a worker as its models name (``cuda:1``: two); a model that is spread takes as many as are given.

    Raises:
        ConfigError: fewer are given than are named, or more than any model uses.
    """
    devices = recipe.devices.values()
    named = [int(number) for d in devices if isinstance(d, str) and (number := d.removeprefix("cuda:")).isdecimal()]
    wanted = max(named, default=0) + 1
    if settings.gpus is None:
        return settings if wanted == 1 else replace(settings, gpus=float(wanted))
    if named and settings.gpus < wanted:
        raise ConfigError(f"--gpus-per-worker {settings.gpus:g}, but a model is on cuda:{wanted - 1}\n  give {wanted} or leave it out")
    if settings.gpus > wanted and settings.gpus > 1 and not any(map(is_spread, devices)):
        use = "one GPU" if wanted == 1 else f"{wanted} GPUs"
        raise ConfigError(
            f"--gpus-per-worker {settings.gpus:g}, but the engine {recipe.run.engine} uses {use} with these models"
            "\n  give --engine vllm, a device for each model, or more workers of fewer GPUs"
        )
    return settings


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with this machine's relative paths made absolute: workers run in other folders."""
    models = recipe.models.model_copy(update=_absolute(recipe.local_models))
    values: dict[str, NamedValue] = {name: v.model_copy(update=_absolute(v.given)) for name, v in recipe.values.items()}
    tokenizer = recipe.endpoint.tokenizer
    if tokenizer is not None and Path(tokenizer).exists():
        tokenizer = str(Path(tokenizer).resolve())
    endpoint = recipe.endpoint.model_copy(update={"tokenizer": tokenizer})
    return recipe.model_copy(update={"models": models, "values": values, "endpoint": endpoint})


def _absolute(given: Mapping[str, ModelRef]) -> dict[str, ModelRef]:
    out = {}
    for role, ref in given.items():
        if ref.adapter is not None and Path(ref.adapter).exists():
            out[role] = ref = ref.model_copy(update={"adapter": str(Path(ref.adapter).resolve())})
        file, sign, function = ref.path.rpartition(":")
        if Path(ref.path).exists():
            out[role] = ref.model_copy(update={"path": str(Path(ref.path).resolve())})
        elif sign and file.endswith(".py") and Path(file).is_file():  # a Python function: file.py:function
            out[role] = ref.model_copy(update={"path": f"{Path(file).resolve()}:{function}"})
    return out
