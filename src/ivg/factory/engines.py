"""From settings to models that another engine runs: vLLM, or an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ivg.embedded import path
from ivg.errors import ConfigError
from ivg.factory.values import make_value, prompt_template
from ivg.model import GuidedModel
from ivg.models.generation_config import read_generation_config
from ivg.models.hub import find_model
from ivg.models.loading import LoadOptions, eos_ids, load_config, load_tokenizer
from ivg.models.network import Network, resolve, without_adapter
from ivg.models.placement import pick_device, pick_dtype
from ivg.models.prompt_encoder import PromptEncoder
from ivg.models.prompt_template import PromptTemplate
from ivg.models.shared import SharedNetworks
from ivg.search.methods import get_method, resolve_fallbacks
from ivg.settings.models import check_pair
from ivg.settings.placement import is_spread
from ivg.settings.recipe import ModelRef, NamedValue, Recipe, VLLMConfig
from ivg.settings.run import COMPOSITE_MEMORY, POOLING_MEMORY
from ivg.types import Value
from ivg.values.implicit import share_pair_passes

if TYPE_CHECKING:
    from ivg.engines.vllm.client import EngineClient, EngineClientOptions
    from ivg.engines.vllm.export import Guide


def vllm_model(recipe: Recipe, options: LoadOptions, *, every_guide: bool = False) -> GuidedModel:
    """Base and guides as one composite inside vLLM, the explicit value in its pooling engine, other values in this process.

    Args:
        recipe: models, values and the table ``vllm``.
        options: for what is loaded here.
        every_guide: put all pairs and autoregressive rewards inside, not only what the recipe's method needs.

    Raises:
        ConfigError: guides that cannot run inside vLLM.
        VocabularyError: guides with other tokens than the base's.
        MissingDependencyError: no supported vLLM.
        ModelError: vLLM does not start.
    """
    from ivg.engines.vllm.client import EngineClient
    from ivg.engines.vllm.engine import VLLMEngine
    from ivg.engines.vllm.export import default_cache, export_composite, export_to_cache, running_parts
    from ivg.engines.vllm.value import VLLMGuide
    from ivg.engines.vllm.versions import check_vllm

    check_vllm()
    refs, named = _references(recipe)
    settings, base = recipe.vllm, refs["base"]
    others, options = options, without_adapter(options.of(base))
    _check_vllm_can(options)
    guides = inner_guides(recipe, others, every_guide=every_guide)[1]
    network = resolve(base, "base", options)
    _check_adapters([("base", network), *_networks(guides, options)], settings)
    tokenizer = load_tokenizer(network.tokenizer, options, "base")
    cache = Path(settings.cache) if settings.cache else default_cache()
    folder = (
        export_to_cache(lambda place: export_composite(base, guides, place, options=options), cache)
        if guides or network.adapter
        else Path(find_model(network.path, "base", options.hub()))
    )
    pooled = settings.value == "pooling" and "explicit" in named and "value" in named["explicit"].given
    engine_options = _client_options(settings, options, shared=pooled, extra=_drafts(settings, named, options))
    client = EngineClient(folder, engine_options, guided=bool(guides or network.adapter))
    with _closed_on_error(client):  # a value that does not load must not leave vLLM's processes behind
        encoder = _prompt_encoder("base", base, tokenizer, options, client.max_model_len)
        inner = {name: VLLMGuide(name, partial(make_value, name, named[name], others)) for name in (guide.name for guide in guides)}
        values: dict[str, Value] = dict(inner)
        outside = {name: value for name, value in named.items() if name not in inner}
        for name, value in sorted(outside.items(), key=lambda item: pooled and item[0] == "explicit"):  # the second engine last
            if pooled and name == "explicit":
                values[name] = _pooled_value(value.given["value"], cache, settings, others)
            else:
                values[name] = make_value(name, value, others)
        engine = VLLMEngine(client, encoder, running_parts(folder) if guides else ["base"], inner)
        return GuidedModel(encoder, {name: values[name] for name in named}, engine=engine, generation_config=recipe.run.generation_config)


@contextmanager
def _closed_on_error(client: EngineClient) -> Iterator[None]:
    try:
        yield
    except BaseException:
        client.close()
        raise


def inner_guides(recipe: Recipe, options: LoadOptions, *, every_guide: bool) -> tuple[ModelRef, list[Guide]]:
    """(the base, the guides of the composite of a recipe).

    Raises:
        ConfigError: guides that cannot run inside vLLM.
    """
    refs, named = _references(recipe)
    check_plain("base", refs["base"], "inside vLLM", adapters=True)
    return refs["base"], [_guide(name, named[name], refs["base"], options) for name in _inside(recipe, named, every_guide=every_guide)]


def endpoint_model(recipe: Recipe, options: LoadOptions) -> GuidedModel:
    """The model behind an OpenAI-compatible endpoint, with values in this process.

    Raises:
        ConfigError: no model name.
        MissingDependencyError: without the extra ``endpoint``.
    """
    import os

    from ivg.engines.endpoint.engine import load_endpoint

    settings, given = recipe.endpoint, dict(recipe.models.given)
    base = given.get("base")
    if base is not None:
        check_plain("base", base, f"on {recipe.run.engine}")
    if base is not None and options.of(base) != options:
        raise ConfigError(f"base runs on {recipe.run.engine}, which has loaded it\n  leave its device, dtype, revision … out of the recipe")
    model = settings.model or (base.path if base else None)
    if model is None:
        raise ConfigError(
            f"{recipe.run.engine} needs the name of a model on that server\n  give --base NAME, or model in the table [endpoint]"
        )
    tokenizer = load_tokenizer(settings.tokenizer, options, "base") if settings.tokenizer else None
    engine = load_endpoint(
        recipe.run.engine,
        model,
        api_key=os.environ.get(settings.api_key_env),
        tokenizer=tokenizer,
        template=prompt_template(base) if base else None,
        timeout=settings.timeout,
        concurrency=settings.concurrency,
        token_pieces=settings.token_pieces,
        structured_output=settings.structured_output,
        explicit=recipe.run.generation_config == "ignore",
    )
    networks = SharedNetworks()
    values = {name: make_value(name, value, options, networks) for name, value in {**_roles(given), **recipe.values}.items()}
    share_pair_passes(values.values(), networks)
    return GuidedModel(engine.base, values, engine=engine, generation_config=recipe.run.generation_config)


def _references(recipe: Recipe) -> tuple[dict[str, ModelRef], dict[str, NamedValue]]:
    """(models by role, values by name); the embedded ones if the recipe names no models."""
    given = dict(recipe.models.given)
    if not given:
        refs = {role: ModelRef(path=str(path(role))) for role in ("base", "tuned", "untuned", "value")}
        other = {"explicit-other": NamedValue(value=ModelRef(path=str(path("value-other"))))}
        return refs, {**_roles(refs), **other, **recipe.values}
    refs = {"base": ModelRef(path=str(path("base"))), **given}
    return refs, {**_roles(given), **recipe.values}


def _roles(refs: Mapping[str, ModelRef]) -> dict[str, NamedValue]:
    """The values of the table ``models``, by the names that methods use."""
    check_pair(refs.get("tuned"), refs.get("untuned"))
    out: dict[str, NamedValue] = {}
    if "tuned" in refs:
        out["implicit"] = NamedValue(tuned=refs["tuned"], untuned=refs["untuned"])
    for name, role in (("explicit", "value"), ("reward", "reward"), ("arm", "arm")):
        if role in refs:
            out[name] = NamedValue.model_validate({role: refs[role]})
    return out


def _inside(recipe: Recipe, named: Mapping[str, NamedValue], *, every_guide: bool) -> list[str]:
    """Names of the values that guide inside the composite."""
    if recipe.vllm.guides is not None:
        if missing := [name for name in recipe.vllm.guides if name not in named]:
            raise ConfigError(f"vllm.guides: no value called {', '.join(missing)}\n  expected some of: {', '.join(named) or 'none'}")
        return recipe.vllm.guides
    chosen = resolve_fallbacks(get_method(recipe.search.method, **recipe.search.settings()), named)
    wanted = [name for name, _ in chosen.guides if name in named]
    if every_guide:
        wanted += [name for name, value in named.items() if {"tuned", "arm"} & set(value.given) and name not in wanted]
    return wanted


def _guide(name: str, value: NamedValue, base: ModelRef, options: LoadOptions) -> Guide:
    """``value`` as a guide inside the composite."""
    from ivg.engines.vllm.export import Guide, head_kind, pair

    refs = value.given
    for role, ref in refs.items():
        check_plain(f"{role} of {name}", ref, "inside vLLM", adapters=role != "value")
        whole = without_adapter(options.of(base))
        if without_adapter(whole.of(ref)) != whole or options.of(ref).revision != whole.revision:
            raise ConfigError(
                f"{role} of {name} is to be loaded otherwise than the base (device, dtype, revision …); inside vLLM they are one model\n"
                "  say it for all models in [run], or use the transformers engine"
            )
        template = prompt_template(ref, refs["tuned"]) if role == "untuned" else _template(ref, options.of(ref))
        if template != prompt_template(base):
            raise ConfigError(
                f"{role} of {name} reads prompts by {template}, the base by {prompt_template(base)}\n"
                "  inside vLLM all models read the base's token ids; give them one template, or use the transformers engine"
            )
    if "tuned" in refs:
        return pair(refs["tuned"], refs["untuned"], name)
    ((role, ref),) = refs.items()
    if role == "arm":
        return Guide(name, ((name, ref, 1.0),))
    if role == "value" and head_kind(ref.path, options.of(ref)) == "vocabulary":
        return Guide(name, ((name, ref.path, 1.0),), "vocabulary")
    raise ConfigError(
        f"{name} cannot guide inside vLLM: it needs a vocabulary head\n  expected a pair, an arm, or a value network with a vocabulary head"
    )


def check_plain(what: str, ref: ModelRef, where: str, *, adapters: bool = False) -> None:
    """Raise for a model with an instruction or an adapter of its own, which other engines do not read with.

    Args:
        what: the model.
        ref: its settings.
        where: the engine, for the error.
        adapters: the engine reads with adapters.

    Raises:
        ConfigError: names the setting.
    """
    for name in ("system",) if adapters else ("system", "adapter"):
        if getattr(ref, name) is not None:
            why = "all models read the same tokens" if name == "system" else "an adapter is not switched"
            raise ConfigError(
                f"{what} has {name} = {getattr(ref, name)!r}; {where} {why}\n"
                "  use the transformers engine" + (", or give the merged model" if name == "adapter" else "")
            )


def _networks(guides: Sequence[Guide], options: LoadOptions) -> list[tuple[str, Network]]:
    """The models of guides, by their names in usage."""
    return [(name, resolve(model, name, options)) for guide in guides for name, model, _ in guide.parts]


def _check_adapters(networks: Sequence[tuple[str, Network]], settings: VLLMConfig) -> None:
    """Raise for adapters over several GPUs.

    Raises:
        ConfigError: names the model.
    """
    size = settings.tensor_parallel_size or 1
    if size > 1 and (names := [name for name, network in networks if network.adapter]):
        raise ConfigError(
            f"{names[0]} has an adapter; inside vLLM that works on one GPU, got tensor_parallel_size={size}\n"
            "  leave tensor_parallel_size out, or give the merged model"
        )


def _check_vllm_can(options: LoadOptions) -> None:
    """Raise for what vLLM would ignore.

    Raises:
        ConfigError: names the setting, and what takes its place.
    """
    if options.quantization is not None or options.attention is not None:
        what = "quantization" if options.quantization is not None else "attention"
        raise ConfigError(
            f"{what} is how transformers loads models; vLLM would ignore it\n"
            "  for a base without guides: arguments in the table [vllm]; else the transformers engine"
        )
    if is_spread(options.device):
        raise ConfigError(f"device {options.device!r} is for transformers\n  in vLLM: tensor_parallel_size in the table [vllm]")


def _drafts(settings: VLLMConfig, named: Mapping[str, NamedValue], options: LoadOptions) -> dict[str, Any]:
    """VLLM's argument for drafts by the tuned model of the pair; none: without drafts.

    Raises:
        ConfigError: no tuned model that can draft.
    """
    if settings.num_speculative_tokens is None:
        return {}
    if "speculative_config" in settings.arguments:
        raise ConfigError(
            "num_speculative_tokens beside speculative_config in the arguments of [vllm]\n  give one of them: both say what drafts"
        )
    pairs = {name: value.given["tuned"] for name, value in named.items() if "tuned" in value.given}
    if "implicit" not in pairs and len(pairs) != 1:
        which = (
            f"several pairs have a tuned model that could draft: {', '.join(pairs)}"
            if pairs
            else "there is no pair whose tuned model could draft"
        )
        advice = "give speculative_config in the arguments of [vllm]" if pairs else "give --tuned and --untuned"
        raise ConfigError(f"num_speculative_tokens: {which}\n  {advice}, or leave it out")
    tuned = pairs.get("implicit") or next(iter(pairs.values()))
    network = resolve(tuned, "tuned", options)
    if network.adapter is not None:
        raise ConfigError(
            f"num_speculative_tokens: tuned has an adapter ({network.adapter}); vLLM needs a whole model\n  merge it, or leave it out"
        )
    draft = {
        "method": "draft_model",
        "model": str(find_model(network.path, "tuned", options.hub())),
        "num_speculative_tokens": settings.num_speculative_tokens,
        "revision": options.revision,
    }
    return {"speculative_config": {k: v for k, v in draft.items() if v is not None}}


def _client_options(
    settings: VLLMConfig, options: LoadOptions, *, shared: bool, value: bool = False, extra: Mapping[str, Any] | None = None
) -> EngineClientOptions:
    """Of the composite, or of the pooling engine; ``shared``: both run on one GPU; ``extra``: more of vLLM's arguments."""
    from ivg.engines.vllm.client import EngineClientOptions

    device = pick_device(options.device)
    dtype = str(pick_dtype(options.dtype, device)).removeprefix("torch.")
    memory = settings.value_memory if value else settings.gpu_memory_utilization
    if memory is None and device.type == "cuda" and shared:
        memory = POOLING_MEMORY if value else COMPOSITE_MEMORY
    arguments = dict(settings.arguments) | dict(extra or {})
    if value:  # the pooling engine draws no tokens
        arguments.pop("speculative_config", None)
    elif options.revision:
        arguments["revision"] = options.revision
    return EngineClientOptions(
        dtype,
        settings.max_model_len,
        settings.max_num_seqs,
        memory,
        settings.tensor_parallel_size,
        settings.enforce_eager,
        options.trust_remote_code or None,
        arguments,
    )


def _prompt_encoder(name: str, ref: ModelRef, tokenizer: Any, options: LoadOptions, longest: int) -> PromptEncoder:
    """How a model in another engine reads prompts."""
    path = resolve(ref, name, options).path
    found = find_model(path, name, options.hub())
    config = load_config(path, options, name)
    generation = read_generation_config(found, revision=options.revision)
    ends = eos_ids(SimpleNamespace(generation_config=generation, config=config), tokenizer)
    text = config.get_text_config()
    encoder = PromptEncoder(name, tokenizer, _template(ref, options), ends, vocab_size=text.vocab_size, max_positions=longest)
    encoder.generation_config = generation
    return encoder


def _template(ref: ModelRef, options: LoadOptions) -> PromptTemplate:
    """How a model reads prompts: as configured, else as a value network was trained."""
    if ref.template is not None:
        return prompt_template(ref)
    config = load_config(ref.path, options, "model")
    return prompt_template(ref).with_default((getattr(config, "ivg_value", None) or {}).get("template"))


def _pooled_value(ref: ModelRef, cache: Path, settings: VLLMConfig, options: LoadOptions) -> Value:
    """The explicit value in vLLM's pooling engine."""
    from ivg.engines.vllm.client import EngineClient
    from ivg.engines.vllm.export import export_to_cache, export_value
    from ivg.engines.vllm.value import PooledValue
    from ivg.models.value_head import read_head

    check_plain("value", ref, "inside vLLM")
    check_plain("value", ref, "inside vLLM")
    options = options.of(ref)
    _check_vllm_can(options)
    weight, bias = read_head(find_model(ref.path, "explicit", options.hub()), options.hub())
    tokenizer = load_tokenizer(ref.path, options, "explicit")
    folder = export_to_cache(lambda place: export_value(ref.path, place, options=options), cache)
    client: EngineClient = EngineClient(folder, _client_options(settings, options, shared=True, value=True), pooling=True)
    with _closed_on_error(client):
        return PooledValue(client, _prompt_encoder("explicit", ref, tokenizer, options, client.max_model_len), weight, bias)
