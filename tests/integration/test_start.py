"""A process of the command line answers without importing what answers need nothing of; what was put off is whole when it is asked for."""

import os
import platform
import subprocess
import sys

import pytest

ARGUMENTS = {
    "generate": ["generate", "The movie was", "--max-new-tokens", "2"],
    "chat": ["chat", "The movie was", "--max-new-tokens", "2"],
    "compare": ["compare", "The movie was", "--methods", "ivg", "--max-new-tokens", "2"],
}
HEAVY = (
    "scipy",
    "sklearn",
    "pandas",
    "datasets",
    "pyarrow",
    "peft",
    "trl",
    "torch.onnx",
    "torch.distributed.tensor",
    "torch._dynamo.eval_frame",
)
AFTER = """
import sys
sys.argv = ["ivg", *{arguments!r}]
from ivg.cli import main
try:
    main()
except SystemExit as e:
    assert not e.code
"""


def run(code, arguments=ARGUMENTS["generate"]):
    done = subprocess.run([sys.executable, "-c", AFTER.format(arguments=arguments) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILE = """
import torch
double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
assert torch._dynamo is sys.modules["torch._dynamo"]
from transformers.integrations.eager_paged import eager_paged_attention_forward as disabled
from transformers.integrations.deepgemm import is_sm100 as constant
assert constant._dynamo_marked_constant
def calls(x):
    try:
        disabled(None, x, x, x, None, 1.0)
    except AttributeError:
        return x + 1
try:
    torch.compile(calls, backend="eager", fullgraph=True)(torch.ones(3))
except torch._dynamo.exc.Unsupported as e:
    print("left out of the graph:", "disable" in str(e))
"""


SUBMODULE = """
import torch._dynamo.config
from torch._dynamo.utils import counters
import torch._dynamo.utils
assert torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert torch._dynamo.utils.counters is counters
assert torch._dynamo.config.__spec__.name == "torch._dynamo.config"
from torch._dynamo import optimize
import inspect
print(inspect.getmodule(optimize).__name__)
"""


TENSOR = """
import torch.distributed
assert "torch.distributed.tensor" not in sys.modules
print(torch.distributed.tensor.DTensor.__name__)
"""

LATER = {
    "torch.compile, with functions that transformers marked before": (COMPILE, "left out of the graph: True"),
    "submodules, imported once": (SUBMODULE, "torch._dynamo.eval_frame"),
    "what others take for imported": (TENSOR, "DTensor"),
}


@pytest.mark.parametrize(("verb", "later"), zip(ARGUMENTS, LATER, strict=True))
def test_heavy_modules_are_not_imported_and_are_whole_later(verb, later):
    """A process for each verb, in which one of them is asked for afterwards: what one imports, another would find."""
    code, printed = LATER[later]
    found = run(f"print('found', [name for name in {HEAVY} if name in sys.modules])\n{code}", ARGUMENTS[verb])
    assert "found []\n" in found and found.endswith(f"{printed}\n")


LIBRARY = """
from typer.testing import CliRunner
import sys
from ivg.cli.app import app
done = CliRunner().invoke(app, ["generate", "The movie was", "--max-new-tokens", "2"])
assert done.exit_code == 0, done.output
from transformers.utils import is_scipy_available, is_torch_distributed_available
from transformers.distributed.utils import is_torch_distributed_available as seen
print(is_torch_distributed_available(), seen(), "torch._dynamo.eval_frame" in sys.modules)
"""


def test_other_processes_are_left_alone():
    """Where the command line runs inside another program, that program's transformers is whole."""
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True)
    assert done.stdout == "True True True\n", done.stderr


OTHER_VERSION = """
import sys
from importlib.abc import MetaPathFinder
import transformers.utils
class Needs(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "transformers.modeling_utils" and not transformers.utils.is_scipy_available():
            raise ImportError("this version needs scipy")
sys.meta_path.insert(0, Needs())
from ivg.cli.quick_import import begin_process, import_transformers
from ivg.settings.recipe import Recipe
begin_process()
import_transformers(Recipe())
print("transformers.modeling_utils" in sys.modules)
"""


def test_another_version_of_transformers_is_imported_all_the_same():
    """One that does not import without what is left out."""
    done = subprocess.run([sys.executable, "-c", OTHER_VERSION], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '20000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_threads_do_not_spin_for_long(given, expected):
    """What OpenMP says that it read: so it was set before torch was imported, and the user's own setting counts."""
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    settings = own | given | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-m", "ivg", *ARGUMENTS["generate"]], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP than GNU's")
    assert expected in done.stderr
    if "OMP_WAIT_POLICY" in given:
        assert "GOMP_SPINCOUNT = '20000'" not in done.stderr


KEPT = """
import ctypes, resource
from ivg.cli.quick_import import begin_process

libc, size = ctypes.CDLL(None), 16 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(size) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


begin_process()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is not glibc")
def test_freed_memory_is_kept_for_the_next_token():
    """Pages of 8 blocks of 16 MiB, written for the second time; the user's own settings of the allocator count."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, env=own | more).stdout)
        for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"})
    )
    assert kept < 1000 < 30_000 < plain
