"""Topologies: made by hand, and found by trying to open what peers have left in their memory."""

import errno
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from crossdock import Buffer, ConfigError, NotSupported, Spec, ThreadGroup, Topology, TransportError
from crossdock.connect import check_support
from crossdock.transport.domains import topology_of


def find(group, at=None, number=errno.ENOENT):
    """The topology where each rank keeps its memory in the folder of its node, which the others cannot open."""
    rank = torch.distributed.get_rank(group)
    with mock.patch.dict(os.environ, {"CROSSDOCK_SHM_DIR": at[rank]} if at else {}):
        real = os.open
        blind = [folder for folder in at or () if at and folder != at[rank]]

        def opened(path, *args, **kwargs):
            if any(str(path).startswith(folder) for folder in blind):
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **kwargs)

        def read(self):
            with os.fdopen(os.open(self, os.O_RDONLY), "rb") as file:
                return file.read()

        with mock.patch("os.open", opened), mock.patch("pathlib.Path.read_bytes", read):
            return Topology.of(group)


@pytest.mark.worlds("processes-4")
def test_ranks_that_see_each_other_are_a_node(world):
    assert world.run(find) == [Topology.flat(4)] * 4
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        assert world.run(find, [first, first, second, second]) == [Topology.grid(nodes=2, local=2)] * 4
        for outcome in world.outcomes(find, [first, first, second, second], errno.EMFILE):
            assert isinstance(outcome, TransportError)
            assert "(Too many open files); raise the limit of open files (ulimit -n)" in str(outcome)
        assert not [*Path(first).iterdir(), *Path(second).iterdir()]


@pytest.mark.worlds("processes-4")
def test_uneven_nodes_are_refused_with_who_sees_whom_on_all_ranks(world):
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for outcome in world.outcomes(find, [first, first, first, second]):
            assert isinstance(outcome, ConfigError)
            assert "rank 0 sees ranks 1, 2; rank 1 sees ranks 0, 2; rank 2 sees ranks 0, 1; rank 3 sees no rank" in str(
                outcome
            )


@pytest.mark.parametrize(
    "seen",
    [
        {0: [0, 2], 1: [1, 3], 2: [0, 2], 3: [1, 3]},
        {0: [0], 1: [1, 2], 2: [1, 2]},
        {0: [0, 1], 1: [0, 1], 2: [2]},
        {0: [0, 1], 1: [1]},
    ],
    ids=["in turn", "the first alone", "the last alone", "one way"],
)
def test_ranks_that_form_no_mesh_are_refused(seen):
    with pytest.raises(ConfigError, match="form no nodes of equal size"):
        topology_of(seen)


def test_a_grid_and_a_flat_topology():
    grid = Topology.grid(nodes=3, local=2)
    assert (grid.num_ranks, grid.num_nodes, grid.node_size) == (6, 3, 2)
    assert (Topology.flat(6).num_nodes, Topology.of(ThreadGroup.world(1)[0])) == (1, Topology.flat(1))
    for nodes, local in ((0, 2), (2, -1)):
        with pytest.raises(ConfigError, match=f"nodes={nodes}, local={local}; pass positive numbers"):
            Topology.grid(nodes=nodes, local=local)


def test_a_buffer_refuses_what_is_no_topology_of_its_ranks():
    group, spec = ThreadGroup.world(1)[0], Spec(num_experts=2, num_topk=1, hidden=8, max_tokens=1)
    with pytest.raises(ConfigError, match="the Topology has 4 ranks, the group 1; pass one of as many"):
        Buffer(group, spec, topology=Topology.grid(nodes=2, local=2))
    with pytest.raises(ConfigError, match=r"topology is a tuple; pass a crossdock\.Topology"):
        Buffer(group, spec, topology=(2, 2))


def test_sums_by_node_are_refused_on_gpus_by_name():
    spec = Spec(num_experts=2, num_topk=1, hidden=8, max_tokens=1, reduce="node")
    flat = Topology.flat(1)
    check_support(spec, torch.device("cpu"), flat, over_rail=False)
    with pytest.raises(NotSupported, match="reduce='node' is summed on CPUs only"):
        check_support(spec, torch.device("cuda"), flat, over_rail=False)
