"""A program of a user's, as type checkers see it: scripts/release checks it against the installed wheel, strictly."""

import torch
from typing_extensions import assert_type

import crossdock as cd
from crossdock.nn import ExpertParallel, Gate, GroupedExperts

spec = cd.Spec(num_experts=8, num_topk=2, hidden=4, max_tokens=3, layout=cd.Expanded(), wire=cd.Fp32())


def program(group: cd.ThreadGroup) -> torch.Tensor:
    """One rank."""
    x, topk_idx = torch.ones(2, 4), torch.tensor([[0, 7], [1, 5]])
    with cd.Buffer(group, spec) as buffer:
        assert_type(buffer, cd.Buffer)
        recv = buffer.dispatch(x, topk_idx)
        assert_type(recv, cd.Received)
        assert_type(recv.x, torch.Tensor | cd.Quantized)
        rows = recv.x
        assert isinstance(rows, torch.Tensor)
        out = buffer.combine(rows, recv.plan, weights=torch.full((2, 2), 0.5))
        assert_type(out, torch.Tensor)
        pending = buffer.dispatch_start(x, recv.plan)
        assert_type(pending, cd.Pending[cd.Received])
        pending.wait()
    return out


outs = cd.run_local(program, num_ranks=2)
assert_type(outs, list[torch.Tensor])
layer = ExpertParallel(Gate(4, num_experts=8, num_topk=2), GroupedExperts(8, hidden=4, intermediate=16))
assert_type(layer.take_load().shape, torch.Size)
print(outs[0].tolist())
