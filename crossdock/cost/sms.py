"""How many SMs a link wants.

A hop takes ``hypot(bytes / link, bytes / SMs)``: with twice the SMs whose stores would fill the link, 12 % longer than
with all.
"""

from __future__ import annotations

import math

from crossdock.cost.methods import SM_BANDWIDTH


def sms_to_fill(bandwidth: float) -> int:
    """SMs whose stores fill a link of that many bytes per second; 8 for 450 GB/s."""
    return math.ceil(bandwidth / SM_BANDWIDTH)


def sms_to_store(bandwidth: float) -> int:
    """SMs that a dispatch wants for a link of that many bytes per second; 16 for 450 GB/s."""
    return 2 * sms_to_fill(bandwidth)


def sms_to_load(bandwidth: float) -> int:
    """SMs that a pulled combine wants; 24 for 450 GB/s: an SM loads from a peer two thirds of what it stores."""
    return 3 * sms_to_fill(bandwidth)
