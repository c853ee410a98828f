"""What all tests share."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEVICE = os.environ.get("IVG_TEST_DEVICE", "cpu")
"""Where the tiny models of ``ivg.testing`` lie (``make test-gpu``: cuda). Tests marked ``numerics`` pass on any device."""

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def quiet_single_thread():
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # tiny models: a second thread only waits
    logging.set_verbosity_error()


@pytest.fixture
def ivg(monkeypatch, capsys):
    """Run the command line in this process: (exit code, standard output, standard error)."""
    from ivg.cli import main

    def run(*arguments, columns=200):
        monkeypatch.setattr(sys, "argv", ["ivg", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def library():
    """What the server of ``serving_tools`` serves, to compare with."""
    from serving_tools import tiny

    return tiny()


@pytest.fixture(scope="session")
def imdb_test():
    path = DATA / "imdb" / "test.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    from recipes.embedded_models.corpus import read_reviews

    return read_reviews(path.parent, "test")


def pytest_configure():
    try:
        from hypothesis import settings
    except ImportError:  # vLLM's environment has none
        pass
    else:
        settings.register_profile("no deadline", deadline=None)  # no test may depend on how fast a machine is
        settings.load_profile("no deadline")
    from ivg.testing import models

    models.DEVICE = DEVICE


def pytest_collection_modifyitems(items):
    if DEVICE != "cpu":
        items[:] = [item for item in items if "cpu" not in item.keywords]
