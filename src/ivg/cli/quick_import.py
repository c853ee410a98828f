"""Import transformers' model code without the parts of which answering needs nothing.

``transformers.modeling_utils`` (5.23) imports ``torch._dynamo`` to mark functions for ``torch.compile``, ``torch.distributed.tensor`` for
sharded weights and ``scipy.optimize`` for losses of object detection; torch itself imports ``torch._dynamo`` where a network is built on
the meta device. Together that is half of the seconds from the start of a process to its first token. :func:`import_transformers` is for
processes of the command line: a library must not change what others import.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivg.settings.recipe import Recipe

_DYNAMO = "torch._dynamo"
_ALONE = f"{_DYNAMO}._trace_wrapped_higher_order_op"
"""The module of ``torch._dynamo`` that transformers' masks need; it needs no other."""


_SPINS = "20000"
"""Rounds of a thread that waits (libgomp's manual, GOMP_SPINCOUNT)."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, 256 << 20
"""Bytes. glibc maps larger allocations each for itself, and returns memory at the end of its heap when more than this is free."""
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""Their numbers in glibc's malloc.h."""

_state = {"own process": False}


def begin_process() -> None:
    """Say that this process is the command line's: it may start and end quickly, and keeps some freed memory (:func:`keep_freed_memory`).

    The garbage collector runs after 10 000 new objects instead of 700 (imports make millions that stay), and not at the end. Threads of
    GNU's OpenMP that wait for one another spin for less long before they give their core up, unless the environment says how they are to
    wait: where other processes keep the cores busy, they wait much longer than they work. Call it before torch, which reads the setting.
    """
    _state["own process"] = True
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep 256 MiB that are free at the end of its heap, of each thread's, unless the environment sets its allocator.

    By default it returns the memory of one token's logits to the operating system, which then clears each page of the next token's anew.
    """
    given = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if not given and sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def import_transformers(recipe: Recipe) -> None:
    """Import ``transformers.modeling_utils``; in this process it then knows of no ``torch.distributed`` and no scipy.

    Both are optional for transformers, which has code for builds without them; who takes ``torch.distributed.tensor`` for imported gets it
    on asking. ``torch._dynamo`` is imported when something asks for more of it than marks, such as ``torch.compile``. Does nothing where
    another engine answers, where the process is not the command line's (:func:`begin_process`), where the module is imported already, and
    under ``torchrun``.
    """
    here = _state["own process"] and recipe.run.engine == "transformers"
    if not here or "transformers.modeling_utils" in sys.modules or "WORLD_SIZE" in os.environ:
        return
    import transformers.utils

    _put_off_dynamo()
    try:
        with _unavailable(transformers.utils, "is_scipy_available", "is_torch_distributed_available"):
            importlib.import_module("transformers.modeling_utils")
    except Exception:  # another version of transformers may need them: then it takes its time
        importlib.import_module("transformers.modeling_utils")
    _offer_tensor()


@contextmanager
def _unavailable(utils: ModuleType, *names: str) -> Iterator[None]:
    """Within, transformers' checks of these ``names`` say no; modules that are imported within keep that answer."""
    places = (utils, utils.import_utils)
    before = [(place, name, getattr(place, name)) for place in places for name in names if hasattr(place, name)]
    for place, name, _ in before:
        setattr(place, name, lambda: False)
    try:
        yield
    finally:
        for place, name, check in before:
            setattr(place, name, check)


def _offer_tensor() -> None:
    """Import ``torch.distributed.tensor`` where it is first asked for: transformers would have imported it."""
    import torch.distributed

    before = getattr(torch.distributed, "__getattr__", None)

    def get(name: str) -> Any:
        if name == "tensor" and torch.distributed.is_available():
            return importlib.import_module("torch.distributed.tensor")
        if before is not None:
            return before(name)
        raise AttributeError(f"module 'torch.distributed' has no attribute {name!r}")

    torch.distributed.__getattr__ = get  # type: ignore[method-assign]


def _put_off_dynamo() -> None:
    """Let a stand-in be ``torch._dynamo`` until more than its marks is asked for."""
    import torch

    if _DYNAMO not in sys.modules and (spec := importlib.util.find_spec(_DYNAMO)) is not None:
        sys.modules[_DYNAMO] = torch._dynamo = stand_in = _Marks(spec)  # type: ignore[attr-defined]
        sys.meta_path.insert(0, _Submodules(stand_in))


class _Marks(ModuleType):
    """``torch._dynamo`` as far as functions are marked with how ``torch.compile`` treats them."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(_DYNAMO, "Stand-in; see ivg.cli.quick_import.")
        self.__spec__, self.__file__, self.__path__ = spec, spec.origin, list(spec.submodule_search_locations or ())
        self._marked: list[tuple[str, Callable[..., Any]]] = []

    def disable(self, fn: Callable[..., Any] | None = None, recursive: bool = True, **more: Any) -> Any:
        """See ``torch._dynamo.disable``; while nothing can be compiled, calls go straight to ``fn``."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **more)
        within: list[Callable[..., Any]] = []

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys.modules.get(_DYNAMO) is self:
                return fn(*args, **kwargs)
            if not within:
                within.append(self.load().disable(fn, recursive, **more))
            return within[0](*args, **kwargs)

        return call

    def allow_in_graph(self, fn: Any) -> Any:
        """See ``torch._dynamo.allow_in_graph``."""
        self._marked.append(("allow_in_graph", fn))
        return fn

    def assume_constant_result(self, fn: Any) -> Any:
        """See ``torch._dynamo.assume_constant_result``."""
        self._marked.append(("assume_constant_result", fn))
        return fn

    def load(self) -> ModuleType:
        """The module itself, with all marks."""
        import torch

        if sys.modules.get(_DYNAMO) is self:
            del sys.modules[_DYNAMO]
            del torch._dynamo
        module = importlib.import_module(_DYNAMO)
        while self._marked:
            name, fn = self._marked.pop()
            getattr(module, name)(fn)
        return module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.load(), name)


class _Submodules(MetaPathFinder, Loader):
    """Loads ``torch._dynamo`` before any module of it but the one that stands alone."""

    def __init__(self, stand_in: _Marks) -> None:
        self.stand_in = stand_in
        self.spec: ModuleSpec | None = None

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None: the next finder looks; else the module that came with ``torch._dynamo``."""
        if not fullname.startswith(f"{_DYNAMO}.") or fullname == _ALONE or sys.modules.get(_DYNAMO) is not self.stand_in:
            return None
        self.stand_in.load()
        if fullname not in sys.modules:
            return None
        self.spec = sys.modules[fullname].__spec__
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, which is loaded."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to do: it is loaded."""
        module.__spec__ = self.spec
