import itertools

import numpy as np
import pytest
import torch

from crossdock.cli.demo.estimate import STAGES, START, Estimate, expected
from crossdock.cli.demo.generate import generate_plainly, prompts_of
from crossdock.cli.demo.model import Shape
from crossdock.cli.demo.outcome import Outcome, Sample, spent
from crossdock.cli.demo.parameters import initial_values, plain_model
from crossdock.cli.demo.rank import Job
from crossdock.cli.demo.replay import Compared, Disagreement, compare_losses, compare_written
from crossdock.cli.demo.train import Recipe
from crossdock.cli.demo.watch import Span, steps_to_show
from crossdock.cli.machine import this_machine

SHAPE = Shape(hidden=16, num_layers=2, num_heads=2, context=12, num_experts=8, num_topk=2, intermediate=4)


def spans_of_a_step(step, start):
    return [
        Span("dispatch", step, start + 1, start + 2, 0.25),
        Span("forward", step, start, start + 3, 0.0),
        Span("combine", step, start + 3, start + 5, 1.5),
        Span("backward", step, start + 3, start + 6, 0.0),
        Span("all-reduce", step, start + 6, start + 7, 0.0),
        Span("optimizer", step, start + 7, start + 8, 0.0),
        Span("step", step, start, start + 9, 0.0),
    ]


def outcome(num_ranks, steps):
    """All tokens to one expert of the last rank, but for what rank 0 keeps."""
    counts = np.zeros((steps, 2, num_ranks, 8), dtype=np.int32)
    counts[..., -1] = 24
    counts[:, :, 0, 0] += 8
    return Outcome(
        num_ranks=num_ranks,
        shape=SHAPE,
        recipe=Recipe(steps=steps, seed=0),
        machine=this_machine(),
        sharing=None,
        num_files=1,
        text_bytes=1000,
        num_parameters=1000,
        losses=[5.5] * steps,
        held_out_loss=5.5,
        compared=[Compared(1, 5.5, 5.5)],
        spans=[[span for step in range(steps) for span in spans_of_a_step(step, 10 * step)] for _ in range(num_ranks)],
        counts=counts,
        samples=[Sample(prompt="def <main>(", continuation="</pre><script>")],
        num_written=4,
        num_sequences=2,
        written_per_s=8.0,
    )


def test_the_parts_of_a_step_add_up():
    parts = spent(spans_of_a_step(0, 0.0))
    assert sum(parts.values()) == 9
    assert (parts["the model"], parts["waiting for peers"], parts["combine"]) == (3, 1.75, 0.5)


def test_counts_become_load_and_traffic():
    two = outcome(num_ranks=2, steps=3)
    assert two.load[0, 0].tolist() == [8 * 8 / 56, *[0] * 6, 8 * 48 / 56]
    row = 16 * 4 / 1e6
    assert two.traffic.tolist() == pytest.approx(np.array([[16 * row, 48 * row], [0, 48 * row]]))
    assert two.moving_share == 3 / 9


@pytest.mark.parametrize(("num_ranks", "steps"), [(1, 1), (2, 300), (8, 2)])
def test_a_page_of_any_size(num_ranks, steps):
    page = pytest.importorskip("crossdock.cli.demo.page").render(outcome(num_ranks, steps))
    assert page.count("Plotly.newPlot(") == 4
    assert "&lt;/pre&gt;&lt;script&gt;" in page
    assert "def &lt;main&gt;(" in page


@pytest.mark.parametrize(
    ("steps", "shown"), [(300, [(0, 2), (150, 152), (298, 300)]), (3, [(0, 2), (1, 3), (1, 3)][:2]), (1, [(0, 1)])]
)
def test_a_long_run_is_traced_in_part(steps, shown):
    spans = [span for step in range(steps) for span in spans_of_a_step(step, 10 * step)]
    assert steps_to_show([spans]) == [(10 * first, 10 * last - 1) for first, last in shown]


@pytest.mark.parametrize("plain_loss", [5.5001, float("nan")])
def test_other_losses_are_an_error(plain_loss):
    with pytest.raises(Disagreement, match=r"step 2 has loss 5\.5 over the ranks"):
        compare_losses([5.5, 5.5, 5.5], [5.5, plain_loss])


def test_another_byte_is_an_error():
    prompts = prompts_of([b"if", b"while x:"], 12)
    job = Job(
        shape=SHAPE,
        recipe=Recipe(steps=1, seed=0),
        train_text=np.zeros(0, dtype=np.uint8),
        held_out_text=np.zeros(0, dtype=np.uint8),
        prompts=prompts.numpy(),
    )
    values, model = initial_values(SHAPE, seed=0), plain_model(SHAPE)
    model.load_state_dict(values)
    written = generate_plainly(model, prompts, job.noise())
    assert compare_written(job, values, written) == 14
    written[1, 9] ^= 1
    with pytest.raises(Disagreement, match="after 'while x:"):
        compare_written(job, values, torch.as_tensor(written))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def tick(self):
        self.now += 1.0
        return self.now


def test_what_is_left_counts_down_also_when_nobody_says_anything():
    clock = Clock()
    estimate = Estimate(expected(num_ranks=4, num_steps=100, num_replayed=10, num_cores=2), clock=clock)
    whole = estimate.left_s()
    estimate.begin(START)
    seen = [(estimate.left_s(), estimate.share(), clock.tick()) for _ in range(5)]
    assert whole >= seen[0][0]
    for earlier, later in itertools.pairwise(seen):
        assert later[0] == pytest.approx(earlier[0] - 1)
        assert later[1] > earlier[1]
    for stage in STAGES[2:]:
        estimate.begin(stage)
        assert estimate.left_s() > 0
        clock.tick()
    clock.now = 1000.0
    assert (estimate.left_s(), estimate.share()) == (0, 1)
