import re

import numpy as np
import pytest
import torch

from crossdock import Compact, Expanded, Spec, Topology, local_counts, zipf_load
from crossdock.cli import main
from crossdock.cli.bench.traffic import traffic as bench_traffic
from crossdock.cli.load.figures import make_spec, measure, place, traffic
from crossdock.cli.load.recording import Recording, read
from crossdock.nn import Placement


def zipf(steps, num_tokens=64, num_experts=16, num_topk=4):
    """The same popular experts in all steps."""
    picks = zipf_load(steps * num_tokens, num_experts, num_topk=num_topk, generator=torch.Generator().manual_seed(1))
    return picks.view(steps, num_tokens, num_topk).to(torch.int32).numpy()


def test_counts_are_those_of_the_library():
    """Of rows by `local_counts`, which plans are made from, and by what bench counts."""
    picks = zipf(steps=2)
    picks[0, 3, 1] = -1
    found = traffic(Recording(picks=picks, num_experts=16, num_ranks=4))
    spec = Spec(num_experts=16, num_topk=4, hidden=8, max_tokens=16)
    for step, of_step in enumerate(torch.from_numpy(picks).long()):
        by_rank = of_step.view(4, 16, 4)
        counts = torch.stack([local_counts(spec, Topology(num_ranks=4), of_rank) for of_rank in by_rank]).numpy()
        assert (found.expert_picks[step] == counts[:, :16].sum(0)).all()
        assert (found.picks[step] == counts[:, :16].reshape(4, 4, 4).sum(2)).all()
        assert (found.rows[step] == counts[:, 16:]).all()
        for layout, matrix in ((Compact(), found.rows), (Expanded(), found.picks)):
            of_bench = bench_traffic(
                Spec(num_experts=16, num_topk=4, hidden=8, max_tokens=16, layout=layout), by_rank, rank=2
            )
            assert of_bench.out_received == matrix[step, :, 2].sum()


def test_a_placement_moves_picks_and_loses_none():
    recording = Recording(picks=zipf(steps=1), num_experts=16, num_ranks=4)
    placement = Placement.balanced(torch.arange(16.0), num_physical=20, num_ranks=4)
    placed = place(recording, placement)
    back = placement.physical_to_logical.numpy()[placed.picks]
    assert placed.num_experts == 20
    assert (back == recording.picks).all()


def test_replicas_even_out_a_popular_expert():
    picks = zipf(steps=8)
    recording = Recording(picks=picks, num_experts=16, num_ranks=4)
    figures = measure(recording, make_spec(recording, hidden=32, wire="bf16"), replicas=[0, 2])
    as_recorded, exchanged, replicated = figures.candidates
    assert (figures.fitted_steps, figures.measured_steps) == (4, 4)
    assert as_recorded.ranks.mean > exchanged.ranks.mean > replicated.ranks.mean >= 1
    assert replicated.num_physical == 24


def test_capacities_hold_the_fullest_step_and_no_row_less():
    picks = np.array([[[0], [1]], [[3], [3]]], np.int32)  # the second step: both tokens to expert 3 of rank 1
    recording = Recording(picks=picks, num_experts=4, num_ranks=2)
    figures = measure(recording, make_spec(recording, hidden=4, wire="fp32"), replicas=[])
    assert figures.capacities == {"Compact": 2, "Expanded": 2, "Padded": 2}
    assert figures.link_bytes.tolist() == [[0, 8], [8, 0]]  # in the mean of the steps half a row of 16 bytes each
    assert (figures.ranks.mean, figures.ranks.overall, figures.experts.worst) == (2.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2)), "holds float64 of shape [2, 2]; pass integers"),
        (np.zeros(3, np.int32), "holds int32 of shape [3]"),
        (np.array([[0, 0]]), "picks expert 0 more than once"),
        (np.array([[0, 9]]), "experts are 0 to 7"),
        (np.array([[0, -2]]), "has picks from -2 to 0"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path, capsys, array, message):
    np.save(tmp_path / "picks.npy", array)
    assert main(["load", str(tmp_path / "picks.npy"), "--experts=8", "--ranks=2"]) == 2
    assert message in capsys.readouterr().err


def test_no_file_and_no_even_ranks_are_refused(tmp_path, capsys):
    assert main(["load", str(tmp_path / "none.npy")]) == 2
    assert "none.npy cannot be read" in capsys.readouterr().err
    np.save(tmp_path / "picks.npy", np.array([[0, 1]]))
    assert main(["load", str(tmp_path / "picks.npy"), "--experts=6", "--ranks=4"]) == 2
    assert "experts=6 is not divisible by ranks=4" in capsys.readouterr().err
    assert main(["load", str(tmp_path / "picks.npy"), "--experts=0"]) == 2
    assert "experts=0; pass a positive number" in capsys.readouterr().err


def test_a_matrix_is_one_step_and_experts_are_guessed(tmp_path):
    np.save(tmp_path / "picks.npy", np.array([[0, 5], [1, -1]], np.int16))
    recording = read(tmp_path / "picks.npy", num_experts=None, num_ranks=4)
    assert (recording.picks.shape, recording.num_experts) == ((1, 2, 2), 8)


@pytest.mark.parametrize("steps", [1, 3])
def test_prints_and_leaves_a_page_that_stands_alone(tmp_path, capsys, steps):
    pytest.importorskip("plotly")
    np.save(tmp_path / "picks.npy", zipf(steps))
    command = ["load", str(tmp_path / "picks.npy"), "--ranks=4", f"--page={tmp_path / 'load.html'}", "--wire=fp8"]
    assert main([*command, "--hidden=256"]) == 0
    said = capsys.readouterr().out
    assert "of 64 tokens, top-4 of 16 experts, 4 ranks; rows of 264 bytes" in said
    assert ("measured on the other" if steps > 1 else "measured on it") in said
    page = (tmp_path / "load.html").read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*.*?</script>", "", page, flags=re.DOTALL)
    for name in ("experts", "ranks", "links", "placements"):
        assert f'Plotly.newPlot("{name}"' in own
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", own)
