"""``pytest bench``: works without a GPU (reference operators, toy size) and without pytest-benchmark (everything is skipped then)."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        """Stands in for the plugin's."""
        pytest.skip("pytest-benchmark is not installed: pip install pytest-benchmark")
