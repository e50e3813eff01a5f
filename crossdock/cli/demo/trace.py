"""Some steps of all ranks as a Chrome trace, for ui.perfetto.dev or chrome://tracing: a process per rank.

The format is the "Trace Event Format": complete events ("X") with microseconds; spans that lie within others on the
same thread are drawn below them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from crossdock.cli.demo.watch import Span

_AT_A_TIME = 2
"""Steps in a row that are shown, at the beginning, in the middle and at the end."""


def chrome_trace(spans: Sequence[Sequence[Span]], num_steps: int) -> str:
    """The trace as JSON, from each rank's spans.

    >>> chrome_trace([[Span("step", 0, 5.0, 5.25, 0.0)]], num_steps=1).splitlines()[2]
    '{"name": "step", "ph": "X", "pid": 0, "tid": 0, "ts": 0.0, "dur": 250000.0, "args": {"step": 1, "waited_us": 0.0}}'
    """
    steps = shown_steps(num_steps)
    shown = [[span for span in of_rank if span.step in steps] for of_rank in spans]
    first = min(span.start for of_rank in shown for span in of_rank)
    events: list[dict[str, object]] = []
    for rank, of_rank in enumerate(shown):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        events += [
            {
                "name": span.name,
                "ph": "X",
                "pid": rank,
                "tid": 0,
                "ts": _us(span.start - first),
                "dur": _us(span.end - span.start),
                "args": {"step": span.step + 1, "waited_us": _us(span.waited_s)},
            }
            for span in sorted(of_rank, key=lambda span: (span.start, -span.end))
        ]
    return '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(map(json.dumps, events)) + "\n]}\n"


def shown_steps(num_steps: int) -> set[int]:
    """Which of the steps, from 0.

    >>> sorted(shown_steps(100)), sorted(shown_steps(3))
    ([0, 1, 50, 51, 98, 99], [0, 1, 2])
    """
    starts = (0, num_steps // 2, num_steps - _AT_A_TIME)
    return {step for start in starts for step in range(start, start + _AT_A_TIME) if 0 <= step < num_steps}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
