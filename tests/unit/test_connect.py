"""Where a buffer's rows are moved, and what may be asked of that: decided before anything is connected."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossdock import (
    BackendUnavailable,
    Buffer,
    ConfigError,
    CrossdockError,
    Expanded,
    Fp32,
    Padded,
    Spec,
    ThreadGroup,
    connect,
)
from crossdock.backends.base import LaunchOptions
from crossdock.transport.base import ProcessGroup
from tests.world import meet

SPEC = Spec(num_experts=8, num_topk=2, hidden=16, max_tokens=5, wire=Fp32(), layout=Expanded())
COMPACT = Spec(num_experts=8, num_topk=2, hidden=16, max_tokens=5)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WORLDS = pytest.mark.worlds("inproc-2", "processes-2")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="how it is without CUDA")


def rank_of(group):
    return group.rank if isinstance(group, ThreadGroup) else group.rank()


def threads():
    return ThreadGroup.world(1)[0]


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", CPU], ids=repr)
def test_threads_are_on_the_cpu_unless_a_device_is_named(device):
    assert connect.choose_device(threads(), device) == CPU


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("gloo", CPU),
        ("nccl", torch.device("cuda", 3)),
        ("cpu:gloo,cuda:nccl", torch.device("cuda", 3)),
        ("cpu:gloo,cuda:gloo", CPU),
    ],
)
def test_processes_are_where_their_group_has_nccl(backend, device):
    members = object.__new__(ProcessGroup)  # its constructor wants a group that is initialised
    members.process_group = None
    config = str(dist.distributed_c10d.BackendConfig(dist.Backend(backend)))
    with (
        mock.patch.object(connect.dist, "get_backend_config", return_value=config),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=3),
    ):
        assert connect.choose_device(members, None) == device
        assert connect.choose_device(members, "cpu") == CPU  # what is asked for comes first


@pytest.mark.parametrize(("given", "want"), [("cuda", 3), ("cuda:1", 1), (torch.device("cuda", 2), 2)], ids=repr)
def test_cuda_is_the_current_device_unless_one_is_named(given, want):
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=3),
    ):
        assert connect.choose_device(threads(), given) == torch.device("cuda", want)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("mps", "device=mps; rows are moved on 'cpu' or 'cuda'"),
        (torch.device("meta"), "device=meta; rows are moved on 'cpu' or 'cuda'"),
        ("xpu:1", "device=xpu:1; rows are moved on 'cpu' or 'cuda'"),
        ("gpu", "device='gpu' is no torch device; pass 'cpu', 'cuda' or 'cuda:1'"),
        ("cuda:one", "device='cuda:one' is no torch device; pass 'cpu', 'cuda' or 'cuda:1'"),
        ("", "device='' is no torch device; pass 'cpu', 'cuda' or 'cuda:1'"),
    ],
    ids=repr,
)
def test_other_devices_are_refused(device, text):
    with pytest.raises(ConfigError) as raised:
        connect.choose_device(threads(), device)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("launch_options", "device", "text"),
    [
        ({"num_sms": 0}, CUDA, "num_sms=0; pass a positive integer, or None for the default"),
        ({"num_sms": -3}, CPU, "num_sms=-3; pass a positive integer"),
        ({"expand": "both"}, CUDA, "expand='both'; pass 'sender', 'receiver', or None for the cheaper one"),
        ({"mover": "dma"}, CUDA, "mover='dma'; pass 'kernel' or 'copy'"),
        ({"mover": None}, CPU, "mover=None; pass 'kernel' or 'copy'"),
        ({"num_sms": 4}, CPU, "num_sms, expand and mover say how a GPU moves rows; leave them out on CPUs"),
        ({"expand": "sender"}, CPU, "num_sms, expand and mover say how a GPU moves rows; leave them out on CPUs"),
        ({"mover": "copy"}, CPU, "num_sms, expand and mover say how a GPU moves rows; leave them out on CPUs"),
    ],
    ids=repr,
)
def test_wishes_that_cannot_be_are_refused(launch_options, device, text):
    with pytest.raises(ConfigError) as raised:
        LaunchOptions(**launch_options).check(COMPACT, device)
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize("layout", [Expanded(), Padded()], ids=repr)
def test_copy_engines_move_whole_blocks_alone(layout):
    spec = Spec(num_experts=8, num_topk=2, hidden=16, max_tokens=5, layout=layout)
    with pytest.raises(ConfigError) as raised:
        LaunchOptions(mover="copy").check(spec, CUDA)
    name = type(layout).__name__
    assert str(raised.value) == (
        f"mover='copy' moves whole blocks, which {name} rows do not form; pass layout=Compact(), or mover='kernel'"
    )


def test_wishes_that_can_be_are_not_refused():
    LaunchOptions().check(SPEC, CPU)
    LaunchOptions(mover="copy", num_sms=1).check(COMPACT, CUDA)
    for expand in (None, "sender", "receiver"):
        LaunchOptions(expand=expand, num_sms=1000).check(SPEC, CUDA)


@WORLDS
@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"num_sms": 0}, "num_sms=0; pass a positive integer, or None for the default"),
        ({"num_sms": "4"}, "num_sms='4'; pass a positive integer"),
        ({"timeout_s": "30"}, "timeout_s='30'; pass a positive number of seconds"),
        ({"device": 1.5}, "device=1.5 is no torch device; pass 'cpu', 'cuda' or 'cuda:1'"),
        ({"rail": 3}, "rail=3; pass 'auto', 'inproc', 'dist', 'nixl', an engine, or None for no rail"),
        ({"trace": 3}, "trace=3 is a int; pass the path of a folder"),
        ({"spec": None}, "spec is a NoneType; pass a crossdock.Spec"),
    ],
    ids=repr,
)
def test_what_one_rank_alone_asks_for_is_refused_on_all(world, kwargs, text):
    for kind, got in world.run(try_to_make, COMPACT, [{}, kwargs]):
        assert kind is ConfigError
        assert got.startswith(f"rank 1: {text}")


def try_to_make(group, spec, by_rank):
    """The error; then a buffer that is made rightly, which works."""
    try:
        Buffer(group, **{"spec": spec} | by_rank[rank_of(group)])
    except CrossdockError as raised:
        error = raised
    meet(group)
    with Buffer(group, spec) as buffer:
        x = torch.ones(2, 16, dtype=spec.combine_dtype)
        recv = buffer.dispatch(x, torch.tensor([[0, 7], [4, -1]]))
        assert buffer.device == CPU
        assert buffer.launch is None
        assert int(recv.num_tokens_per_expert.sum()) == (2, 4)[buffer.rank]
        return type(error), str(error)


@no_cuda
@WORLDS
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)], ids=repr)
def test_cuda_where_there_is_none_is_said_on_every_rank(world, device):
    text = f"rank 0: device={device} needs CUDA, and torch.cuda.is_available() is False here; pass device='cpu'"
    assert world.run(try_to_make, SPEC, [{"device": device}] * 2) == [(BackendUnavailable, text)] * 2


@WORLDS
@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"device": "mps"}, "device=mps; rows are moved on 'cpu' or 'cuda'"),
        ({"device": "meta"}, "device=meta; rows are moved"),
        ({"device": "gpu"}, "device='gpu' is no torch device"),
        ({"num_sms": 4}, "num_sms, expand and mover say how a GPU moves rows"),
        ({"expand": "receiver"}, "num_sms, expand and mover say how a GPU moves rows"),
        ({"mover": "copy", "device": "cuda"}, "mover='copy' moves whole blocks, which Expanded rows do not form"),
    ],
    ids=repr,
)
def test_what_cannot_be_is_refused_on_every_rank_and_the_group_is_as_good_as_before(world, kwargs, text):
    for kind, got in world.run(try_to_make, SPEC, [kwargs] * 2):
        assert kind is ConfigError
        assert got.startswith(f"rank 0: {text}")


@WORLDS
@pytest.mark.parametrize(
    ("by_rank", "text"),
    [
        ([{}, {"device": "cuda"}], "differ in device: 'cpu' != 'cuda'"),
        ([{"device": "cuda:0"}, {"device": "cpu"}], "differ in device: 'cuda' != 'cpu'"),
        (
            [{"device": "cuda", "expand": "sender"}, {"device": "cuda"}],
            "differ in expand: 'sender' != None",
        ),
        (
            [{"device": "cuda"}, {"device": "cuda", "mover": "copy"}],
            "differ in mover: 'kernel' != 'copy'",
        ),
    ],
    ids=repr,
)
def test_ranks_that_ask_for_different_things_are_told(world, by_rank, text):
    want = f"the Buffers of rank 0 and rank 1 {text}; pass the same on all ranks"
    assert world.run(try_to_make, COMPACT, by_rank) == [(ConfigError, want)] * 2


@no_cuda
@WORLDS
def test_each_rank_may_ask_for_a_device_of_its_own(world):
    """What each lacks is said on all, of the lowest rank first."""
    got = world.run(try_to_make, COMPACT, [{"device": f"cuda:{rank}"} for rank in range(2)])
    assert [text.partition(" needs")[0] for _, text in got] == ["rank 0: device=cuda:0"] * 2


def missing_on(device, *, count, has_triton):
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=count > 0),
        mock.patch.object(torch.cuda, "device_count", return_value=count),
        mock.patch.object(connect.importlib.util, "find_spec", return_value="triton" if has_triton else None),
    ):
        return connect.cuda_problem(torch.device(device))


def test_what_cuda_needs_is_said_in_turn():
    assert missing_on("cuda:1", count=2, has_triton=True) is None
    assert missing_on("cuda:0", count=0, has_triton=True).endswith("pass device='cpu'")
    assert missing_on("cuda:2", count=2, has_triton=True) == ("device=cuda:2 does not exist; this process sees 2 GPUs")
    assert missing_on("cuda:0", count=1, has_triton=False) == (
        "device=cuda:0 needs Triton 3.6 or newer, which is not installed; pip install triton"
    )


@pytest.mark.parametrize(
    ("found", "is_enough"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), ("4.0", True)]
)
def test_a_triton_that_is_too_old_is_refused(found, is_enough):
    with (
        mock.patch.object(connect.importlib.util, "find_spec", return_value="triton"),
        mock.patch.object(connect.importlib.metadata, "version", return_value=found),
    ):
        said = connect.triton_problem()
    wanted = f"Triton 3.6 or newer, and {found} is installed; pip install --upgrade triton"
    assert said == (None if is_enough else wanted)
