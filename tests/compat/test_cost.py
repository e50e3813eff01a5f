"""How many Python calls a call of the façade adds to the native one, once its kind has been seen."""

import gc
import sys

import torch

from crossdock import Buffer, Compact, Expanded, Padded, Spec, ThreadGroup
from crossdock.compat import deep_ep
from tests.compat.batches import make_batch

MOST_MORE = 20
HIDDEN = 128


def count(call):
    """Calls of Python functions, once its kind has been seen: the fewest of some, as what is dropped may call back."""
    call()
    return min(_count(call) for _ in range(5))


def _count(call):
    number = 0

    def seen(_frame, event, _):
        nonlocal number
        number += event == "call"

    gc.disable()
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    return number


def natively(group, **options):
    return Buffer(group, Spec(num_experts=3, num_topk=3, hidden=HIDDEN, max_tokens=16, **options))


def test_v1_adds_few_calls():
    (group,) = ThreadGroup.world(1)
    batch = make_batch(1)
    x, idx, weights = batch.x[0], batch.topk_idx[0], batch.topk_weights[0]
    buffer = deep_ep.Buffer(group)
    with natively(group, layout=Compact(), reduce="rank", num_slots=1) as native:
        recv = native.dispatch(x, idx, weights=weights, copy=True)
        per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(idx, 3)

        def dispatch(**options):
            return buffer.dispatch(
                x, num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert, topk_idx=idx,
                topk_weights=weights, **options,
            )  # fmt: skip

        rows, _, _, _, handle, _ = dispatch()

        def fresh_natively():
            recv = native.dispatch(x, idx, weights=weights, rows="capacity", copy=True)
            return recv.x, recv.topk_idx.to(torch.int64), recv.weights, recv.src_idx, recv.without_copy()

        more = {
            "dispatch": count(lambda: dispatch(num_worst_tokens=16)) - count(fresh_natively),
            "cached": count(lambda: buffer.dispatch(x, handle=handle))
            - count(lambda: native.dispatch(x, recv.plan, copy=True).x),
            "combine": count(lambda: buffer.combine(rows, handle)) - count(lambda: native.combine(rows, recv.plan)),
        }
    assert {name: number for name, number in more.items() if number > MOST_MORE} == {}


def test_low_latency_calls_add_few():
    (group,) = ThreadGroup.world(1)
    batch = make_batch(1)
    x, idx, weights = batch.x[0], batch.topk_idx[0], batch.topk_weights[0]
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    with natively(group, layout=Padded(capacity=16)) as native:
        recv = native.dispatch(x, idx, copy=True)
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 16, 3, use_fp8=False)

        def natively_too():
            recv = native.dispatch(x, idx, copy=True)
            return recv.x, recv.num_tokens_per_expert, recv.src_idx

        def start_natively():
            recv = native.dispatch_start(x, idx, copy=True).wait()
            return recv.x, recv.num_tokens_per_expert, recv.src_idx

        def hooked():
            buffer.low_latency_dispatch(x, idx, 16, 3, use_fp8=False, return_recv_hook=True)[-1]()

        more = {
            "dispatch": count(lambda: buffer.low_latency_dispatch(x, idx, 16, 3, use_fp8=False)) - count(natively_too),
            "hook": count(hooked) - count(start_natively),
            "combine": count(lambda: buffer.low_latency_combine(rows, idx, weights, handle))
            - count(lambda: native.combine(rows, recv.plan, weights=weights)),
        }
    assert {name: number for name, number in more.items() if number > MOST_MORE} == {}


def test_v2_adds_few_calls():
    (group,) = ThreadGroup.world(1)
    batch = make_batch(1)
    x, idx, weights = batch.x[0], batch.topk_idx[0], batch.topk_weights[0]
    more = {}
    for kind in (deep_ep.ElasticBuffer, deep_ep.EPBuffer):
        buffer = kind(group, num_max_tokens_per_rank=16, hidden=HIDDEN)
        for expands in (False, True):
            layout = Expanded() if expands else Compact()
            slots = 1 if kind is deep_ep.ElasticBuffer else 2
            with natively(group, layout=layout, reduce="rank", num_slots=slots) as native:
                recv = native.dispatch(x, idx, weights=weights, copy=True)
                rows, _, _, handle, _ = buffer.dispatch(x, idx, weights, num_experts=3, do_expand=expands)

                def fresh_natively(native=native, expands=expands):
                    recv = native.dispatch(x, idx, weights=weights, copy=True)
                    picks = None if expands else recv.topk_idx.to(torch.int64)
                    return recv.x, picks, recv.weights, recv.num_tokens_per_expert_list, recv.without_copy()

                def fresh(buffer=buffer, expands=expands):
                    return buffer.dispatch(x, idx, weights, num_experts=3, do_expand=expands)

                def cached(buffer=buffer, handle=handle):
                    return buffer.dispatch(x, handle=handle)

                def cached_natively(native=native, recv=recv):
                    again = native.dispatch(x, recv.plan, copy=True)
                    return again.x, again.topk_idx, again.weights

                def combine(buffer=buffer, rows=rows, handle=handle):
                    return buffer.combine(rows, handle)

                def combine_natively(native=native, rows=rows, recv=recv):
                    return native.combine(rows, recv.plan)

                name = f"{kind.__name__}, expands={expands}"
                more[f"dispatch, {name}"] = count(fresh) - count(fresh_natively)
                more[f"cached, {name}"] = count(cached) - count(cached_natively)
                more[f"combine, {name}"] = count(combine) - count(combine_natively)
    assert {name: number for name, number in more.items() if number > MOST_MORE} == {}
