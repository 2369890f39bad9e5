"""What all tests share: eight CPU devices, real data if it is there, and keys."""

import atexit
import gc
import itertools
import os
import pathlib
import zlib

from lwsam_bench.support import quick_compile


# These must be set before JAX starts. Flags that the user set stay.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Compilation is the cost of this suite; what is compiled runs for milliseconds.
quick_compile.enable()
os.environ["JAX_PLATFORMS"] = os.environ.get("LWSAM_TEST_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tracing makes objects by the million that live on in JAX's caches: looking through them
# after each 700 took a fifth of the time of tests that compile.
gc.set_threshold(50_000, 10, 10)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402


collect_ignore = ["host_worker.py"]  # a program of its own, which reads its arguments
_ROOT = pathlib.Path(__file__).resolve().parents[1]

# The same examples in each run; `thorough` (make test-slow) draws others each time, and
# prints what repeats the one that failed.
_HYPOTHESIS = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
    ],
}
hypothesis.settings.register_profile(
    "normal", max_examples=200, derandomize=True, **_HYPOTHESIS
)
hypothesis.settings.register_profile("thorough", max_examples=2000, **_HYPOTHESIS)
hypothesis.settings.load_profile("normal")


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real datasets as tensorflow-datasets leaves them, or a skip."""
    named = os.environ.get("LWSAM_DATA_DIR")
    if named:
        folder = pathlib.Path(named)
        source = f"LWSAM_DATA_DIR={named}"
    else:
        folder = _ROOT.parent / "shared" / "data"
        source = "LWSAM_DATA_DIR is not set, and ../shared/data beside the repository"
    if not (folder / "tfds").is_dir():
        pytest.skip(f"needs real data: {source} has no folder tfds/")
    return folder / "tfds"


@pytest.fixture
def x64():
    """Double precision for the whole of a test."""
    from plain import enable_x64

    with enable_x64(True):
        yield


@pytest.fixture
def getkey(request):
    """A function that returns a new PRNG key at each call, the same in each run."""
    root = jax.random.key(zlib.crc32(request.node.nodeid.encode()))
    counter = itertools.count()
    return lambda: jax.random.fold_in(root, next(counter))


def pytest_unconfigure():
    # JAX 0.7.0 crashes when it clears its caches at exit, after a function under
    # equinox.filter_jit ran in a process of several devices; then a run whose tests
    # all passed would end with an error.
    if jax.__version__ == "0.7.0":
        from jax._src import api

        atexit.unregister(api.clean_up)
