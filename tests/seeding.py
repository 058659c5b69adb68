"""A test draws the same numbers on every machine, in every order: one that fails here fails everywhere."""

from typing import Any
from zlib import crc32

import pytest
from transformers import set_seed


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What a fixture draws depends on its name alone, not on the tests before it."""
    set_seed(crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """And what a test draws on its own."""
    set_seed(crc32(item.nodeid.encode()))
