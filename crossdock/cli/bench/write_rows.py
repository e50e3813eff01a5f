"""The kernel of the write limit: reads rows and writes each to several destinations. Needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def write_rows(rows, copies, num_rows, NUM_COPIES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Reads rows, int64 [num_rows, WORDS], once and writes them to copies, [NUM_COPIES, num_rows, WORDS].

    Programs take rows in turn. BLOCK is the smallest power of two that is at least WORDS.
    """
    words = tl.arange(0, BLOCK)
    is_word = words < WORDS
    size = tl.cast(num_rows, tl.int64) * WORDS
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        first = tl.cast(row, tl.int64) * WORDS
        values = tl.load(rows + first + words, mask=is_word)
        for copy in tl.static_range(NUM_COPIES):
            tl.store(copies + copy * size + first + words, values, mask=is_word)
