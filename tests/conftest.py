"""What every test needs: no state of another test, and caches of its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Set before torch is imported: worker processes of Inductor cost more than they give to small graphs.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Else each process that compiles C++ first compiles, and loads in a process of its own, an example for each instruction
# set that the CPU has: 15 seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# The workers of pytest-xdist share the cores: threads that wait for a core of another's take three times as long.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import torch._dynamo.guards
import torch.distributed as dist
from torch._dynamo.utils import counters

import lce_inductor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--programs", type=int, default=0, help="how many random programs to run; 0: the quick profile")


# Two things that torch does at each compile, a fifth of the time of all tests, for nobody who listens here: texts of all
# its graphs are made for the handlers that pytest adds, and caches are flushed to measure the guards.
logging.getLogger("torch.__trace").addHandler = lambda handler: None  # type: ignore[method-assign]
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def clean(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No installed pass, no compiled code and no counts from before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
    lce_inductor.uninstall()
    torch._dynamo.reset()
    counters.clear()
    for name in [n for n in logging.root.manager.loggerDict if n.split(".")[0] == "lce_inductor"]:
        logger = logging.getLogger(name)  # torch sets levels, as TORCH_LOGS of a test before asked for
        logger.setLevel(logging.NOTSET)
        logger.disabled, logger.propagate = False, True
    logging.disable(logging.NOTSET)
    # Not the root's level, which other packages change.
    logging.getLogger("lce_inductor").setLevel(logging.DEBUG)
    torch.manual_seed(0)
    # torchtitan's apply_compile sets it for the whole process.
    with torch._dynamo.config.patch(capture_scalar_outputs=torch._dynamo.config.capture_scalar_outputs):
        yield
    lce_inductor.uninstall()
    torch._dynamo.reset()


@pytest.fixture
def installed() -> Iterator[None]:
    """The passes, for heads of every size."""
    with lce_inductor.installed(min_logits_bytes=0):
        yield


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    if not dist.is_available():
        pytest.skip("torch without distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
