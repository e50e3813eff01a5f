"""The cost model beside figures that were measured: ``python -m benchmarks.model`` writes docs/model.md's tables.

Between its marks the page is what this prints; a test compares. Nothing is measured here.
"""

# Printing is what it is for.
# ruff: noqa: T201

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.published import Row, all_rows

PAGE = Path(__file__).parents[1] / "docs" / "model.md"
_BEGIN, _END = "<!-- begin: python -m benchmarks.model -->\n", "<!-- end -->\n"


def tables(rows: Sequence[Row]) -> str:
    """A summary by group, then all rows, as Markdown."""
    lines = ["| | rows | fitted | errors | median of their sizes | within 15 % |", "|---|---|---|---|---|---|"]
    by_group = {group: [row for row in rows if row.group == group] for group in dict.fromkeys(r.group for r in rows)}
    for group, of_group in by_group.items():
        errors = [row.error for row in of_group]
        fitted, near = sum(row.is_fitted for row in of_group), sum(abs(error) <= 0.15 for error in errors)
        sizes = statistics.median(map(abs, errors))
        span = f"{min(errors):+.0%} to {max(errors):+.0%}"
        lines.append(f"| {group} | {len(errors)} | {fitted} | {span} | {sizes:.0%} | {near} |")
    for group, of_group in by_group.items():
        lines += [
            "",
            f"### {group}",
            "",
            "| | | measured | predicted | error | bound by |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in of_group]
    return "\n".join(lines) + "\n"


def page_with(text: str, made: str) -> str:
    """A page with other tables between its marks."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{made}\n{_END}{after}"


def _line(row: Row) -> str:
    call = row.prediction
    wire = "FP8" if row.op == "dispatch" and row.spec.wire.num_scales(row.spec.hidden) else "bf16"
    fitted = ", fitted" if row.is_fitted else ""
    times = f"{_time(row.measured_s)} | {_time(call.seconds)} | {row.error:+.0%}"
    return f"| {row.case} | {row.op} {wire}{fitted} | {times} | {call.bottleneck} |"


def _time(seconds: float) -> str:
    if seconds >= 10e-3:
        return f"{seconds * 1e3:,.0f} ms"
    return f"{seconds * 1e6:,.0f} us" if seconds >= 100e-6 else f"{seconds * 1e6:.1f} us"


if __name__ == "__main__":
    made = tables(all_rows())
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made, end="")
