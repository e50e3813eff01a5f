"""What decides how kernels are launched: what was asked for, what there is, and the default between them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the CUDA backend is written in Triton: pip install triton")

from crossdock import Bf16, Compact, ConfigError, Expanded, Fp8, Fp16, Fp32, Padded, Spec, cost
from crossdock.backends.base import LaunchOptions
from crossdock.backends.cuda.config import PROGRAMS_PER_SM, LaunchConfig, _as_few, agreed_topology, decide
from crossdock.backends.cuda.sends import tiles_of
from crossdock.spec import Topology

CUDA = torch.device("cuda", 0)

NVLINK = Topology(num_ranks=8)
FAST_MEMORY = Topology(num_ranks=8, memory_bandwidth=1e15)
SLOW_MEMORY = Topology(num_ranks=8, memory_bandwidth=1e9)


def spec_of(**kwargs):
    return Spec(**{"num_experts": 256, "num_topk": 8, "hidden": 7168, "max_tokens": 4096} | kwargs)


def decided(spec=None, topology=NVLINK, visible_sms=132, ranks_here=1, **launch_options):
    return decide(
        spec or spec_of(), topology, LaunchOptions(**launch_options), visible_sms=visible_sms, ranks_here=ranks_here
    )


@pytest.mark.parametrize("bandwidth", [50e9, 450e9, 900e9])
def test_by_default_twice_the_multiprocessors_that_fill_the_link(bandwidth):
    config = decided(topology=Topology(num_ranks=8, link_bandwidth=bandwidth))
    assert config.num_sms == 2 * cost.sms_to_fill(bandwidth)
    assert config.num_load_sms == 3 * cost.sms_to_fill(bandwidth)
    assert config.rows(14336, is_counted=True).programs == config.num_sms
    assert config.sums(14336, 2).programs == config.num_load_sms
    for num_sms in (5, 132):
        asked = config.using(num_sms)
        assert (asked.num_sms, asked.num_load_sms) == (num_sms, num_sms)
    assert config.is_capped
    assert config.visible_sms == 132


@pytest.mark.parametrize(
    ("given", "num_sms"),
    [
        ({"visible_sms": 7}, 7),
        ({"visible_sms": 16, "ranks_here": 8}, 16),
        ({"visible_sms": 132, "ranks_here": 2}, 132),
        ({"num_sms": 1}, 1),
        ({"num_sms": 20}, 20),
        ({"num_sms": 20, "ranks_here": 4}, 20),
        ({"num_sms": 132}, 132),
        ({"num_sms": 1000}, 132),
        ({"num_sms": 20, "visible_sms": 8}, 8),
    ],
    ids=repr,
)
def test_multiprocessors_are_those_asked_for_as_far_as_there_are_any(given, num_sms):
    """Ranks that share a GPU take all that they see: its memory is their link."""
    config = decided(**given)
    assert config.num_sms == num_sms
    assert config.is_capped == (num_sms < config.visible_sms)


@pytest.mark.parametrize("layout", [Expanded(), Expanded(alignment=128), Padded(capacity=64)], ids=repr)
def test_the_cheaper_one_makes_copies_unless_somebody_is_asked_for(layout):
    spec = spec_of(layout=layout)
    assert decided(spec, FAST_MEMORY).expand == "receiver"
    assert decided(spec, SLOW_MEMORY).expand == "sender"
    for topology in (FAST_MEMORY, SLOW_MEMORY):
        for expand in ("sender", "receiver"):
            assert decided(spec, topology, expand=expand).expand == expand


@pytest.mark.parametrize("layout", [Compact(), Expanded(), Padded(capacity=64)], ids=repr)
def test_calls_of_few_tokens_are_one_kernel_on_all_sms(layout):
    few = spec_of(layout=layout, max_tokens=512)
    assert decided(few).is_fused
    assert decided(few).num_sms == 132
    assert "one kernel per call" in str(decided(few))
    assert not decided(replace(few, max_tokens=513)).is_fused
    assert decided(replace(few, reduce="rank")).is_fused
    if layout.per_pick:
        assert decided(few, expand="receiver").is_fused
        assert "one kernel per call and one that expands rows, link" in str(decided(few, expand="receiver"))
        assert "one kernel per call, link" in str(decided(few, expand="sender"))
        assert decided(replace(few, layout=Expanded(staged=True, capacity=4096))).expand == "receiver"
    else:
        assert not decided(few, mover="copy").is_fused
    assert decided(replace(few, wire=Fp8())).is_fused
    assert decided(replace(few, wire=Fp8(column_major=True))).is_fused


def test_the_receiver_makes_copies_of_few_rows_only_where_that_saves_more_than_a_kernel_takes():
    for reduce in ("token", "rank"):
        few = spec_of(layout=Padded(capacity=64), max_tokens=512, reduce=reduce)
        saves = [cost.predict("dispatch", few, NVLINK, expand=who).seconds for who in ("sender", "receiver")]
        assert saves[0] - saves[1] > 5e-6
        assert decided(few).expand == "receiver"
        for num_tokens in (1, 64):
            assert decided(replace(few, max_tokens=num_tokens)).expand == "sender"
        assert decided(few, agreed_topology(NVLINK, [8] * 8), ranks_here=8, visible_sms=16).expand == "sender"
        assert decided(replace(few, layout=Compact())).expand == "sender"


@pytest.mark.parametrize("num_programs", [0, 32, 4096])
def test_programs_of_a_whole_dispatch_are_enough_for_what_they_do_besides(num_programs):
    config = decided(spec_of(layout=Expanded(alignment=128, capacity=4096), max_tokens=128), num_sms=16)
    for num_tokens in (0, 1, 128):
        few, alone = (config.fused_dispatch(896, num_tokens, 8, unit=16, least=n) for n in (num_programs, 0))
        assert few.programs == max(alone.programs, 1 + min(num_programs, 16 * 3 - 1))


@pytest.mark.parametrize("num_topk", [1, 8, 32])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 128, 4096])
@pytest.mark.parametrize("num_sms", [1, 16, 132])
def test_programs_of_whole_calls_share_out_tokens_and_their_pieces(num_topk, num_tokens, num_sms):
    config = decided(spec_of(layout=Padded(), max_tokens=128), num_sms=num_sms)
    for num_words, unit in ((896, 16), (896, 1), (1, 1), (18, 3)):
        few = config.fused_dispatch(num_words, num_tokens, num_topk, unit=unit)
        assert few.piece % unit == 0
        assert few.piece // unit in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        assert 1 <= few.programs <= 1 + num_tokens * -(-num_words // few.piece)
        assert few.programs <= config.most_programs(num_topk)
        assert few.programs * few.num_warps * 32 * few.most_registers <= num_sms * 65536
        assert 1 <= few.stages(8 * 2) <= 4
    sums = config.fused_combine(7168, num_tokens, num_topk, value_bytes=2)
    assert sums.programs >= 1
    assert sums.programs * sums.num_warps * 32 * sums.most_registers <= num_sms * 65536
    pushes, copies = (
        config.fused_push(7168, num_tokens, num_topk, word_bytes=2, is_summed=is_summed) for is_summed in (True, False)
    )
    assert min(pushes.programs, copies.programs) >= 2
    assert copies.piece == 2 * pushes.piece == 2 * sums.piece
    assert pushes.programs * pushes.num_warps * 32 * pushes.most_registers <= num_sms * 65536


@pytest.mark.parametrize("num_tokens", [1, 5, 128])
@pytest.mark.parametrize("num_sms", [16, 32])
def test_where_ranks_crowd_a_gpu_programs_leave_room(num_tokens, num_sms):
    alone, crowded = (decided(spec_of(layout=Padded(), max_tokens=128), ranks_here=n, num_sms=num_sms) for n in (2, 3))
    assert (crowded.is_crowded, alone.is_crowded) == (True, False)
    ours, theirs = (config.fused_dispatch(896, num_tokens, 8, unit=16) for config in (crowded, alone))
    assert (ours.programs, ours.piece) == (theirs.programs, theirs.piece)
    assert ours.num_warps * 32 * ours.most_registers * 4 <= 65536 < theirs.num_warps * 32 * theirs.most_registers * 4
    programs = crowded.fused_combine(7168, num_tokens, 8, value_bytes=2).programs
    assert programs == 8 * num_sms or programs <= 6 * num_sms


@given(num_pieces=st.integers(0, 5000), most=st.integers(1, 5000))
def test_whole_calls_take_no_more_programs_than_end_as_soon(num_pieces, most):
    def rounds(programs):
        return -(-num_pieces // programs) if programs else 0

    few = _as_few(num_pieces, most)
    assert few <= most
    assert rounds(few) == rounds(most)
    assert few <= 1 or rounds(few - 1) > rounds(most)


FITS = {
    "bf16, of 16 bytes": {"hidden": 8},
    "bf16 into fp32": {"hidden": 24, "combine_wire": Fp32()},
    "fp8, of 16 bytes": {"hidden": 16, "wire": Fp8(block=16)},
    "fp8, as long as an output": {"hidden": 16, "wire": Fp8(block=4), "combine_wire": Fp16()},
    "packed": {"hidden": 48, "wire": Fp8(block=4, scale="ue8m0", packed=True)},
}
DOES_NOT_FIT = {
    "outputs are narrower": {"wire": Fp32(), "combine_wire": Bf16()},
    "scales have no room": {"hidden": 64, "wire": Fp8(block=2)},
    "fp8 of 24 bytes": {"hidden": 24, "wire": Fp8(block=8)},
    "bf16 of 8 bytes": {"hidden": 4},
    "fp32 of 40 bytes": {"hidden": 10, "wire": Fp32()},
}


@pytest.mark.parametrize("kwargs", FITS.values(), ids=FITS)
def test_the_receiver_makes_copies_where_rows_fit_into_outputs(kwargs):
    assert decided(spec_of(layout=Expanded(), **kwargs), FAST_MEMORY).expand == "receiver"


@pytest.mark.parametrize("kwargs", DOES_NOT_FIT.values(), ids=DOES_NOT_FIT)
def test_the_receiver_is_refused_where_rows_do_not_fit_into_outputs(kwargs):
    spec = spec_of(layout=Expanded(), **kwargs)
    assert decided(spec, FAST_MEMORY).expand == "sender"
    assert decided(spec, FAST_MEMORY, expand="sender").expand == "sender"
    with pytest.raises(ConfigError) as raised:
        LaunchOptions(expand="receiver").check(spec, CUDA)
    text = str(raised.value)
    assert text.startswith("expand='receiver' copies rows where they arrive")
    for part in (str(spec.wire), str(spec.combine_dtype), "multiples of 16 bytes", "pass expand=None"):
        assert part in text


def test_the_receiver_is_refused_where_there_are_no_copies():
    assert decided(spec_of(layout=Compact()), FAST_MEMORY).expand == "sender"
    with pytest.raises(ConfigError, match=r"Compact\(capacity=None\) has no copies.*pass expand=None"):
        LaunchOptions(expand="receiver").check(spec_of(layout=Compact()), CUDA)


ROW_BYTES = [2, 16, 48, 1024, 2048, 14336, 16384, 28672, 100_000]


def check_pieces(shape, row_bytes, *, most_bytes, at_once):
    """Pieces are of a row at most, and as many rows as fit are moved at once, up to 32."""
    assert shape.piece_bytes & (shape.piece_bytes - 1) == 0
    assert min(row_bytes, most_bytes) <= shape.piece_bytes < 2 * row_bytes
    assert shape.piece_bytes <= most_bytes
    assert shape.num_rows == min(32, at_once // shape.piece_bytes)


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("is_counted", [False, True])
def test_few_multiprocessors_get_one_unquantized_program_each(row_bytes, is_counted):
    """A warp moves a piece of a row by an instruction, eight at a time at most, and half of the row in a share."""
    config = decided(num_sms=5)
    shape = config.rows(row_bytes, is_counted=is_counted)
    assert (shape.programs, shape.num_warps, shape.parts, shape.at_once) == (5, 32, 2, 8)
    assert shape.piece_bytes == min(512, 1 << (row_bytes - 1).bit_length())
    assert shape.num_rows == min(256, 32 * 512 // shape.piece_bytes)
    one = config.pieces(row_bytes, is_counted=is_counted)
    assert (one.programs, one.num_warps, one.num_rows) == (5, 32, 1)
    assert one.piece_bytes == min(16384, 1 << (row_bytes - 1).bit_length())


@pytest.mark.parametrize(
    ("num_ranks", "num_sms", "own"),
    [(2, 1, 0), (2, 2, 1), (2, 16, 8), (2, 24, 11), (2, 48, 11), (8, 16, 2), (8, 4, 1), (64, 16, 1), (1, 16, 0)],
)
def test_some_programs_copy_what_stays_here_and_are_not_last(num_ranks, num_sms, own):
    config = decided(topology=Topology(num_ranks=num_ranks), num_sms=num_sms)
    assert config.rows(14336, is_counted=True).own_programs == own
    assert decided(topology=Topology(num_ranks=num_ranks), num_sms=num_sms, ranks_here=2).rows(
        14336, is_counted=True
    ).own_programs == 0  # fmt: skip


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
@pytest.mark.parametrize("word_bytes", [1, 2, 8])
@pytest.mark.parametrize("num_sms", [5, 132])
def test_tiles_have_every_word_of_a_row_once(row_bytes, word_bytes, num_sms):
    config = decided(num_sms=num_sms)
    shapes = [config.rows(row_bytes, is_counted=True), config.pieces(row_bytes, is_counted=False)]
    for shape in (*shapes, config.sums(row_bytes, 8), config.sums(row_bytes, 3)):
        tiles, num_words = tiles_of(shape, row_bytes, word_bytes), max(1, row_bytes // word_bytes)
        assert num_words <= tiles.PARTS * tiles.PIECES * tiles.PIECE
        assert num_words + (tiles.PARTS - 1) * tiles.PIECE > (tiles.PARTS * tiles.PIECES - 1) * tiles.PIECE
        assert 1 <= tiles.AT_ONCE <= min(tiles.PIECES, 8)
        assert -(-tiles.PIECES // tiles.AT_ONCE) * (tiles.AT_ONCE - 1) < tiles.PIECES


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_all_multiprocessors_get_narrow_programs(row_bytes):
    """One for each piece, or, where only the device knows how many there are, a few for each SM."""
    config = decided(visible_sms=33, ranks_here=4)
    counted, uncounted = (config.rows(row_bytes, is_counted=is_counted) for is_counted in (True, False))
    assert (counted.programs, counted.num_warps) == (None, 2)
    assert (uncounted.programs, uncounted.num_warps) == (33 * PROGRAMS_PER_SM, 1)
    check_pieces(counted, row_bytes, most_bytes=4096, at_once=4096)
    check_pieces(uncounted, row_bytes, most_bytes=2048, at_once=2048)


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_sums_of_more_rows_get_wider_programs(row_bytes):
    few, many = (decided(visible_sms=33, ranks_here=4).sums(row_bytes, num_rows) for num_rows in (4, 5))
    assert (few.programs, few.num_warps) == (None, 1)
    assert (many.programs, many.num_warps) == (None, 2)
    check_pieces(few, row_bytes, most_bytes=2048, at_once=2048)
    check_pieces(many, row_bytes, most_bytes=4096, at_once=4096)
    capped = decided(num_sms=5)
    for num_rows in (1, 2, 5, 64):
        shape, rows = capped.sums(row_bytes, num_rows), capped.rows(row_bytes, is_counted=True)
        assert replace(shape, at_once=rows.at_once, own_programs=rows.own_programs) == rows
        assert shape.at_once == max(1, 8 // num_rows)


def test_it_is_a_value():
    config = decided(num_sms=5, mover="copy")
    assert config == decided(num_sms=5, mover="copy")
    assert config != replace(config, num_sms=6)
    assert config.mover == "copy"
    assert len({config, decided(num_sms=5, mover="copy"), decided()}) == 2


def test_it_prints_on_one_line_what_was_decided_and_from_what():
    config = LaunchConfig(
        num_sms=8, num_load_sms=8, visible_sms=66, expand="receiver", mover="kernel",
        topology=Topology(num_ranks=2, link_bandwidth=1.5e12, memory_bandwidth=2e12),
    )  # fmt: skip
    assert str(config) == (
        "LaunchConfig(num_sms=8 of 66, expand='receiver', mover='kernel', link 1500 GB/s, memory 2000 GB/s)"
    )
    assert str(replace(config, num_load_sms=12)).startswith("LaunchConfig(num_sms=8 to store and 12 to load of 66, ")


@pytest.mark.parametrize("layout", [Compact(), Expanded(alignment=128, capacity=65536), Padded()], ids=repr)
@pytest.mark.parametrize("ranks_on_gpus", [[2, 2, 1, 3, 3, 3, 2, 2], [4] * 8, [8] * 8, [1] * 8], ids=str)
def test_what_peers_rely_on_is_the_same_on_ranks_with_other_facts(layout, ranks_on_gpus):
    """Ranks that share a GPU, and ranks that do not, with other numbers of SMs, decide alike."""
    topology = agreed_topology(NVLINK, ranks_on_gpus)
    configs = [
        decided(spec_of(layout=layout), topology, visible_sms=132 // ranks_here, ranks_here=ranks_here)
        for ranks_here in ranks_on_gpus
    ]
    assert len({(config.expand, config.mover, config.is_fused, config.topology) for config in configs}) == 1
    assert len({config.visible_sms for config in configs}) == len(set(ranks_on_gpus))


def test_one_gpu_that_holds_all_ranks_is_their_link():
    shared = agreed_topology(NVLINK, [8] * 8)
    assert shared.memory_bandwidth == NVLINK.memory_bandwidth / 8
    assert shared.link_bandwidth == 0.75 * shared.memory_bandwidth
    assert agreed_topology(NVLINK, [4] * 8) == NVLINK
