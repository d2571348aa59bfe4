"""One thread per process (many tests run side by side), and skips for tests that need something special."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# how long drawing an example takes is the machine's business
settings.register_profile("descentlab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("descentlab")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("browser") and not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
