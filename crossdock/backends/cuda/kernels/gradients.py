"""Gradients of rows that were weighted as they were summed. Triton only.

Local: no word, no peer. Launch with ``enable_fp_fusion=False``: products are rounded by themselves, as torch's are.

Letters: R rows (of all segments), H hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl

from crossdock.backends.cuda.kernels.metadata import as_int64


@triton.jit(do_not_specialize=["num_rows"])
def weigh_gradients(
    grad_y,
    grad_weights,
    grads,
    y,
    weights,
    src_idx,
    num_rows,
    H: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Of sums of ``weights[r] * y[r]`` with gradients ``grads [R, H]``: ``weights * grads``, and ``sum(grads * y)``.

    In float32, the sums in a fixed order. 0 for rows where ``src_idx`` is negative, of which nothing is read. A program
    takes a row at a time.
    """
    at = tl.arange(0, PIECE)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        is_row = tl.load(src_idx + row) >= 0
        weight = tl.load(weights + row, mask=is_row, other=0.0)
        first = as_int64(row) * H
        products = tl.zeros([PIECE], tl.float32)
        for start in tl.static_range(0, H, PIECE):
            is_value = (start + at < H) & is_row
            there = first + start + at
            grad = tl.load(grads + there, mask=is_value, other=0.0).to(tl.float32)
            products += grad * tl.load(y + there, mask=is_value, other=0.0).to(tl.float32)
            tl.store(grad_y + there, (grad * weight).to(grad_y.dtype.element_ty), mask=start + at < H)
        tl.store(grad_weights + row, tl.sum(products, axis=0))
