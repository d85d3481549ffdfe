"""One torch thread: the models here are tiny, and the machine may have other work."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
