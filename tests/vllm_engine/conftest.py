"""Real vLLM on the CPU, in an environment of its own (``make test-vllm``); elsewhere these tests skip, saying so."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header():
    return None if find_spec("vllm") else "tests/vllm: left out, vLLM is not installed here (make test-vllm)"


@pytest.fixture(scope="session", autouse=True)
def _composites(tmp_path_factory):
    os.environ["IVG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")
