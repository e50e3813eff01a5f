"""What DeepEP's test programs import from deep_ep.utils, by what they do with it."""

import os
import socket
import sys
import textwrap

import pytest
import torch

from crossdock import Fp8
from crossdock.compat import deep_ep
from crossdock.compat.deep_ep.utils import gate, math, refs, testing
from tests.child import run_child
from tests.compat.test_expert_parallel import HIDDEN, M, dispatched, make


@pytest.mark.parametrize("use_ue8m0", [False, True])
@pytest.mark.parametrize("hidden", [512, 320])
def test_a_cast_and_back_is_near(hidden, use_ue8m0):
    torch.manual_seed(0)
    x = torch.randn(7, hidden).bfloat16()
    data, scales = math.per_token_cast_to_fp8(x, round_scale=use_ue8m0, use_ue8m0=use_ue8m0)
    assert data.dtype == torch.float8_e4m3fn
    assert scales.dtype == (torch.int32 if use_ue8m0 else torch.float32)
    back = math.per_token_cast_back(data, scales)
    assert back.dtype == torch.bfloat16
    assert math.calc_diff(x, back) < 1e-3
    assert math.calc_diff(x, x) == 0
    assert math.calc_diff(x, -x) > 1e-2


def test_a_cast_is_the_wires():
    x = torch.randn(5, 256).bfloat16()
    for round_scale in (False, True):
        data, scales = math.per_token_cast_to_fp8(x, round_scale=round_scale)
        want = Fp8(pow2=round_scale).quantize(x)
        assert torch.equal(scales, want.scale)
        assert torch.equal(data.float(), want.data.float())


def test_numbers():
    assert (math.ceil_div(9, 4), math.align(9, 4), math.safe_div(1, 0), math.safe_div(3, 2)) == (3, 12, 0, 1.5)
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert math.count_bytes(x, (x, None, [x])) == 90
    assert math.hash_tensor(x) == 0
    x[1, 1] = 1
    assert math.hash_tensor(x) == math.hash_tensor(x.clone()) != 0
    scores = math.create_grouped_scores(torch.ones(2, 6), torch.tensor([[0], [2]]), 3)
    assert scores.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("num_local", [1, 4, 8])
@pytest.mark.parametrize("num_ranks", [2, 8, 64])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_the_first_rank_gets_so_many_times_the_others_tokens(num_ranks, num_local, ratio):
    torch.manual_seed(0)
    num_tokens, num_experts = 2048, num_ranks * num_local
    for num_topk in (1, 4, 8):
        if num_topk > num_experts or not gate.num_ranks_of_token(num_ranks, num_topk, num_local, ratio):
            continue
        scores = gate.get_unbalanced_scores(num_tokens, num_experts, num_ranks, num_topk, ratio, True)
        assert (scores > 0).all()
        homes = scores.topk(num_topk).indices // num_local
        is_at = torch.zeros(num_tokens, num_ranks).scatter_(1, homes, 1.0)
        counts = is_at.sum(0)
        assert abs(counts[0] / counts[1:].min() - ratio) / ratio < 0.1
        assert counts[1:].max() - counts[1:].min() <= 1
        loose = gate.get_unbalanced_scores(num_tokens, num_experts, num_ranks, num_topk, ratio)
        assert loose.shape == scores.shape


def reference(group, expands, narrow, num_bias, sums_at_rank):
    """As DeepEP's test program compares: every bit, in inference mode, metadata sorted by source."""
    with torch.inference_mode():
        torch.manual_seed(group.rank())
        batch, buffer = make(group, "V2.5", allow_multiple_reduction=sums_at_rank)
        r, num_topk = buffer.rank_idx, 3
        x, idx, weights = torch.randn(11 - r, HIDDEN).bfloat16(), torch.rand(11 - r, 6).topk(num_topk).indices, None
        idx[torch.rand(idx.shape) < 0.2] = -1
        weights = torch.rand(idx.shape).masked_fill(idx < 0, 0.0)
        given = math.per_token_cast_to_fp8(x) if narrow else x
        bias = tuple(torch.randn(x.shape).bfloat16() for _ in range(num_bias))
        bias = None if not bias else bias[0] if num_bias == 1 else bias
        ref_x, ref_idx, ref_weights, ref_src, ref_counts = refs.dispatch(given, idx, weights, M, batch.num_experts)
        recv_x, recv_idx, recv_weights, handle, _ = dispatched(
            buffer, batch, x=given, topk_idx=idx, topk_weights=weights, do_expand=expands, do_cpu_sync=False
        )
        num = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert num == sum(ref_counts)
        metadata = handle.recv_src_metadata[:num]
        assert torch.equal(metadata[:, 0], ref_src)
        y = refs.generate_pre_combine_data(metadata[:, 0], M, num_topk, HIDDEN)
        outputs = torch.full((len(recv_x[0] if narrow else recv_x), HIDDEN), float("nan"), dtype=torch.bfloat16)
        if expands:
            rows = metadata[:, 2:]
            assert torch.equal(rows >= 0, ref_idx >= 0)
            at = rows[rows >= 0].long()
            source = (rows >= 0).nonzero()[:, 0]
            got = (recv_x[0].float(), recv_x[1]) if narrow else (recv_x,)
            want = (ref_x[0].float(), ref_x[1]) if narrow else (ref_x,)
            for ours, theirs in zip(got, want, strict=True):
                assert torch.equal(ours[at], theirs[source])
            assert torch.equal(recv_weights[at], ref_weights[rows >= 0])
            outputs[at] = y[rows >= 0]
        else:
            assert torch.equal(recv_idx[:num], ref_idx)
            assert torch.equal(recv_weights[:num].masked_fill(ref_idx < 0, 0), ref_weights.masked_fill(ref_idx < 0, 0))
            y[ref_idx < 0] = 0
            outputs[:num] = refs.ordered_accumulate(y)
        out, _, _ = buffer.combine(outputs, handle, bias=bias)
        own = refs.generate_pre_combine_data(r * M + torch.arange(len(x)), M, num_topk, HIDDEN)
        recipe = (sums_at_rank or not expands, False)
        assert torch.equal(out, refs.combine(own, idx, 1, buffer.num_ranks, batch.num_experts, bias, *recipe))


@pytest.mark.worlds("processes-2")
@pytest.mark.parametrize("num_bias", [0, 2])
@pytest.mark.parametrize("sums_at_rank", [True, False])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("expands", [False, True])
def test_calls_give_every_bit_of_the_reference(world, expands, narrow, sums_at_rank, num_bias):
    world.run(reference, expands, narrow, num_bias, sums_at_rank)


def test_times_are_never_nothing(capsys):
    def say():
        print("said")  # noqa: T201 - heard below

    for names, period, shape in (("a", 1, float), (("a", "b"), 1, tuple), (("a", "b"), 2, tuple)):
        times = testing.bench_kineto(
            say, names, num_tests=2, suppress_kineto_output=True, num_kernels_per_period=period
        )
        assert isinstance(times, shape)
        flat = [times] if shape is float else [t for each in times for t in (each if period == 2 else [each])]
        assert len(flat) == (1 if shape is float else 2 * period)
        assert all(t > 0 for t in flat)
    mean, least, most = testing.bench(say, num_warmups=1, num_tests=3)
    assert 0 < least <= mean <= most
    assert "said" in capsys.readouterr().out


PROGRAM = """
    import sys
    import torch
    from crossdock.compat import install
    install()
    import deep_ep
    import deep_ep.utils.envs as envs
    from deep_ep.utils.envs import dist_print, get_global_seed, get_rdma_gbs, init_dist, init_seed


    def main(local_rank, num_local_ranks):
        rank, num_ranks, group = init_dist(local_rank, num_local_ranks, seed=7)
        assert get_global_seed() == 7
        assert torch.get_default_dtype() == torch.bfloat16
        buffer = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=4, hidden=16, explicitly_destroy=True)
        recv_x, _, _, handle, _ = buffer.dispatch(
            torch.ones(2, 16), torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, dtype=torch.float32), num_experts=2
        )
        out, _, _ = buffer.combine(recv_x, handle)
        dist_print(rank, num_ranks, out.sum().item(), get_rdma_gbs(), envs.get_physical_domain_size(group))
        dist_print("once", once_in_node=True)
        buffer.destroy()
        torch.distributed.destroy_process_group()


    if __name__ == "__main__":
        torch.multiprocessing.spawn(main, args=(2,), nprocs=2)
"""


def test_a_program_begins_as_deepeps_do(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = os.environ | {"MASTER_PORT": _free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    done = run_child([sys.executable, program], env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 2 64.0 0.0 (1, 2)", "1 2 64.0 0.0 (1, 2)", "once"]


def _free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


def test_a_version_and_the_names_are_there():
    assert deep_ep.__version__ == "2.5.0"
    assert deep_ep.topk_idx_t == torch.int64
    assert deep_ep.get_num_allocation_alignment() == 2 << 20
    assert (deep_ep.get_num_rdma_alignment(), deep_ep.get_num_tma_alignment()) == (64, 32)
    deep_ep.destroy_all_managed_nccl_comm()
