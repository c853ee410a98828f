"""The recipe: all settings of a run, from a TOML file and the command line. Unknown names are errors; aliases are accepted.

A recipe has the tables ``models``, ``values``, ``search``, ``sampling``, ``run``, ``images``, ``vllm``, ``endpoint``, ``eval`` and
``serve``; each may be left out::

    [models]
    base = "mistralai/Mistral-7B-Instruct-v0.2"
    tuned = { path = "allenai/tulu-2-dpo-7b", template = "chat" }
    untuned = "allenai/tulu-2-7b"
    value = "path/to/value"

    [values.plain]  # further values, for token, select, weights: tuned and untuned, or value, or reward, or arm
    tuned = "path/to/pair/tuned"
    untuned = "path/to/pair/untuned"

    [search]
    method = "ivg"
    width = 2
    successors = 2
    chunk_length = 30
    weights = { implicit = 1.0, plain = 0.5 }
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from ivg.errors import ConfigError
from ivg.settings.eval import EvalConfig as EvalConfig
from ivg.settings.images import ImagesConfig
from ivg.settings.messages import explain
from ivg.settings.models import ROLES as ROLES
from ivg.settings.models import ModelRef as ModelRef
from ivg.settings.models import ModelsConfig as ModelsConfig
from ivg.settings.models import NamedValue as NamedValue
from ivg.settings.models import RewardRef as RewardRef
from ivg.settings.placement import Device
from ivg.settings.requests import MethodConfig as MethodConfig
from ivg.settings.requests import SamplingConfig as SamplingConfig
from ivg.settings.requests import SearchConfig as SearchConfig
from ivg.settings.rules import is_template_file
from ivg.settings.run import EndpointConfig as EndpointConfig
from ivg.settings.run import RunConfig as RunConfig
from ivg.settings.run import VLLMConfig as VLLMConfig
from ivg.settings.schema import Setting
from ivg.settings.serve import ServeSettings as ServeSettings
from ivg.settings.tables import Table

_Ref = TypeVar("_Ref", bound=ModelRef)


class Recipe(Table):
    """The settings of one run. The help of a table is its title on the command line; docs/reference/settings.md lists all."""

    models: Annotated[ModelsConfig, Setting("Models (none: the embedded ones)")] = ModelsConfig()
    values: Annotated[dict[str, NamedValue], Setting("Further values, by name")] = Field(default_factory=dict)
    search: Annotated[SearchConfig, Setting("Search")] = SearchConfig()
    sampling: Annotated[SamplingConfig, Setting("Sampling")] = SamplingConfig()
    run: Annotated[RunConfig, Setting("Run")] = RunConfig()
    images: Annotated[ImagesConfig, Setting("Pictures (docs/how-to/images.md)")] = ImagesConfig()
    vllm: Annotated[VLLMConfig, Setting("vLLM")] = VLLMConfig()
    endpoint: Annotated[EndpointConfig, Setting("Endpoint")] = EndpointConfig()
    eval: Annotated[EvalConfig, Setting("Evaluation")] = EvalConfig()
    serve: Annotated[ServeSettings, Setting("Server")] = ServeSettings()

    @classmethod
    def parse(cls, data: dict[str, Any], source: str = "settings") -> Recipe:
        """From plain values.

        Raises:
            ConfigError: unknown keys or unusable values; names each with what was expected.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise ConfigError(f"{source}: " + "; ".join(explain(error, cls) for error in e.errors())) from None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """From a TOML file; relative paths of models, tokenizers and ``eval.data`` are first looked up in its folder.

        Raises:
            ConfigError: no such file, not TOML, or unusable settings.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path} is not UTF-8: {e.reason} at byte {e.start}\n  save it as UTF-8") from None
        except OSError as e:
            raise ConfigError(f"cannot read recipe {path}: {e.strerror}\n  expected a TOML file") from None
        except tomllib.TOMLDecodeError as e:
            raise ConfigError(f"{path} is not TOML: {e}") from None
        recipe = cls.parse(data, str(path))
        found = {role: _beside(path.parent, ref) for role, ref in recipe.local_models.items()}
        values = {
            name: value.model_copy(update={role: _beside(path.parent, ref) for role, ref in value.given.items()})
            for name, value in recipe.values.items()
        }
        judges = {name: _beside(path.parent, ref) for name, ref in recipe.eval.judges.items()}
        gold = recipe.eval.gold and _beside(path.parent, recipe.eval.gold)
        rows = recipe.eval.data
        rows = str(path.parent / rows) if rows is not None and (path.parent / rows).exists() else rows
        tokenizer = recipe.endpoint.tokenizer
        tokenizer = str(path.parent / tokenizer) if tokenizer is not None and (path.parent / tokenizer).is_dir() else tokenizer
        tables = {
            "models": recipe.models.model_copy(update=found),
            "endpoint": recipe.endpoint.model_copy(update={"tokenizer": tokenizer}),
            "values": values,
            "eval": recipe.eval.model_copy(update={"judges": judges, "gold": gold, "data": rows}),
        }
        return recipe.model_copy(update=tables)

    @property
    def uses_endpoint(self) -> bool:
        """Does a server run the base?"""
        return self.run.engine.startswith(("http://", "https://"))

    @property
    def uses_embedded(self) -> bool:
        """Are the models those that come with ivg?"""
        return not self.models.given and not self.uses_endpoint

    def check_one_answer(self, who: str) -> None:
        """Raise where ``run.best_of`` is set and ``who`` draws one answer, without choosing among several.

        Raises:
            ConfigError: says what reads it.
        """
        if self.run.best_of is not None:
            raise ConfigError(
                f"run.best_of={self.run.best_of}: {who} draws one answer\n"
                "  leave it out; ivg generate reads it, and the method bon chooses by a value"
            )

    @property
    def local_models(self) -> dict[str, ModelRef]:
        """The models to load here, by role; the base of an endpoint is not among them."""
        return {role: ref for role, ref in self.models.given.items() if not (self.uses_endpoint and role == "base")}

    @property
    def devices(self) -> dict[str, Device | None]:
        """The device of each model that is loaded here, by role (of a named value: NAME.ROLE); None: the best available."""
        refs = {**self.local_models, **{f"{name}.{role}": ref for name, value in self.values.items() for role, ref in value.given.items()}}
        return {role: self.run.device if ref.device is None else ref.device for role, ref in refs.items()} or {"base": self.run.device}

    def override(self, **tables: dict[str, Any]) -> Recipe:
        """A copy with other settings, by table and name; None: unchanged.

        Raises:
            ConfigError: as :meth:`parse`.
        """
        data = self.model_dump(exclude_none=True, exclude_unset=True)
        for table, settings in tables.items():
            data.setdefault(table, {}).update({k: v for k, v in settings.items() if v is not None})
        return type(self).parse(data)


def _beside(folder: Path, ref: _Ref) -> _Ref:
    """``ref`` with its path in ``folder``, if it is a directory there, or a function in a Python file there; a template's file alike."""
    if ref.template is not None and is_template_file(ref.template) and (folder / ref.template).is_file():
        ref = ref.model_copy(update={"template": str(folder / ref.template)})
    if ref.adapter is not None and (folder / ref.adapter).is_dir():
        ref = ref.model_copy(update={"adapter": str(folder / ref.adapter)})
    there = folder / ref.path
    file, sign, _ = ref.path.rpartition(":")
    found = there.is_dir() or (bool(sign) and file.endswith(".py") and (folder / file).is_file())
    return ref.model_copy(update={"path": str(there)}) if found else ref
