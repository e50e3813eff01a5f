"""In which order streams are told to wait for each other, and for events of the caller's."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from crossdock import Buffer, ConfigError, Fp32, Spec, ThreadGroup
from crossdock.backends.cuda import stream as streams_of_calls


class Stream:
    """A stream that notes what it is told to wait for: the stream that recorded an event last, or its name."""

    def __init__(self, name="ours", **_):
        self.name = name if isinstance(name, str) else "ours"
        self.cuda_stream = id(self)
        self.log = []

    def wait_event(self, event):
        self.log.append(event.name)


class Event:
    def __init__(self, name=None):
        self.name = name

    def record(self, stream):
        self.name = stream.name


@pytest.fixture
def current():
    return Stream("current")


@pytest.fixture
def streams(current):
    with (
        mock.patch.object(torch.cuda, "Stream", Stream),
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "current_stream", return_value=current),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(streams_of_calls, "_current_stream", return_value=current.cuda_stream),
    ):
        yield streams_of_calls.CallStreams(torch.device("cuda", 0))


def test_a_call_that_is_waited_for_comes_after_the_event(streams, current):
    streams.wait_for(Event("theirs"), on_side=False)
    assert current.log == ["theirs"]
    assert streams.side.log == []


def test_a_call_that_is_started_comes_after_the_current_stream_and_the_event(streams, current):
    streams.wait_for(Event("theirs"), on_side=True)
    streams.enter_side()
    assert current.log == []
    assert streams.side.log == ["current", "theirs", "current"]


def test_started_calls_run_on_the_stream_that_was_chosen_behind_those_before(streams, current):
    own, chosen = streams.side, Stream("chosen")
    assert streams.enter_side() == own.cuda_stream
    streams.use(chosen)
    assert streams.enter_side() == chosen.cuda_stream
    assert chosen.log == ["current", "ours"]
    assert chosen in streams.all
    assert streams.enter() == current.cuda_stream
    assert current.log == ["chosen"]
    streams.use(None)
    assert streams.enter_side() == own.cuda_stream
    assert own.log == ["current", "current", "current"]


def test_on_cpus_there_is_no_stream():
    spec = Spec(num_experts=1, num_topk=1, hidden=1, max_tokens=1, wire=Fp32())
    with Buffer(ThreadGroup.world(1)[0], spec) as buffer:
        assert buffer.stream is None
        with pytest.raises(ConfigError, match=r"buffer.stream was set to a Stream; there are none on CPUs"):
            buffer.stream = Stream()
