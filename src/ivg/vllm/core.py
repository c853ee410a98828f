"""vLLM's engine core behind a small door: requests in, results out, one thread, death and revival.

``LLMEngine`` runs in this process or drives a process of its own (``VLLM_ENABLE_V1_MULTIPROCESSING``); either way a call of
:meth:`Core.step` brings what is new. Knows: engine arguments. Must not know beams or values.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivg.errors import ConfigError, ModelError
from ivg.vllm.versions import check_vllm

PROCESSOR = "ivg.vllm.processor:IVGBeta"


@dataclass(frozen=True)
class CoreOptions:
    """How vLLM runs a model; what is None is vLLM's default.

    Attributes:
        dtype: of all parts.
        max_model_len: tokens of prompt and answer at most.
        max_num_seqs: hypotheses in one pass at most; the largest W * K of all requests together should fit.
        gpu_memory_utilization: share of a GPU's memory for weights and cache of this engine.
        tensor_parallel_size: GPUs that share each layer.
        enforce_eager: no compilation and no graphs: starts sooner, runs slower.
        extra: any other of vLLM's engine arguments.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int | None = None
    enforce_eager: bool | None = None
    trust_remote_code: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """For ``EngineArgs``."""
        names = ("max_model_len", "max_num_seqs", "gpu_memory_utilization", "tensor_parallel_size", "enforce_eager", "trust_remote_code")
        given = {name: getattr(self, name) for name in names}
        return {"dtype": self.dtype, **{k: v for k, v in given.items() if v is not None}, **self.extra}


class Core:
    """One running engine.

    Args:
        folder: of a composite or value network (``vllm.pack``), or any model that vLLM loads.
        options: see there.
        pooling: it scores instead of writing.
        guided: it is a composite.

    Raises:
        MissingDependencyError: no vLLM that fits.
        ConfigError: arguments that vLLM does not take.
        ModelError: an engine that does not start.
    """

    def __init__(self, folder: str | Path, options: CoreOptions, *, pooling: bool = False, guided: bool = False) -> None:
        check_vllm()
        self.folder, self.options, self.pooling, self.guided = str(folder), options, pooling, guided
        self.failure: str | None = None
        self._numbers = itertools.count()
        self._engine: Any = None
        self.start()

    def start(self) -> None:
        """Load and warm up; seconds to minutes."""
        _settle_process_mode(self.options)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        given = {"enable_prefix_caching": True, "disable_log_stats": True, "use_tqdm_on_load": False, **self.options.arguments()}
        if _on_cpu():  # there it is a share of the machine's memory that must be free, not what is taken (VLLM_CPU_KVCACHE_SPACE)
            given.setdefault("gpu_memory_utilization", 0.3)
            given.setdefault("block_size", 32)  # the smallest there: what lies behind the last whole block is read again
            given.setdefault("enable_chunked_prefill", False)  # vLLM 0.32 dies of seeded requests whose prompt it cuts
        if self.pooling:
            given["runner"] = "pooling"
        if self.guided:
            given["logits_processors"] = [PROCESSOR]
        try:
            args = EngineArgs(model=self.folder, **given)
        except TypeError as e:
            raise ConfigError(f"vLLM does not take these engine arguments: {e}\n  see docs/vllm.md for the table [vllm]") from None
        try:
            self._engine = LLMEngine.from_engine_args(args)
        except Exception as e:
            raise ModelError(f"vLLM cannot run {self.folder}: {_told(e)}\n  its log above says more") from e
        self.failure = None

    @property
    def config(self) -> Any:
        """That of vLLM."""
        return self._engine.vllm_config

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer at most."""
        return int(self.config.model_config.max_model_len)

    @property
    def busy(self) -> bool:
        """Are requests under way?"""
        return self._engine is not None and bool(self._engine.has_unfinished_requests())

    def add(self, tokens: Sequence[int], params: Any) -> str:
        """Begin a request; its number.

        Raises:
            ValueError: vLLM refuses it; nothing has begun.
            ModelError: the engine is dead.
        """
        from vllm.exceptions import VLLMValidationError

        self._demand_life()
        number = f"ivg-{next(self._numbers)}"
        try:
            self._engine.add_request(number, {"prompt_token_ids": list(tokens)}, params)
        except (ValueError, TypeError, VLLMValidationError) as e:
            raise ValueError(str(e).strip()) from e
        except Exception as e:
            self._die(e)
        return number

    def step(self) -> list[Any]:
        """What one pass brought: vLLM's outputs.

        Raises:
            ModelError: the engine died; :meth:`revive` begins anew.
        """
        self._demand_life()
        if not self.busy:
            return []
        try:
            return self._engine.step()
        except Exception as e:
            self._die(e)
            raise AssertionError from e  # not reached

    def abort(self, numbers: Sequence[str]) -> None:
        """Give requests up; their cache blocks are free with the next pass."""
        if numbers and self.failure is None:
            try:
                self._engine.abort_request(list(numbers))
            except Exception as e:
                self._die(e)

    def revive(self) -> None:
        """Begin anew where the engine died; all requests are gone then."""
        if self.failure is not None:
            self.close()
            self.start()

    def close(self) -> None:
        """Stop it and free what it holds."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with contextlib.suppress(Exception):
            engine.engine_core.shutdown()
        del engine
        if self._in_process:
            from vllm.distributed import cleanup_dist_env_and_memory

            with contextlib.suppress(Exception):
                cleanup_dist_env_and_memory()

    @property
    def _in_process(self) -> bool:
        return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"

    def _demand_life(self) -> None:
        if self.failure is not None or self._engine is None:
            raise ModelError(f"the vLLM engine died: {self.failure or 'it was closed'}\n  start again; its log says more")

    def _die(self, error: Exception) -> None:
        self.failure = _told(error)
        raise ModelError(f"the vLLM engine died: {self.failure}\n  its log above says more") from error


def _settle_process_mode(options: CoreOptions) -> None:
    """On a CPU one process is faster than two that share its cores; whoever set vLLM's variables knows better."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if _on_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB for each engine; vLLM would take what is left of its share
        if (options.tensor_parallel_size or 1) == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _told(error: BaseException) -> str:
    """The first cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
