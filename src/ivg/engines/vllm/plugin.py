"""vLLM's entry point: makes the composite and the value network known, in the front end and in every worker.

Named in pyproject.toml under ``vllm.general_plugins``; vLLM calls it in each of its processes. Imports neither torch nor models.
"""

from __future__ import annotations


def register() -> None:
    """Register config classes with transformers and, by name alone, models with vLLM.

    Raises:
        MissingDependencyError: a version of vLLM that this package was not made for.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from ivg.engines.vllm.config import IVGConfig, IVGValueConfig
    from ivg.engines.vllm.versions import check_vllm

    check_vllm()
    AutoConfig.register("ivg", IVGConfig, exist_ok=True)
    AutoConfig.register("ivg_value", IVGValueConfig, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for name, place in (("IVGForCausalLM", "ivg.engines.vllm.model"), ("IVGForValue", "ivg.engines.vllm.value_model")):
        if name not in known:
            ModelRegistry.register_model(name, f"{place}:{name}")
