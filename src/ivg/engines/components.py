"""What a guided model is made of: its engine and its values, whose caches, memory and processes are handled together."""

from __future__ import annotations

import warnings
from typing import Any

from ivg.errors import IVGError, ModelError
from ivg.models.cached_lm import CachedLM, local_reader
from ivg.models.prompt_encoder import PromptEncoder
from ivg.types import Engine, Value
from ivg.utils import environment
from ivg.utils.locks import FairLock


class Components:
    """Engine and values of :class:`~ivg.model.GuidedModel`, which fills in the attributes.

    Attributes:
        base: the frozen model that writes.
        values: by name.
        engine: makes beams longer.
        lock: held for one call at a time.
    """

    base: PromptEncoder
    values: dict[str, Value]
    engine: Engine
    lock: FairLock
    _contrast: Any

    @property
    def reader(self) -> CachedLM:
        """The base as a model that runs in this process.

        Raises:
            ConfigError: another engine runs it.
        """
        return local_reader(self.base)

    @property
    def readers(self) -> list[CachedLM]:
        """All language models that run in this process, the base first."""
        found = [self.base, *(model for value in self._all_values for model in value.cached_lms())]
        return [reader for reader in dict.fromkeys(found) if isinstance(reader, CachedLM)]

    @property
    def _all_values(self) -> list[Value]:
        return [*self.values.values(), *filter(None, [self._contrast])]

    @property
    def _components(self) -> list[Engine | Value]:
        return [self.engine, *self._all_values]

    def reset_caches(self) -> bool:
        """Empty all caches, so that later results do not depend on earlier calls, to the last bit.

        What runs in another process and died is started again. True if something had died.

        Raises:
            ModelError: it does not start; all others have been reset.
        """
        failed: Exception | None = None
        died = False
        with self.lock:
            for component in self._components:
                try:
                    component.reset_caches()
                    died = component.restart() or died
                except Exception as e:
                    failed = failed or e
        if failed is not None:
            raise failed if isinstance(failed, IVGError) else ModelError(f"a model cannot be restarted: {failed}") from failed
        return died

    def release_memory(self) -> None:
        """Give memory that is not needed now back to the system; results do not change. For long-lived processes."""
        with self.lock:
            for component in self._components:
                component.release_memory()
        environment.malloc_trim()

    def forget(self) -> bool:
        """Deprecated name of :meth:`reset_caches`."""
        warnings.warn("GuidedModel.forget is now reset_caches; the old name works until 0.3", DeprecationWarning, stacklevel=2)
        return self.reset_caches()

    def give_back(self) -> None:
        """Deprecated name of :meth:`release_memory`."""
        warnings.warn("GuidedModel.give_back is now release_memory; the old name works until 0.3", DeprecationWarning, stacklevel=2)
        self.release_memory()

    def close(self) -> None:
        """Stop what runs in other processes; the model cannot be used afterwards."""
        for component in self._components:
            component.close()
