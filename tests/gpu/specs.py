"""The Specs that these tests share: a new one costs seconds, because every process compiles some 20 kernels for it.

Constants of kernels are E, K, H, the number of ranks, alignment, formats, who sums, the bytes of extras, and how many
slots there are; capacities are not, nor max_tokens but where plans say which rows are one token's. With two ranks the
Specs are those of ``tests.worlds``, with four ``spec_of``'s, whose rows are multiples of 16 bytes, so that receivers
can make copies of them.
"""

import pytest

from crossdock import Compact, Expanded, Padded, Spec
from tests.cases import EXTRA_BYTES

ALIGNED = Expanded(alignment=8)
STAGED = Expanded(alignment=8, capacity=10**6, staged=True)
LAYOUTS = [Compact(), ALIGNED, Padded()]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
reduces = pytest.mark.parametrize("reduce", ["token", "rank"])
ONCE_EACH = [(Compact(), "token"), (ALIGNED, "rank"), (Padded(), "token")]
"""Layouts and who sums, where their product says no more than each once does."""
once_each = pytest.mark.parametrize(("layout", "reduce"), ONCE_EACH, ids=repr)
once_each_dense = pytest.mark.parametrize(("layout", "reduce"), ONCE_EACH[:2], ids=repr)


def spec_of(layout, reduce="token", wire=None, **kwargs):
    kwargs = {"num_experts": 16, "num_topk": 4, "hidden": 48, "max_tokens": 9, "extra_bytes": EXTRA_BYTES} | kwargs
    return Spec(layout=layout, reduce=reduce, **({} if wire is None else {"wire": wire}), **kwargs)
