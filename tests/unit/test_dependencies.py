"""Upper bounds on dependencies, and the private interfaces that are the reason for them."""

import re
import tomllib
from pathlib import Path

import pytest

BOUNDED = {"transformers", "vllm", "uvicorn", "alpaca_eval"}
"""Because of a private interface: a test below, or a check at run time, says when it has changed."""
BROKEN_BY_A_RELEASE = {"scikit-learn", "setuptools"}


def dependencies():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    return [d for listed in (project["dependencies"], *project["optional-dependencies"].values()) for d in listed]


def test_only_known_dependencies_have_an_upper_bound():
    bounded = {re.split(r"[^\w.-]", d)[0] for d in dependencies() if re.search("<|==", d.partition(";")[0])}
    assert bounded == BOUNDED | BROKEN_BY_A_RELEASE


def test_vllm_is_bounded_by_the_versions_that_are_checked():
    from ivg.engines.vllm.versions import SUPPORTED

    (first, last) = (".".join(map(str, version)) for version in SUPPORTED)
    assert any(d.startswith(f"vllm>={first},<{last}") for d in dependencies())


def test_transformers_keeps_the_attention_implementation_in_the_config():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, attn_implementation="eager")
    network = GPT2LMHeadModel(config)
    assert network.config._attn_implementation_internal == "eager"
    assert network.transformer.h[0].attn.config is network.config  # every layer reads it at each pass


def test_uvicorn_has_the_protocol_that_connections_extend():
    h11_impl = pytest.importorskip("uvicorn.protocols.http.h11_impl")
    for name in ("connection_made", "connection_lost", "data_received", "on_response_complete", "pause_writing", "resume_writing"):
        assert callable(getattr(h11_impl.H11Protocol, name)), name
    for name in ("response_started", "response_complete", "keep_alive", "more_body"):
        assert name in h11_impl.RequestResponseCycle.__init__.__code__.co_names, name


def test_alpaca_eval_downloads_where_length_control_replaces_it():
    glm_winrate = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    assert callable(glm_winrate.hf_hub_download)
    assert callable(glm_winrate.get_length_controlled_winrate)
