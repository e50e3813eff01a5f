"""Into how many chunks rows between nodes are cut, so that the second hop begins before the first has ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crossdock.cost.predict import Prediction


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Chunks of the rows that a rank sends to all others over the rail, in one call.

    Args:
        number: of them.
        num_bytes: of each.
        seconds: that the two hops take so, ``max(h1, h2) + min(h1, h2) / number + number * overhead``.
    """

    number: int
    num_bytes: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.number} chunks of {self.num_bytes / 1024:,.0f} KiB"


def best_chunks(call: Prediction, *, overhead_s: float = 5e-6) -> Chunks | None:
    """The number for which hops of a call take the least time together, ``sqrt(min(h1, h2) / overhead)``.

    Args:
        call: on two hops.
        overhead_s: what a chunk costs beside its bytes: a put, a signal, a look. 5 us is a guess for RDMA.

    Returns:
        None where nothing crosses a rail.

    >>> from crossdock.cost import predict
    >>> from crossdock.spec import Spec, Topology
    >>> spec = Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=4096, reduce="node")
    >>> print(best_chunks(predict("dispatch", spec, Topology.grid(nodes=2, local=8))))
    13 chunks of 4,396 KiB
    """
    rail = call.of("scale_out")
    if rail is None or not rail.num_bytes:
        return None
    slow, fast = (pick(hop.seconds for hop in call.hops) for pick in (max, min))
    number = max(1, round(math.sqrt(fast / overhead_s)))
    return Chunks(number=number, num_bytes=rail.num_bytes / number, seconds=slow + fast / number + number * overhead_s)
