"""The devices that tests of several devices need."""

import jax
import pytest


DEVICES = 8
needs_eight = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs eight devices: conftest.py makes them of the CPU, unless XLA_FLAGS or"
    " LWSAM_TEST_PLATFORMS is set otherwise",
)
