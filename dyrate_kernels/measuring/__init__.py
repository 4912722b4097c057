"""Measuring: clocks and rows (``timing``), models of real shapes with random weights (``random_models``), generations (``decoding``), and
the comparison behind ``dyrate bench e2e`` (``end_to_end``).

What an installed package needs to measure is here, and knows nothing of ``bench/``: scripts of a checkout that are built on it, with peers
to compare with, plots and records.
"""
