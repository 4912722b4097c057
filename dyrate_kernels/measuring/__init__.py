"""Measuring: clocks and rows (``timing``), models of real shapes with random weights (``random_models``), generations (``decoding``), and
the comparison behind ``dyrate bench e2e`` (``end_to_end``). The benchmarks in ``bench/`` are built on these.
"""
