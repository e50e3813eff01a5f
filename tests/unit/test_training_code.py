"""What Triton makes of the kernels of training, for sm_90 and gfx942: wide loads and stores, nothing compiled late."""

import multiprocessing
import os
import re
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton: pip install triton")

from crossdock import Bf16, Compact, Expanded, Fp8, Padded, Spec
from tests.compiled import AMD, CUDA, compile_launches, lone_buffer

NAMES = {"dequantize_rows", "copy_rows", "weigh_gradients"}
CASES = {
    "expanded fp8": {"layout": Expanded(), "wire": Fp8()},
    "padded, packed scales column-major": {
        "layout": Padded(),
        "wire": Fp8(scale="ue8m0", packed=True, column_major=True),
    },
    "compact bf16": {"layout": Compact(), "wire": Bf16()},
}
all_cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A process of its own: torch.cuda is replaced there."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    with mock.patch.dict(os.environ, environment), multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def spec_of(case):
    return Spec(num_experts=256, num_topk=8, hidden=7168, max_tokens=64, **CASES[case])


def compiled(case, target):
    return compile_launches(spec_of(case), 8, target, only=NAMES)


@all_cases
def test_rows_are_read_and_written_in_words_of_16_bytes_and_no_local_memory(case, pool):
    for target in (CUDA, AMD):
        launches = pool.apply(compiled, (case, target))
        assert {launch.name for launch in launches} == (
            NAMES if "fp8" in case or "packed" in case else NAMES - {"dequantize_rows"}
        )
        for launch in launches:
            assert not re.search(r"\b(?:ld|st)\.local\b|\.local \.align|scratch_(?:load|store)", launch.code), launch
            if target is CUDA:
                assert re.search(r"ld\.global[\w:.]*\.(?:v4\.b32|v2\.b64)", launch.code), launch.name
                assert re.search(r"st\.global[\w:.]*\.(?:v4\.b32|v2\.b64)", launch.code), launch.name
                assert not re.search(r"\bfma\.rn\.f32\b", launch.code), launch.name
            else:
                narrow = launch.name == "dequantize_rows"  # 8 bytes a lane become 16
                assert re.search(rf"(?:global|buffer)_load_dwordx{2 if narrow else 4}\b", launch.code), launch.name
                assert re.search(r"(?:global|buffer)_store_dwordx4\b", launch.code), launch.name


def train(case):
    """What has to be compiled, behind the making of the buffer, for what training does beside the calls."""
    spec = spec_of(case)
    with lone_buffer(spec) as (buffer, watch):
        warm = set(watch.compiled)
        for num_tokens in (64, 1):
            x = torch.zeros(num_tokens, 7168, dtype=spec.combine_dtype)
            recv = buffer.dispatch(x, torch.full((num_tokens, 8), -1), rows="capacity")
            for rows in ("capacity", "exact"):
                buffer.own_rows(recv, rows)
            again = buffer.dispatch(x, recv.plan, unquantized=True, rows="capacity")
            grads, y = buffer.own_rows(again, "capacity"), torch.zeros(*again.src_idx.shape, 7168, dtype=x.dtype)
            buffer.weigh_gradients(grads, y, torch.zeros(again.src_idx.shape), again.src_idx)
        return sorted(str(key) for key in watch.compiled - warm)


@all_cases
def test_training_compiles_nothing_behind_the_making_of_a_buffer(case, pool):
    assert pool.apply(train, (case,)) == []
