"""How and where to run: the process, vLLM, and endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ivg.settings import placement as p
from ivg.settings import rules as r
from ivg.settings.schema import Setting
from ivg.settings.tables import Table

_COUNT = r.count(1)
_SHARE = r.number("in (0, 1]", 0, 1, open_low=True)

COMPOSITE_MEMORY, POOLING_MEMORY, CPU_MEMORY = 0.7, 0.2, 0.3
"""Shares of memory by default: a GPU's for the composite beside the pooling engine, for the pooling engine; on a CPU for each engine."""


class RunConfig(Table):
    """How and where to run. Device, dtype, revision, attention and quantization are defaults of all models that are loaded here."""

    engine: Annotated[
        str, Setting("transformers, vllm, or the URL of an OpenAI-compatible endpoint (http://…/v1).", flags=("--engine",))
    ] = "transformers"
    seed: Annotated[int, Setting("Random seed.", r.SEED, flags=("--seed",))] = 0
    n: Annotated[int, Setting("Responses for each prompt.", _COUNT, flags=("--n",))] = 1
    best_of: Annotated[
        int | None,
        Setting(
            "Draw so many responses for each prompt and keep the n with the highest mean log-probability of a token, best first.",
            _COUNT,
            flags=("--best-of",),
            unset="n: all are kept",
        ),
    ] = None
    batch_size: Annotated[int, Setting("Prompts at once.", _COUNT, flags=("--batch-size",))] = 16
    device: Annotated[p.Device | None, p.DEVICE] = None
    dtype: Annotated[p.Dtype, p.DTYPE] = "auto"
    revision: Annotated[str | None, p.REVISION] = None
    attention: Annotated[str | None, p.ATTENTION] = None
    trust_remote_code: Annotated[bool, Setting("Run Python code from the models' repositories.")] = False
    quantization: Annotated[dict[str, Any] | None, p.QUANTIZATION] = None
    generation_config: Annotated[
        Literal["auto", "ignore"],
        Setting(
            "auto: sampling settings in the base's generation_config.json are the defaults here; ignore: they are left out.",
            r.choice("auto", "ignore"),
            flags=("--generation-config",),
        ),
    ] = "auto"

    @model_validator(mode="after")
    def _best_of_is_enough(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of must be at least n ({self.n}), got {self.best_of}")
        return self


class VLLMConfig(Table):
    """The engine ``vllm`` (docs/how-to/vllm.md); what is left out is vLLM's default."""

    guides: Annotated[list[str] | None, Setting("Values that guide tokens in the composite model.", unset="those of the method")] = None
    value: Annotated[Literal["pooling", "transformers"], Setting("What reads the explicit value: pooling (vLLM) or transformers.")] = (
        "pooling"
    )
    max_model_len: Annotated[int | None, Setting("Largest number of tokens of prompt and response.", _COUNT, unset="vLLM's")] = None
    max_num_seqs: Annotated[int | None, Setting("Largest number of sequences at once.", _COUNT, unset="vLLM's")] = None
    gpu_memory_utilization: Annotated[
        float | None,
        Setting(
            "Share of a GPU's memory for the composite model.",
            _SHARE,
            unset=f"{COMPOSITE_MEMORY} beside the pooling engine, else vLLM's; on a CPU {CPU_MEMORY}",
        ),
    ] = None
    value_memory: Annotated[
        float | None,
        Setting("Share of a GPU's memory for the pooling engine.", _SHARE, unset=f"{POOLING_MEMORY}; on a CPU {CPU_MEMORY}"),
    ] = None
    tensor_parallel_size: Annotated[int | None, Setting("GPUs that share one model.", _COUNT, unset="1")] = None
    enforce_eager: Annotated[bool | None, Setting("Run without CUDA graphs.", unset="vLLM's")] = None
    num_speculative_tokens: Annotated[
        int | None,
        Setting(
            "Speculative decoding: the tuned model of the pair drafts so many tokens for each pass. Exact in distribution.",
            _COUNT,
            unset="no drafts",
        ),
    ] = None
    cache: Annotated[str | None, Setting("Folder for the small directories of composite models.", unset="the user's cache")] = None
    arguments: Annotated[dict[str, Any], Setting("Any other of vLLM's engine arguments.")] = Field(default_factory=dict)


class EndpointConfig(Table):
    """An OpenAI-compatible completions endpoint as base (``run.engine`` is its URL)."""

    model: Annotated[str | None, Setting("The model's name there.", unset="the path of the base")] = None
    api_key_env: Annotated[str, Setting("Environment variable that holds the API key.")] = "OPENAI_API_KEY"
    tokenizer: Annotated[str | None, Setting("Directory or hub id, to render chats with.", unset="prompts are sent as text")] = None
    timeout: Annotated[float, Setting("Seconds for one request.", r.POSITIVE)] = 120.0
    concurrency: Annotated[int, Setting("Requests at once.", _COUNT)] = 64
    token_pieces: Annotated[bool, Setting("Ask for the text of every token.")] = False
    structured_output: Annotated[
        Literal["vllm", "openai"],
        Setting("The server's field for structured output: vllm (structured_outputs) or openai (response_format, JSON schemas alone)."),
    ] = "vllm"
