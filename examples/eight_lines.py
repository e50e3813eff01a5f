"""The README's program: two ranks that are threads, two tokens each, one dispatch and one combine.

    $ python examples/eight_lines.py
    ([3, 1, 0, 0], [10.0, 10.0])
    ([0, 2, 0, 2], [20.0, 20.0])

A line per rank: how many picks came to each of its four experts, and the first value of each of its combined tokens.
"""

import torch, crossdock as cd


def program(group):  # one rank; under torchrun: Buffer(None, spec)
    spec = cd.Spec(num_experts=8, num_topk=2, hidden=4, max_tokens=3, layout=cd.Expanded())
    x, topk_idx = torch.full((2, 4), group.rank + 1.0).bfloat16(), torch.tensor([[0, 7], [group.rank, 5]])
    with cd.Buffer(group, spec) as buffer:
        recv = buffer.dispatch(x, topk_idx)  # rows by expert, then source rank, then token
        out = buffer.combine(10 * recv.x, recv.plan, weights=torch.full((2, 2), 0.5))
    return recv.num_tokens_per_expert.tolist(), out[:, 0].tolist()


print(*cd.run_local(program, num_ranks=2), sep="\n")
