"""Fixtures that several test files ask for."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import llama  # isort: skip  (before MLX, whose BLAS it chooses)

import mlx.core as mx
import pytest

from tests.emulated import emulated_kernel
from tests.support import DEVICE, libedit, random_folder


@pytest.fixture
def kernels(monkeypatch):
    """What section 21 takes for a CUDA device: one, or its kernel compiled as C++."""
    if not mx.cuda.is_available():
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
        monkeypatch.setattr(mx.fast, "cuda_kernel", emulated_kernel)
        # The emulated kernel needs numbers, which a function that is traced has not.
        monkeypatch.setattr(mx, "compile", lambda function: function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return random_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    with llama.Engine(folder) as engine:
        yield engine


reading_speed_once = functools.cache(llama.reading_speed)


@pytest.fixture
def speed_once(monkeypatch) -> None:
    """The speed of memory, of which `info` tells, is measured once for all tests that
    ask for this. Each time takes a quarter of a second, and none of them is about it."""
    monkeypatch.setattr(llama, "reading_speed", reading_speed_once)


state_numbers = itertools.count()


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch) -> Path:
    """What the program remembers of its user, out of the way of the real one."""
    # pytest's own mktemp looks for a name among all those before, thousands of times.
    folder = tmp_path_factory.getbasetemp() / "states" / str(next(state_numbers))
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    return folder / "llama.py"


@pytest.fixture(params=["readline", "libedit"])
def line_editor(request) -> dict[str, str]:
    """The environment in which Python's line editor is this one."""
    return libedit() if request.param == "libedit" else {}


@pytest.fixture
def cpu() -> Iterator[None]:
    """MLX's CPU as the default device, in all threads, for as long as a test runs."""
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(DEVICE)
