"""What every test can rely on: one thread, no window, the same random numbers each time."""
import os

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
