"""One GPU as a cluster, with a daemon that is a shell script: what ranks are told, and that the daemon always ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from crossdock.cli import main, mps, signals
from crossdock.cli.mps import one_gpu_cluster, share_gpus
from crossdock.errors import BackendUnavailable, ConfigError

CONTROL = """#!/bin/bash
echo "$* $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE$CUDA_VISIBLE_DEVICES" >>"$MPS_TEST/calls"
pid="$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid"
if [[ $1 == -d ]]; then
    [[ -z $MPS_TEST_BROKEN ]] || { echo "no such device"; exit 1; }
    sleep 600 & echo $! >"$pid"
    cp "$pid" "$MPS_TEST/pid"
    exit 0
fi
read -r command
echo "$command" >>"$MPS_TEST/calls"
[[ -f $pid ]] || { echo "Cannot find MPS control daemon process"; exit 1; }
[[ $command != quit ]] || kill "$(cat "$pid")"
"""


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """A folder where the script notes how it was called, and its process while one runs."""
    (tmp_path / "nvidia-cuda-mps-control").write_text(CONTROL)
    (tmp_path / "nvidia-cuda-mps-control").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("MPS_TEST", str(tmp_path))
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "TORCH_SYMM_MEM_DISABLE_MULTICAST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def calls(daemon):
    return [line.strip() for line in (daemon / "calls").read_text().splitlines()]


def is_running(daemon):
    """Whether the daemon's process is alive; one that has ended may wait for its parent to take notice."""
    stat = Path("/proc", (daemon / "pid").read_text().strip(), "stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def ends(daemon):
    deadline = time.monotonic() + 10
    while is_running(daemon) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(daemon)


@pytest.mark.parametrize(
    ("num_ranks", "num_gpus", "kind", "percentage"),
    [(8, 1, "mps", 12.5), (4, 1, "mps", 25), (3, 2, "mps", 50), (2, 2, "own", None), (None, 1, "mps", None)],
)
@pytest.mark.usefixtures("daemon")
def test_ranks_get_equal_shares(num_ranks, num_gpus, kind, percentage):
    sharing = share_gpus(num_ranks, num_gpus=num_gpus)
    assert (sharing.kind, sharing.percentage, sharing.warning) == (kind, percentage, None)


def test_ranks_find_the_daemon_and_it_ends(daemon, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with one_gpu_cluster(num_ranks=8, num_gpus=1) as variables:
        pipes, log = (Path(variables[f"CUDA_MPS_{what}_DIRECTORY"]) for what in ("PIPE", "LOG"))
        assert is_running(daemon)
        assert log.is_dir()
        assert (pipes / "nvidia-cuda-mps-control.pid").exists()
    assert ends(daemon)
    assert not pipes.exists()
    assert not log.exists()
    assert variables.keys() - {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"} == {
        *("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"),
        "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    }
    assert variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "12.5"
    assert calls(daemon) == ["-d", "", "quit"]  # no percentage for all ranks together, no GPU to number anew


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_daemon_ends_with_the_block(daemon, error):
    with pytest.raises(error), one_gpu_cluster(num_ranks=2, num_gpus=1):
        raise error
    assert ends(daemon)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_daemon_too(daemon, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup has SIGHUP ignored
    try:
        with pytest.raises(SystemExit) as caught, one_gpu_cluster(num_ranks=2, num_gpus=1):
            signal.raise_signal(number)
        assert caught.value.code == 128 + number
        assert ends(daemon)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_daemon_that_does_not_answer_is_killed(daemon, monkeypatch, capsys):
    monkeypatch.setattr(mps.daemon, "_ask", lambda *_: None)
    with one_gpu_cluster(num_ranks=2, num_gpus=1):
        pass
    assert ends(daemon)
    assert "does not answer, and is killed" in capsys.readouterr().err


def test_another_thread_can_be_a_cluster_too(daemon):
    def body():
        with one_gpu_cluster(num_ranks=2, num_gpus=1):
            assert is_running(daemon)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert ends(daemon)


def test_says_why_the_daemon_did_not_start(daemon, monkeypatch):
    monkeypatch.setenv("MPS_TEST_BROKEN", "1")
    with pytest.raises(BackendUnavailable, match="said 'no such device'"), one_gpu_cluster(num_ranks=2, num_gpus=1):
        pytest.fail("there is no daemon")
    assert calls(daemon)[0] == "-d"


def test_a_daemon_that_is_there_is_joined(daemon, monkeypatch):
    with one_gpu_cluster(num_ranks=None, num_gpus=1) as outer:
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in outer
        for name, value in outer.items():
            monkeypatch.setenv(name, value)
        with one_gpu_cluster(num_ranks=4, num_gpus=1) as inner:
            assert inner["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "5")
        assert share_gpus(4, num_gpus=1).percentage is None  # the user's own stands
        assert share_gpus(4, num_gpus=1, percentage=10).percentage == 10
        assert is_running(daemon)
    assert ends(daemon)
    assert calls(daemon).count("-d") == 1
    with pytest.raises(ConfigError, match="no MPS daemon answers there"), one_gpu_cluster(num_ranks=4, num_gpus=1):
        pytest.fail("there is no daemon")


def test_says_that_ranks_take_turns(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    with one_gpu_cluster(num_ranks=8, num_gpus=1) as variables:
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in variables
    assert "8 ranks take turns on 1 GPU: every wait for a peer lasts milliseconds" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="percentage=10 of the SMs wants MPS"):
        share_gpus(8, num_gpus=1, percentage=10)


@pytest.mark.parametrize(
    ("num_ranks", "percentage", "message"),
    [
        (8, 25, "percentage=25 of the SMs for each of 8 ranks on 1 GPU; pass more than 0 and at most 12.5"),
        (8, 0, "percentage=0 of the SMs"),
        (1, 50, "this is a GPU for each rank; leave it out"),
        (0, None, "ranks=0; pass a positive number"),
    ],
)
@pytest.mark.usefixtures("daemon")
def test_refuses(num_ranks, percentage, message):
    with pytest.raises(ConfigError, match=message):
        share_gpus(num_ranks, num_gpus=1, percentage=percentage)


def test_runs_a_command(daemon, monkeypatch):
    monkeypatch.setattr(mps, "num_visible_gpus", lambda: 1)
    program = "import os, sys; sys.exit(int(os.environ['CUDA_MPS_ACTIVE_THREAD_PERCENTAGE'] == '12.5') + 40)"
    with pytest.raises(SystemExit) as caught:
        main(["mps", "--ranks=8", "--", sys.executable, "-c", program])
    assert caught.value.code == 41
    assert ends(daemon)


def test_a_command_is_ended_before_its_daemon(daemon):
    main_and_kill = (
        "import os, signal, sys, threading; from crossdock.cli import main, mps; mps.num_visible_gpus = lambda: 1\n"
        "main(['mps', '--', 'bash', '-c', 'echo $$ >$MPS_TEST/command; exec sleep 600'])"
    )
    process = subprocess.Popen([sys.executable, "-c", main_and_kill])
    deadline = time.monotonic() + 60
    while not (daemon / "command").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not Path("/proc", (daemon / "command").read_text().strip()).exists()
    assert ends(daemon)


def test_a_signal_is_handled_behind_what_must_not_be_interrupted():
    def handle(number, _):
        done.append(number)

    done, before = [], signal.signal(signal.SIGTERM, handle)
    try:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("block")
        assert done == ["block", signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handle
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_without_words_is_refused(capsys):
    assert main(["mps"]) == 2
    assert "there is no command" in capsys.readouterr().err
