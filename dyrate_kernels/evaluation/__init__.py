"""Every method on the same questions, at a stated cost: suites, the runner that survives a kill, statistics, tables."""
