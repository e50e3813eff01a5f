"""Who still exists: locks that go with their process, however it ends, and with nothing else."""

import os
import signal
import subprocess
import sys

import pytest

from crossdock import PeerFailed, run_local
from crossdock.transport.inproc import ThreadGroup
from crossdock.transport.presence import Presence, is_unlocked, lock

NUM_RANKS = 3


class Told:
    """A group whose ranks' paths are known."""

    def __init__(self, rank, paths):
        self.rank, self.size, self._paths = rank, len(paths), paths

    def all_gather(self, value):
        return self._paths if value == self._paths[self.rank] else [value] * self.size


def started(code, *arguments, **options):
    """A program that has said that it is ready, and that ends when its input does."""
    command = [sys.executable, "-c", f"import sys; {code}; print('ready', flush=True); sys.stdin.read()", *arguments]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    assert program.stdout.readline() == "ready\n"
    return program


def holder(path):
    """A process that has locked a file."""
    return started(
        "from pathlib import Path; from crossdock.transport.presence import lock; fd = lock(Path(sys.argv[1]))", path
    )


def look_at_all(group, folder):
    """What each rank sees: of all ranks, again and again, itself among them; after one has left; at the end."""
    presence = Presence(group, folder / f"rank-{group.rank}")
    group.all_gather(None)
    left = list(folder.iterdir())
    before = [[presence.is_alive(rank) for rank in range(group.size)] for _ in range(50)]
    group.all_gather(None)
    after = [presence.is_alive(rank) for rank in range(group.size)]
    group.all_gather(None)
    if group.rank == 1:
        presence.close()
        presence.close()
    group.all_gather(None)
    without = [presence.is_alive(rank) for rank in range(group.size)]
    group.all_gather(None)
    presence.close()
    return left, before, after, without


def test_a_rank_that_looks_at_all_keeps_its_own_lock_and_one_that_closes_is_gone(tmp_path):
    got = run_local(lambda group: look_at_all(group, tmp_path), NUM_RANKS)
    for left, before, after, _ in got:
        assert left == []  # files have no names once all have opened them
        assert before == [[True] * NUM_RANKS] * 50
        assert after == [True] * NUM_RANKS
    for rank in (0, 2):
        assert got[rank][3] == [True, False, True]
    assert got[1][3] == [True] * NUM_RANKS  # who has closed sees nobody, and says of nobody that it is gone


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, None], ids=["killed", "terminated", "ended"])
def test_a_process_that_has_ended_is_gone(tmp_path, sign):
    paths = [tmp_path / "mine", tmp_path / "theirs"]
    with holder(paths[1]) as process:
        presence = Presence(Told(0, paths), paths[0])
        assert [presence.is_alive(rank) for rank in range(2)] == [True, True]
        if sign is None:
            process.stdin.close()
        else:
            process.send_signal(sign)
        process.wait(10)
    assert [presence.is_alive(rank) for rank in range(2)] == [True, False]
    presence.close()
    assert list(tmp_path.iterdir()) == [paths[1]]  # a rank removes its own name


def test_a_rank_whose_file_cannot_be_opened_counts_as_alive(tmp_path):
    """One of another host, or in another folder: nothing is known of it."""
    presence = Presence(Told(0, [tmp_path / "mine", tmp_path / "elsewhere" / "theirs"]), tmp_path / "mine")
    assert presence.is_alive(1)
    presence.close()
    assert presence.is_alive(1)


def test_a_program_that_a_rank_has_started_does_not_keep_its_lock(tmp_path):
    fd = lock(tmp_path / "mine")
    presence = Presence(Told(1, [tmp_path / "mine", tmp_path / "other"]), tmp_path / "other")
    with started("pass", close_fds=False) as program:
        assert presence.is_alive(0)
        os.close(fd)
        assert not presence.is_alive(0)
        assert program.poll() is None
    presence.close()


def test_looking_at_a_lock_that_is_free_does_not_take_it(tmp_path):
    fd = lock(tmp_path / "mine")
    with (tmp_path / "mine").open("r+") as one, (tmp_path / "mine").open("r+") as other:
        assert not any(is_unlocked(file.fileno()) for file in (one, other))
        os.close(fd)
        assert all(is_unlocked(file.fileno()) for file in (one, other) * 3)


def test_a_file_that_is_there_already_is_nobodys_to_lock(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError):
        lock(tmp_path / "mine")


def test_a_peer_that_does_not_come_leaves_no_file_behind(tmp_path):
    group, absent = ThreadGroup.world(2)
    absent.go()
    with pytest.raises(PeerFailed, match="it did not take part in the set-up"):
        Presence(group, tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []
