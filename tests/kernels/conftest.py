"""Tests of this folder run kernels on the emulator, which needs clang: without it they are skipped, but not in CI."""

import os
from collections.abc import Generator

import pytest
from emulator.build import NoCompilerError


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """A fixture may need the compiler."""
    return (yield from _without_compiler())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """And so may a test."""
    return (yield from _without_compiler())


def _without_compiler() -> Generator[None, object, object]:
    try:
        return (yield)
    except NoCompilerError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the emulator cannot compile kernels: {error}")
