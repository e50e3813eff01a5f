import pytest
import torch

from crossdock import ConfigError
from crossdock.cli.demo import openings
from crossdock.cli.demo.text import MAX_BYTES, MIN_BYTES, draw_batch, standard_library
from crossdock.cli.demo.train import Ranks


@pytest.fixture(scope="module")
def text():
    return standard_library()


def test_reads_this_pythons_library(text):
    assert MIN_BYTES < len(text.train) + len(text.held_out) <= MAX_BYTES
    assert len(text.held_out) == (len(text.train) + len(text.held_out)) // 16
    assert b"def " in bytes(text.train[:100_000].tolist())


def test_reads_files_in_order_and_leaves_out_tests(tmp_path):
    for name, letter in {"b.py": "b", "a/z.py": "a", "test/t.py": "t", "site-packages/s.py": "s", "c.txt": "c"}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(letter * MIN_BYTES)
    text = standard_library(tmp_path)
    assert text.num_files == 2
    assert bytes(torch.cat([text.train, text.held_out]).tolist()) == b"a" * MIN_BYTES + b"b" * MIN_BYTES


def test_a_python_without_source_is_an_error(tmp_path):
    (tmp_path / "only.pyc").touch()
    with pytest.raises(ConfigError, match="0 bytes of Python source"):
        standard_library(tmp_path)


def test_a_batch_depends_on_seed_and_step_alone(text):
    def draw(seed, step):
        return draw_batch(text.train, num_sequences=4, length=10, seed=seed, step=step)

    assert torch.equal(draw(0, 5), draw(0, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6))
    assert not torch.equal(draw(0, 5), draw(1, 5))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16, 32])
def test_ranks_share_out_a_batch(num_ranks):
    batch = torch.arange(16).view(16, 1)
    parts = [Ranks(rank, num_ranks).own(batch) for rank in range(num_ranks)]
    assert torch.equal(torch.cat(parts), batch)
    assert max(map(len, parts)) == -(-16 // num_ranks)


def test_prompts_are_as_many_as_asked_for(text):
    prompts = openings(text, 8)
    assert prompts[0].startswith(b"def main(")
    assert len(prompts) == 8
    assert all(len(prompt) == 16 for prompt in prompts[3:])
