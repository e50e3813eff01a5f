"""What Spec and Topology refuse, and the sizes that follow from them."""

import pickle

import numpy as np
import pytest
import torch

from crossdock import Bf16, CapacityError, Compact, ConfigError, Expanded, Fp8, Fp32, Opaque, Padded, Spec, Topology
from crossdock.extent import Extent
from crossdock.plan import check_capacity, local_counts


def spec_of(**kwargs):
    return Spec(**({"num_experts": 256, "num_topk": 8, "hidden": 7168, "max_tokens": 4096} | kwargs))


def test_a_large_worst_case_is_refused_with_what_to_pass():
    with pytest.raises(ConfigError) as raised:
        spec_of(layout=Expanded(alignment=128)).capacity(64)
    # 64 * 4096 * min(8, 4) + 4 * 127 rows, up to a multiple of 128; each 7168 bfloat16.
    assert str(raised.value) == (
        "Expanded(capacity=None, alignment=128, staged=False) has a worst case of 1049088 rows, 14.0 GiB for each "
        "receive slot; the default stops at 2 GiB: pass capacity= with the rows you want room for (a call that needs "
        "more raises CapacityError on all ranks), or capacity=1049088 to have the worst case all the same, or "
        "staged=True to have rows in a tensor of your own, exactly as many as came"
    )
    assert spec_of(layout=Expanded(alignment=128, staged=True)).capacity(64) == 1049088


def test_a_large_worst_case_can_be_had_by_naming_it():
    assert spec_of(layout=Expanded(capacity=1049088, alignment=128)).capacity(64) == 1049088
    assert spec_of(layout=Compact(capacity=10**9)).capacity(64) == 64 * 4096  # no routing needs more


def test_the_limit_is_on_bytes_of_all_segments():
    # 32 local experts of 8 * 4096 rows of 7168 bytes and 56 scales: 7 GiB, though one expert's rows are a 32nd of it.
    with pytest.raises(ConfigError, match=r"worst case of 32768 rows per expert, 7\.2 GiB"):
        spec_of(layout=Padded(), wire=Fp8()).num_slot_rows(8)
    assert spec_of(layout=Padded(capacity=500), wire=Fp8()).num_slot_rows(8) == 32 * 500
    assert spec_of(layout=Compact(), wire=Fp8()).num_slot_rows(8) == 8 * 4096


def test_row_bytes_counts_data_and_scales():
    assert spec_of().row_bytes() == 14336
    assert spec_of(wire=Fp8()).row_bytes() == 7168 + 4 * 56
    assert spec_of(wire=Fp8(scale="ue8m0")).row_bytes() == 7168 + 56
    assert spec_of(wire=Fp8(block=256, scale="ue8m0", packed=True)).row_bytes() == 7168 + 4 * 7
    nvfp4 = Opaque(values_per_element=2, block=16, scale_dtype=torch.float8_e4m3fn)
    assert spec_of(wire=nvfp4).row_bytes() == 7168 // 2 + 7168 // 16
    assert spec_of(wire=Opaque(block=128, scale_dtype=torch.int32), hidden=2880).row_bytes() == 2880 + 4 * 23


@pytest.mark.parametrize(
    ("kwargs", "want"),
    [
        ({}, torch.bfloat16),
        ({"wire": Fp32()}, torch.float32),
        ({"wire": Fp8()}, torch.bfloat16),
        ({"wire": Fp8(), "combine_wire": Fp32()}, torch.float32),
        ({"wire": Opaque(dtype=torch.float16)}, torch.bfloat16),
        ({"wire": Fp32(), "combine_wire": Bf16()}, torch.bfloat16),
    ],
)
def test_rows_go_home_unquantized(kwargs, want):
    assert spec_of(**kwargs).combine_dtype == want


def test_capacity_error_names_place_need_and_remedy():
    spec = Spec(num_experts=8, num_topk=2, hidden=8, max_tokens=4, layout=Padded(capacity=3))
    topology = Topology(num_ranks=2)
    counts = torch.stack([local_counts(spec, topology, torch.tensor([[5, 1], [5, 0]])) for _ in range(2)])
    with pytest.raises(CapacityError) as raised:
        check_capacity(Extent.of(spec, topology.num_ranks), topology, counts)
    assert str(raised.value) == (
        "4 rows were routed to rank 1, local expert 1, whose capacity is 3; no row was moved: pass Padded(capacity=4) "
        "or more in the Spec, or route less"
    )


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_experts": 0}, "num_experts=0; pass a positive integer"),
        ({"num_experts": 8.0}, "num_experts=8.0; pass a positive integer"),
        ({"wire": "fp8"}, "wire='fp8' is no Wire; pass one such as Bf16"),
        ({"layout": Compact}, "layout=<class .*> is no Layout; pass one such as"),
        ({"hidden": -1}, "hidden=-1; pass a positive integer"),
        ({"num_topk": 257}, "num_topk=257 picks of num_experts=256; picks are distinct"),
        ({"max_tokens": 2**21}, "max_tokens . num_topk = 16777216 rows of one rank; .* at most 16777215"),
        ({"reduce": "host"}, "reduce='host' is not a place to sum at; pass 'token', 'rank' or 'node'"),
        ({"combine_wire": Fp8()}, "cannot be summed; pass an unquantized one: Bf16"),
        ({"extra_bytes": -1}, "extra_bytes=-1; pass 0 or the bytes"),
        ({"num_slots": 0}, "num_slots=0 receive slots; pass 1 to 6"),
        ({"num_slots": 7}, "num_slots=7 receive slots; pass 1 to 6"),
        ({"num_slots": "2"}, "num_slots='2' receive slots; pass 1 to 6"),
        ({"extra_bytes": None}, "extra_bytes=None; pass 0 or the bytes"),
        ({"hidden": True}, "hidden=True; pass a positive integer"),
        ({"combine_wire": 0}, "combine_wire=0 is no Wire; pass one such as Fp32"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        spec_of(**kwargs)


def test_experts_are_the_same_number_on_every_rank():
    with pytest.raises(
        ConfigError,
        match=r"^num_experts=250 is not divisible by num_ranks=8; pass a multiple of 8: 256, with 6 experts",
    ):
        spec_of(num_experts=250).num_local_experts(8)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_ranks": 0}, "num_ranks=0; a group"),
        ({"num_ranks": 4.0}, "num_ranks=4.0; a group"),
        ({"num_ranks": 6, "scale_up": 4}, "not divisible by scale_up=4"),
        ({"num_ranks": 6, "scale_up": 1.5}, "scale_up=1.5; pass the ranks of a scale-up domain, or None"),
        (
            {"num_ranks": 6, "link_bandwidth": "450e9"},
            "link_bandwidth='450e9' bytes per second; pass a positive, finite number",
        ),
    ],
)
def test_a_topology_that_cannot_be_is_refused(kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Topology(**kwargs)


def test_specs_are_values():
    spec = spec_of(wire=Fp8(block=64), layout=Expanded(alignment=8))
    again = pickle.loads(pickle.dumps(spec))  # noqa: S301 - our own
    assert again == spec
    assert hash(again) == hash(spec)
    assert "\n" not in repr(spec)
    numpys = spec_of(hidden=np.int64(7168), wire=Fp8(block=np.int32(64)), layout=Expanded(alignment=np.int16(8)))
    assert repr(numpys) == repr(spec)  # of which ranks compare a checksum
    assert eval(repr(spec)) == spec  # noqa: S307 - what it prints is what one would type
    assert spec.differences(spec_of(wire=Fp8(block=32), layout=Expanded(alignment=8), num_slots=3)) == [
        f"wire: {Fp8(block=64)!r} != {Fp8(block=32)!r}",
        "num_slots: 2 != 3",
    ]
