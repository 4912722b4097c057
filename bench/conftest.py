"""``pytest bench``: works without a GPU (reference operators, toy size) and without pytest-benchmark (everything is skipped then)."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from dyrate_kernels.measuring import timing

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        """Stands in for the plugin's."""
        pytest.skip("pytest-benchmark is not installed: pip install pytest-benchmark")


# rows whose difference is the decision: mass -> rate -> kept list
DECISION = ("dyrate decode_step: attention, rate, top-k, kept list", "dyrate decode_attention with statistics")


@dataclasses.dataclass
class Table:
    """The table that the run prints at its end. Nothing gets in whose result failed its comparison with the reference."""

    bandwidth: float
    rows: list[tuple[str, str, timing.Times, int | None, str | None]] = dataclasses.field(default_factory=list)

    def add(self, shape: str, name: str, times: timing.Times, moved: int | None, peer: str | None) -> None:
        """``moved``: bytes at least. ``peer``: the row of this shape that does the same work elsewhere."""
        self.rows.append((shape, name, times, moved, peer))

    def lines(self) -> list[str]:
        """Header and rows; ``times`` says how many times as fast as the row named behind it, of the same shape."""
        found = {(shape, name): times for shape, name, times, _, _ in self.rows}
        out = [
            f"{'':<22}{'':<58}{'median us':>11}{'p20':>10}{'p80':>10}{'MB':>9}{'GB/s':>9}{'of copy':>9}{'times':>9}  as fast as",
        ]
        for shape, name, times, moved, peer in self.rows:
            other = found.get((shape, peer)) if peer is not None and peer != name else None
            rate = moved / times.median if moved else None
            out.append(
                f"{shape:<22}{name:<58}{1e6 * times.median:>11.1f}{1e6 * times.p20:>10.1f}{1e6 * times.p80:>10.1f}"
                f"{f'{moved / 1e6:.2f}' if moved else '':>9}{f'{rate / 1e9:.1f}' if rate else '':>9}"
                f"{f'{rate / self.bandwidth:.1%}' if rate else '':>9}{f'{other.median / times.median:.2f}' if other else '':>9}"
                f"{f'  {peer}' if other else ''}"
            )
        for shape in dict.fromkeys(shape for shape, *_ in self.rows):
            whole, without = (found.get((shape, name)) for name in DECISION)
            if whole and without:
                name = "the decision: decode_step less attention with statistics"
                out.append(f"{shape:<22}{name:<58}{1e6 * (whole.median - without.median):>11.1f}")
        return out


_tables: list[Table] = []


@pytest.fixture(scope="session")
def table() -> Table:
    """The session's table, with the copy bandwidth of this machine."""
    _tables[:] = [Table(timing.copy_bandwidth(None if timing.environment()["measurement"] else 256 << 20)[0])]
    return _tables[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table, or why there is none."""
    if not _tables or not _tables[0].rows:
        if terminalreporter.stats.get("passed"):
            terminalreporter.write_line("no table: nothing was timed (--benchmark-disable), or it ran in pytest-xdist's workers (no -n)")
        return
    here = timing.environment()
    terminalreporter.section("decode step")
    terminalreporter.write_line(f"{here['gpu']}, torch {here['torch']}, copy {_tables[0].bandwidth / 1e9:.1f} GB/s, read plus written")
    if not here["measurement"]:
        terminalreporter.write_line("toy sizes with the reference operators on a CPU: no speed worth quoting")
    for line in _tables[0].lines():
        terminalreporter.write_line(line)
