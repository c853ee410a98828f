"""A client of vLLM's ``LLMEngine``: requests in, outputs out, restart when it dies. One thread.

``LLMEngine`` runs in this process or in one of its own (``VLLM_ENABLE_V1_MULTIPROCESSING``); either way a call of
:meth:`EngineClient.step` returns what is new.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing.connection import wait
from pathlib import Path
from queue import Queue
from typing import Any

from pydantic import ValidationError

from ivg.engines.vllm.versions import check_vllm
from ivg.errors import ConfigError, ModelError, shortened
from ivg.settings.run import CPU_MEMORY

PROCESSOR = "ivg.engines.vllm.processor:IVGBeta"
RESPONSE_PROCESSOR = "ivg.engines.vllm.response_processor:ResponsePenalties"
SCHEDULER = "ivg.engines.vllm.scheduler.make_scheduler"

ALIVE_CHECK_SECONDS = 0.5
"""How often the client checks that the engine's process is alive while it waits."""

_DRAFTS_NEED = (
    "drafts beside guides need vLLM's model runner V2: its choice where Triton is, as on GPUs, unless VLLM_USE_V2_MODEL_RUNNER=0; "
    "else leave num_speculative_tokens (speculative_config) out of [vllm]"
)


@dataclass(frozen=True)
class EngineClientOptions:
    """How vLLM runs a model; None is vLLM's default.

    Attributes:
        dtype: of all submodels.
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
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {k: v for k, v in given.items() if v is not None} | dict(self.extra)


@dataclass(frozen=True)
class EngineOutput:
    """What one step returned for a request.

    Attributes:
        output: vLLM's own.
        cached: of a finished request: prompt tokens that were cached, for each of its samples.
    """

    output: Any
    cached: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpenRequest:
    """A running request.

    Attributes:
        inner: vLLM's internal id, where vLLM can abort by that.
        states: vLLM's state of each sample, which outlives its own list of them; None where this vLLM keeps it elsewhere.
    """

    inner: str | None
    states: Sequence[Any]


class EngineClient:
    """One running engine.

    Args:
        folder: of a composite or value network (:mod:`ivg.engines.vllm.export`), or any model that vLLM loads.
        options: engine arguments.
        pooling: run it as a pooling model.
        guided: it is a composite.

    Raises:
        MissingDependencyError: no supported vLLM.
        ConfigError: arguments that vLLM does not take.
        ModelError: an engine that does not start.
    """

    def __init__(self, folder: str | Path, options: EngineClientOptions, *, pooling: bool = False, guided: bool = False) -> None:
        check_vllm()
        self.folder, self.options, self.pooling, self.guided = str(folder), options, pooling, guided
        self.failure: str | None = None
        self._numbers = itertools.count()
        self.llm_engine: Any = None
        """VLLM's ``LLMEngine``; None once closed."""
        self.requests: dict[str, OpenRequest] = {}
        """Those that run, by id."""
        self.start()

    def start(self) -> None:
        """Load and warm up; seconds to minutes."""
        _set_process_mode(self.options)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        given = {"enable_prefix_caching": True, "disable_log_stats": True, "use_tqdm_on_load": False, **self.options.arguments()}
        if _on_cpu():  # there it is the share of memory that must be free; VLLM_CPU_KVCACHE_SPACE sets the cache
            given.setdefault("gpu_memory_utilization", CPU_MEMORY)
            given.setdefault("block_size", 32)  # the smallest there: tokens after the last whole block are read again
            given.setdefault("enable_chunked_prefill", False)  # vLLM 0.32 crashes on seeded requests whose prompt it splits
        if self.pooling:
            given["runner"] = "pooling"
        elif given.setdefault("logprobs_mode", "raw_logprobs") != "raw_logprobs":
            raise ConfigError(
                f"logprobs_mode={given['logprobs_mode']!r}\n  ivg needs raw_logprobs, before tokens are forbidden; leave it out of [vllm]"
            )
        elif given.setdefault("scheduler_cls", SCHEDULER) != SCHEDULER:
            raise ConfigError(f"scheduler_cls={given['scheduler_cls']!r}\n  ivg has its own, for structured output; leave it out of [vllm]")
        if not self.pooling:
            given.setdefault("max_logprobs", -1)  # no limit: that is the server's
        if processors := self.processors:
            given["logits_processors"] = [*(given.get("logits_processors") or ()), *processors]
        try:
            args = EngineArgs(model=self.folder, **given)
        except (TypeError, ValueError) as e:  # pydantic's are ValueErrors
            message = str(e) if isinstance(e, TypeError) else _cause(e)
            raise ConfigError(
                f"vLLM does not take these engine arguments: {message}\n  see docs/how-to/vllm.md for the table [vllm]"
            ) from None
        try:
            self.llm_engine = LLMEngine.from_engine_args(args)
        except Exception as e:
            cause = _cause(e)
            advice = _DRAFTS_NEED if "logits processors are not supported when speculative" in cause else "see its log above"
            raise ModelError(f"vLLM cannot run {self.folder}: {cause}\n  {advice}") from e
        self.failure = None

    @property
    def processors(self) -> list[str]:
        """Our logits processors. Speculative decoding in vLLM has none; a composite without its own would not be guided."""
        own = [PROCESSOR] if self.guided else []
        return own if self.pooling or self.options.extra.get("speculative_config") else [*own, RESPONSE_PROCESSOR]

    @property
    def looks_back(self) -> bool:
        """Can requests count what the response has in earlier chunks?"""
        return RESPONSE_PROCESSOR in self.processors

    @property
    def config(self) -> Any:
        """That of vLLM."""
        return self.llm_engine.vllm_config

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer at most."""
        return int(self.config.model_config.max_model_len)

    @property
    def busy(self) -> bool:
        """Are requests running?"""
        return self.llm_engine is not None and bool(self.llm_engine.has_unfinished_requests())

    def add(self, tokens: Sequence[int], params: Any) -> str:
        """Begin a request; returns its id.

        Raises:
            ValueError: vLLM refuses it.
            ModelError: the engine is dead.
        """
        from vllm.exceptions import VLLMValidationError

        self._check_alive()
        number = f"ivg-{next(self._numbers)}"
        try:
            inner = self.llm_engine.add_request(number, {"prompt_token_ids": list(tokens)}, params)
            self.requests[number] = OpenRequest(self._abortable(inner), self._states(inner, getattr(params, "n", 1)))
        except (ValueError, TypeError, VLLMValidationError) as e:
            raise ValueError(str(e).strip()) from e
        except Exception as e:
            self._fail(e)
        return number

    def step(self) -> list[EngineOutput]:
        """The outputs of one step.

        Raises:
            ModelError: the engine stopped; see :meth:`restart`.
        """
        self._check_alive()
        if not self.busy:
            return []
        try:
            _wait_for_output(self.llm_engine.engine_core)
            return [EngineOutput(output, self._finish(output)) for output in self.llm_engine.step()]
        except Exception as e:
            self._fail(e)
            raise AssertionError from e  # not reached

    def end(self, number: str) -> tuple[int, ...]:
        """Abort a request whose samples are complete; returns the prompt tokens of each sample that were cached."""
        request = self.requests.get(number)
        cached = tuple(int(getattr(state, "num_cached_tokens", 0) or 0) for state in request.states) if request else ()
        self.abort([number])
        return cached

    def abort(self, numbers: Sequence[str]) -> None:
        """Abort requests; their cache blocks are freed in the next step."""
        gone = {number: self.requests.pop(number) for number in numbers if number in self.requests}
        if not gone or self.failure is not None:
            return
        inner = [request.inner for request in gone.values() if request.inner is not None]
        outer = [number for number, request in gone.items() if request.inner is None]
        try:
            if inner:  # by the external id vLLM 0.32 would drop the samples, but not their parent request
                self.llm_engine.abort_request(inner, internal=True)
            if outer:
                self.llm_engine.abort_request(outer)
        except Exception as e:
            self._fail(e)

    def restart(self) -> bool:
        """Start the engine again if it died, noticed or not (all requests are gone then). True if it had."""
        if self.failure is None and self.llm_engine is not None and not _exited(self.llm_engine.engine_core):
            return False
        self.close()
        self.start()
        return True

    def close(self) -> None:
        """Stop the engine and free its memory; a second call does nothing."""
        engine, self.llm_engine = self.llm_engine, None
        self.requests.clear()
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

    def _abortable(self, inner: Any) -> str | None:
        """The internal id, where this vLLM returns it and can abort by it."""
        taken = inspect.signature(self.llm_engine.abort_request).parameters
        return inner if isinstance(inner, str) and "internal" in taken else None

    def _states(self, inner: Any, samples: int) -> Sequence[Any]:
        """VLLM's state of each sample of a new request: an output has the cached tokens of the last sample only."""
        processor = getattr(self.llm_engine, "output_processor", None)
        states, parents = getattr(processor, "request_states", {}), getattr(processor, "parent_requests", {})
        names = [inner] if samples == 1 else getattr(parents.get(inner), "child_requests", ())
        found = [states[name] for name in names if name in states]
        return found if len(found) == samples else [None] * samples

    def _finish(self, output: Any) -> tuple[int, ...]:
        """Cached tokens of each sample of a request that is finished."""
        if not output.finished:
            return ()
        reported, request = output.num_cached_tokens or 0, self.requests.pop(output.request_id, None)
        known = [getattr(state, "num_cached_tokens", None) for state in request.states] if request else [None]
        return tuple(reported if count is None else int(count) for count in known)

    def _check_alive(self) -> None:
        if self.failure is not None or self.llm_engine is None:
            raise ModelError(f"the vLLM engine stopped: {self.failure or 'it was closed'}\n  restart; see its log")

    def _fail(self, error: Exception) -> None:
        self.failure = _cause(error)
        raise ModelError(f"the vLLM engine stopped: {self.failure}\n  see its log above") from error


def _set_process_mode(options: EngineClientOptions) -> None:
    """On a CPU one process is faster than two that share its cores; vLLM's environment variables take precedence."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if _on_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB for each engine; vLLM would use all that is free
        if (options.tensor_parallel_size or 1) == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _wait_for_output(client: Any) -> None:
    """Wait until the engine's process has sent something; vLLM itself would wait forever for one that was killed.

    Does not wait where the engine runs in this process, or where this vLLM keeps its queue elsewhere.

    Raises:
        RuntimeError: the process has exited, and everything that it sent is read.
    """
    queue = getattr(client, "outputs_queue", None)
    if not isinstance(queue, Queue):
        return
    ended = False
    while True:
        with queue.not_empty:
            if queue.not_empty.wait_for(lambda: bool(queue.queue), 0 if ended else ALIVE_CHECK_SECONDS):
                return
        if ended:
            raise RuntimeError("the engine process exited (out of memory?)")
        ended = _exited(client)  # check the queue once more: it may have sent its last output meanwhile


def _exited(client: Any) -> bool:
    """Has a process of the engine exited? False where it has none, or where that cannot be seen."""
    resources = getattr(client, "resources", None)
    if getattr(resources, "engine_dead", False):
        return True
    sentinels = getattr(getattr(resources, "engine_manager", None), "sentinels", None)
    try:
        return callable(sentinels) and bool(wait(sentinels(), 0))
    except (OSError, TypeError, ValueError):  # just closed, or of another kind
        return False


def _cause(error: BaseException) -> str:
    """The root cause in one line, or the first three errors of pydantic."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ValidationError):
        found = [(".".join(map(str, e["loc"])), shortened(e["msg"].strip().splitlines()[0])) for e in error.errors()[:3]]
        return "\n  ".join(f"{place}: {message}" if place else message for place, message in found)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shortened(lines[0])}" if lines else type(error).__name__
