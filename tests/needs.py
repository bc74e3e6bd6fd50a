"""Packages that some tests need, asked for without importing them: every process imports all test files."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(reason: str, *packages: str) -> None:
    """Skips the rest of a test file where a package is not installed."""
    if missing := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"{reason} ({', '.join(missing)})", allow_module_level=True)
