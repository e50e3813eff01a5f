"""Who still exists: locks that go with their process, however it ends, and with nothing else."""

import os
import signal
import subprocess
import sys

import pytest

from crossdock import PeerFailed
from crossdock.transport.inproc import ThreadGroup
from crossdock.transport.presence import Presence, is_unlocked, lock
from tests.child import run_child


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


def is_locked(fd):
    """Whether another process finds a descriptor of this one's locked."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    path = f"/proc/{os.getpid()}/fd/{fd}"
    done = run_child([sys.executable, "-c", code, path])
    assert done.returncode == 0 or "BlockingIOError" in done.stderr
    return done.returncode != 0


def test_a_rank_that_looks_at_all_keeps_its_own_lock_and_one_that_closes_is_gone(tmp_path):
    paths = [tmp_path / name for name in ("mine", "first", "second")]
    with holder(paths[1]) as first, holder(paths[2]):
        presence = Presence(Told(0, paths), paths[0])
        for _ in range(50):
            assert [presence.is_alive(rank) for rank in range(3)] == [True] * 3
        assert is_locked(presence._own)
        first.stdin.close()
        first.wait(10)
        assert [presence.is_alive(rank) for rank in range(3)] == [True, False, True]
        fd = os.dup(presence._own)
        presence.close()
        presence.close()
        assert not is_locked(fd)
        os.close(fd)
        assert [presence.is_alive(rank) for rank in range(3)] == [True] * 3  # who has closed says of nobody it is gone


def test_a_process_that_was_forked_from_a_rank_is_not_that_rank(tmp_path):
    """It lives on when the rank is killed, as a data loader's worker may, and when it ends itself the rank lives on."""
    forks = "import os; child = os.fork(); child or (os.close(1), __import__('time').sleep(60))"
    locks = "from pathlib import Path; from crossdock.transport.presence import lock; fd = lock(Path(sys.argv[1]))"
    code = f"import sys; {locks}; {forks}; print(child, flush=True); sys.stdin.read()"
    path = tmp_path / "theirs"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:
        child = int(rank.stdout.readline())
        with path.open("r+") as file:
            assert not is_unlocked(file.fileno())
            rank.kill()
            rank.wait(10)
            os.kill(child, 0)  # it is there
            assert is_unlocked(file.fileno())
        os.kill(child, signal.SIGKILL)


def test_a_child_that_ends_leaves_the_lock_with_its_parent(tmp_path):
    fd = lock(tmp_path / "mine")
    child = os.fork()
    if not child:
        os.close(fd)
        os._exit(0)
    os.waitpid(child, 0)
    assert is_locked(fd)
    os.close(fd)


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
    starts = "import subprocess; p = subprocess.Popen(['sleep', '20'], close_fds=False, stdin=-3, stdout=-3)"
    locks = "from pathlib import Path; from crossdock.transport.presence import lock; fd = lock(Path(sys.argv[1]))"
    with started(f"{locks}; {starts}", tmp_path / "theirs") as rank, (tmp_path / "theirs").open("r+") as file:
        assert not is_unlocked(file.fileno())
        rank.kill()
        rank.wait(10)
        assert is_unlocked(file.fileno())


def test_looking_at_a_lock_that_is_free_does_not_take_it(tmp_path):
    with holder(tmp_path / "theirs") as process, (tmp_path / "theirs").open("r+") as one:
        assert not is_unlocked(one.fileno())
        process.stdin.close()
        process.wait(10)
        assert is_unlocked(one.fileno())
        assert is_unlocked(one.fileno())
        assert not is_locked(one.fileno())


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
