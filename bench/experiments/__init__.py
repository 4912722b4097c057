"""Fourteen questions about the kernels that a GPU answers in eight minutes: ``bench/gpu.sh OUT --only experiments``.

    python -m bench.experiments OUT_DIR [--toy] [--seconds 470] [--only 2 7]
    python -m bench.experiments --compile [--only 2 7]      # builds every kernel that the other call launches, into Triton's cache

``experiments.md`` holds one table of all rows, ``experiments.json`` the same for programs, and where a change of settings proved faster, a
device file lies beside them that ``dyrate_kernels/devices`` can take.
"""
