"""Figures that the cost model is held against: what other libraries publish of themselves, and what was measured here.

Others' gigabytes per second are turned into times: rows of one rank's tokens, counted as the source counts them, over
its rate. DeepEP's "bottleneck bandwidth" counts rows to the sender's own node or rank, too: with two nodes, 90 GB/s
"RDMA" are 45 over the NIC. A fitted row is one that a constant of its method was set by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from crossdock import Bf16, Compact, Expanded, Fp8, Padded, Spec, Topology, cost
from crossdock.layout import Layout

Op = Literal["dispatch", "combine"]
_WIRES = {"bf16": Bf16(), "FP8": Fp8()}
_US = 1e-6


class Chip(NamedTuple):
    """GB/s of a GPU, each way: stated of its scale-up links, and of its part of the NICs; and GPUs of a node."""

    link: float
    nic: float
    node: int = 8


H800, H100, B200 = Chip(160, 50), Chip(450, 50), Chip(900, 50)
MI300X, GB200, H200 = Chip(448, 50), Chip(900, 50, 64), Chip(450, 50)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure, and what the model needs to predict it."""

    group: str
    case: str
    op: Op
    spec: Spec
    topology: Topology
    rows: cost.Rows
    method: cost.Method
    measured_s: float
    num_sms: int | None = None
    expand: Literal["sender", "receiver"] | None = None
    is_fitted: bool = False

    @property
    def prediction(self) -> cost.Prediction:
        """The call, by the model."""
        return cost.predict(
            self.op, self.spec, self.topology, self.rows, method=self.method, num_sms=self.num_sms, expand=self.expand
        )

    @property
    def error(self) -> float:
        """Predicted over measured time, less 1."""
        return self.prediction.seconds / self.measured_s - 1


def row(  # noqa: PLR0913 - the columns of a table
    group: str,
    case: str,
    op: Op,
    chip: Chip,
    *,
    ranks: int,
    tokens: int,
    wire: str,
    us: float | None = None,
    gbs: float | None = None,
    counts: Literal["nodes", "ranks", "picks"] = "nodes",
    method: cost.Method = cost.TWO_HOPS,
    layout: Layout | None = None,
    reduce: Literal["token", "rank", "node"] = "node",
    experts: int = 256,
    nodes_per_token: int | None = None,
    num_sms: int | None = None,
    expand: Literal["sender", "receiver"] | None = None,
    fitted: bool = False,
) -> Row:
    """A row of hidden 7168 and top-8, from a time or from a rate of rows that are counted by nodes, ranks or picks."""
    spec = Spec(
        num_experts=experts, num_topk=8, hidden=7168, max_tokens=tokens, wire=_WIRES[wire],
        layout=layout or Compact(), reduce=reduce,
    )  # fmt: skip
    topology = Topology(
        num_ranks=ranks,
        scale_up=min(ranks, chip.node),
        link_bandwidth=chip.link * 1e9,
        nic_bandwidth=chip.nic * 1e9,
    )
    rows = (
        cost.uniform_rows(spec, topology)
        if nodes_per_token is None
        else cost.group_limited_rows(spec, topology, num_topk_groups=nodes_per_token)
    )
    row_bytes = spec.row_bytes() if op == "dispatch" else 7168 * 2
    measured_s = us * _US if us is not None else tokens * row_bytes * getattr(rows, counts) / ((gbs or 0) * 1e9)
    return Row(
        group=group, case=case, op=op, spec=spec, topology=topology, rows=rows, method=method, measured_s=measured_s,
        num_sms=num_sms, expand=expand, is_fitted=fitted,
    )  # fmt: skip


def deepep_v1() -> Iterator[Row]:
    """Its README (H800, normal and low-latency kernels)."""
    group = "DeepEP V1"
    for ranks, dispatch, combine in ((8, 153, 158), (16, 43, 43), (32, 58, 57), (64, 51, 50)):
        common = {"ranks": ranks, "tokens": 4096, "nodes_per_token": 4, "num_sms": 24}
        counts = "ranks" if ranks == 8 else "nodes"
        case = f"H800, {ranks} ranks, 4096 tokens, 4 groups, 24 SMs"
        fitted = ranks == 8
        yield row(group, case, "dispatch", H800, wire="FP8", gbs=dispatch, counts=counts, fitted=fitted, **common)
        yield row(group, case, "combine", H800, wire="bf16", gbs=combine, counts=counts, **common)
    for ranks, dispatch, combine in (
        (8, 77, 114), (16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)
    ):  # fmt: skip
        common = {"ranks": ranks, "tokens": 128, "experts": 288 if 288 % ranks == 0 else 256}
        common |= {"method": cost.LOW_LATENCY, "layout": Padded(), "reduce": "token"}
        case = f"H800, {ranks} ranks, 128 tokens, low latency"
        yield row(group, case, "dispatch", H800, wire="FP8", us=dispatch, fitted=ranks in (32, 64), **common)
        yield row(group, case, "combine", H800, wire="bf16", us=combine, **common)


def deepep_v2() -> Iterator[Row]:
    """Its README; 8192 tokens of a rank."""
    group = "DeepEP V2"
    for name, chip, ranks, sms, dispatch, combine in (
        ("SM90, CX7", H100, 16, 12, 90, 81),
        ("SM90, CX7", H100, 32, 6, 61, 61),
        ("SM100, CX7", B200, 16, 12, 90, 91),
        ("SM100", B200, 8, 64, 726, 740),
        ("SM100", B200, 8, 24, 643, 675),
    ):
        common = {"ranks": ranks, "tokens": 8192, "num_sms": sms, "counts": "ranks" if ranks == 8 else "nodes"}
        case = f"{name}, {ranks} ranks, 8192 tokens, {sms} SMs"
        yield row(group, case, "dispatch", chip, wire="FP8", gbs=dispatch, fitted=chip is H100, **common)
        # Its combine pushes: outputs are stored over the links, as rows are.
        pushes = replace(cost.TWO_HOPS, load_bandwidth=cost.SM_BANDWIDTH)
        yield row(group, case, "combine", chip, wire="bf16", gbs=combine, method=pushes, **common)


def many_tokens() -> Iterator[Row]:
    """Hybrid-EP and UCCL-EP, 4096 tokens of a rank: what their pages say."""
    for wire, op, gbs in (("FP8", "dispatch", 410), ("bf16", "dispatch", 536), ("bf16", "combine", 531)):
        case = "B200, 8 ranks, 4096 tokens, 16 SMs, torch API"
        yield row(
            "Hybrid-EP", case, op, B200, ranks=8, tokens=4096, wire=wire, gbs=gbs, counts="ranks", num_sms=16
        )  # fmt: skip
    for sms, rates in ((4, (34, 44, 52)), (8, (62, 77, 68))):
        for (wire, op), gbs in zip(
            (("FP8", "dispatch"), ("bf16", "dispatch"), ("bf16", "combine")), rates, strict=True
        ):
            case = f"H100, 16 ranks, 4096 tokens, {sms} SMs, kernel only"
            yield row("Hybrid-EP", case, op, H100, ranks=16, tokens=4096, wire=wire, gbs=gbs, num_sms=sms)
    for op, wire, gbs in (("dispatch", "FP8", 50), ("combine", "bf16", 18)):
        yield row("UCCL-EP", "H200 and EFA, 16 ranks, 4096 tokens", op, H200, ranks=16, tokens=4096, wire=wire, gbs=gbs)


def few_tokens() -> Iterator[Row]:
    """UCCL-EP, pplx-garden, MORI, TensorRT-LLM, NCCL EP, Triton-distributed, 128 tokens: what their pages say."""
    per_pick = {"tokens": 128, "method": cost.LOW_LATENCY, "layout": Padded(), "reduce": "token"}
    for name, chip, figures in (
        ("UCCL-EP", MI300X, ((8, 65, 92), (16, 136, 207))),
        ("pplx-garden", H100, ((16, 110, 186), (64, 188, 309))),
        ("Triton-distributed", H800, ((32, 137, None),)),
    ):
        for ranks, *both in figures:
            case = f"{'MI300X' if chip is MI300X else 'H800' if chip is H800 else 'CX7'}, {ranks} ranks, 128 tokens"
            for op, wire, us in zip(("dispatch", "combine"), ("FP8", "bf16"), both, strict=True):
                if us is not None:
                    yield row(name, case, op, chip, ranks=ranks, wire=wire, us=us, **per_pick)
    yield row("DeepEP V1", "H800, 32 ranks, 128 tokens, by Triton-distributed", "dispatch", H800, ranks=32, wire="FP8",
              us=182, **per_pick)  # fmt: skip
    for ranks, dispatch, combine in ((8, 31, 36), (16, 84, 108), (32, 152, 187)):
        for op, wire, us in (("dispatch", "FP8", dispatch), ("combine", "bf16", combine)):
            yield row(
                "MORI", f"MI355X, {ranks} ranks, 128 tokens", op, MI300X, ranks=ranks, tokens=128, wire=wire, us=us
            )
    one_sided = replace(cost.TWO_HOPS, name="one-sided, 20 us", fixed_s=20 * _US)
    for ranks, dispatch, combine in ((8, 31.7, 38.1), (64, 41.6, 44.5)):
        for op, us in (("dispatch", dispatch), ("combine", combine)):
            yield row(
                "TensorRT-LLM", f"GB200, {ranks} ranks, 128 tokens, one-sided", op, GB200, ranks=ranks, tokens=128,
                wire="bf16", us=us, method=one_sided, fitted=ranks == 8 and op == "dispatch",
            )  # fmt: skip
    for ranks, dispatch, combine in ((8, 224, 185), (64, 49, 44)):
        for op, gbs in (("dispatch", dispatch), ("combine", combine)):
            yield row("NCCL EP", f"H100, {ranks} ranks, 128 tokens, low latency", op, H100, ranks=ranks, wire="bf16",
                      gbs=gbs, counts="picks", **per_pick)  # fmt: skip


def two_gpus() -> Iterator[Row]:
    """Crossdock on two H200 that 18 NVLinks join, in CUDA graphs; docs/performance.md."""
    group = "Crossdock, two H200"
    rank = {"ranks": 2, "reduce": "rank"}
    for what, op, wire, sms, us in (
        ("", "dispatch", "bf16", 8, 313),
        ("", "dispatch", "bf16", 16, 203),
        ("", "dispatch", "bf16", 32, 202),
        ("", "dispatch", "bf16", 132, 171),
        ("", "combine", "bf16", 16, 258),
        ("", "combine", "bf16", 24, 201),
        ("", "combine", "bf16", 32, 192),
        ("", "combine", "bf16", 132, 185),
        (", rows quantised before", "dispatch", "FP8", 16, 118),
        (", rows quantised before", "dispatch", "FP8", 132, 94),
    ):
        case = f"2 ranks, 4096 tokens, {sms} SMs{what}"
        fitted = (op, sms) in (("dispatch", 8), ("combine", 16))
        yield row(group, case, op, H200, tokens=4096, wire=wire, us=us, num_sms=sms, fitted=fitted, **rank)
    expanded = {"layout": Expanded(), "expand": "receiver", "ranks": 2, "reduce": "token", "num_sms": 16}
    for op, us in (("dispatch", 726), ("combine", 999)):
        case = "2 ranks, 4096 tokens, 16 SMs, Expanded"
        yield row(group, case, op, H200, tokens=4096, wire="bf16", us=us, **expanded)
    for op, us in (("dispatch", 18.8), ("combine", 18.2)):
        yield row(group, "2 ranks, 128 tokens", op, H200, tokens=128, wire="bf16", us=us, num_sms=132, **rank)
    for op, us in (("dispatch", 11.0), ("combine", 8.1)):
        yield row(group, "2 ranks, 1 token", op, H200, tokens=1, wire="bf16", us=us, fitted=op == "dispatch", **rank)


def one_gpu() -> Iterator[Row]:
    """Ranks that share one H200 under MPS, each with its part of the SMs; docs/performance.md, FACTS of prototypes."""
    for group, figures in (
        ("Crossdock, one H200", ((2, 32, 105, 94.8), (4, 32, 310, 274), (8, 16, 821, 772))),
        ("Prototype, one H200", ((2, 32, 108, 157), (4, 32, 333, 383), (8, 16, 834, 1048))),
        ("FlashInfer, one H200", ((2, 32, 121, 137), (4, 32, 328, 308), (8, 16, 828, 713))),
        ("DeepEP V2, one H200", ((2, 24, 258, 276), (4, 24, 800, 830), (8, 12, 2278, 2413))),
    ):
        for ranks, sms, *both in figures:
            for op, us in zip(("dispatch", "combine"), both, strict=True):
                yield _shared(group, op, ranks=ranks, sms=sms, us=us)
    group = "Crossdock, one H200"
    for sms, dispatch, combine in ((2, 2010, 3660), (4, 1020, 1870), (8, 523, 984), (16, 367, 526)):
        for op, us in (("dispatch", dispatch), ("combine", combine)):
            yield _shared(group, op, ranks=4, sms=sms, us=us)
    yield _shared(group, "dispatch", ranks=8, sms=16, us=438, wire="FP8", what=", rows quantised before")
    for expand, us in (("sender", 1200), ("receiver", 2450)):
        yield _shared(group, "dispatch", ranks=8, sms=16, us=us, layout=Expanded(), expand=expand,
                      what=f", Expanded, by the {expand}")  # fmt: skip
    for group, figures in (
        ("Crossdock, one H200", ((2, 32, 16.6, 16.3), (4, 32, 25.1, 25.9), (8, 16, 41.3, 43.0))),
        ("Prototype, one H200", ((2, 32, 21.7, 19.1), (4, 32, 34.2, 33.3), (8, 16, 52.6, 55.2))),
    ):
        for ranks, sms, *both in figures:
            for op, us in zip(("dispatch", "combine"), both, strict=True):
                yield _shared(group, op, ranks=ranks, sms=sms, us=us, tokens=128, wire="FP8", layout=Padded(),
                              reduce="token", expand="sender", what=", Padded")  # fmt: skip


def _shared(  # noqa: PLR0913 - the columns of a table
    group: str, op: Op, *, ranks: int, sms: int, us: float, tokens: int = 4096, wire: str = "bf16", what: str = "",
    layout: Layout | None = None, reduce: Literal["token", "rank"] = "rank",
    expand: Literal["sender", "receiver"] | None = None,
) -> Row:  # fmt: skip
    return row(
        group, f"{ranks} ranks, {tokens} tokens, {sms} SMs{what}", op, H200, ranks=ranks, tokens=tokens, wire=wire,
        us=us, num_sms=sms, method=cost.ONE_GPU, layout=layout, reduce=reduce, expand=expand,
    )  # fmt: skip


def namespaces() -> Iterator[Row]:
    """Hosts that are network namespaces, links of a known rate; a prototype of the two hops over gloo."""
    for nodes, local, mbit, groups, dispatch, combine in (
        (2, 2, 100, None, 631, 603),
        (2, 2, 1000, None, 74, 83),
        (2, 4, 100, None, 1351, 1308),
        (2, 4, 200, None, 639, 610),
        (2, 4, 1000, None, 148, 263),
        (4, 2, 200, 2, 648, 588),
        (4, 1, 200, None, 563, 541),
    ):
        link = Chip(8, mbit / 8e3 / local, local)
        limit = "" if groups is None else f", {groups} groups"
        case = f"{nodes}x{local}, 256 tokens{limit}, {mbit} Mbit/s"
        for op, ms in (("dispatch", dispatch), ("combine", combine)):
            yield row(
                "Two hops over gloo", case, op, link, ranks=nodes * local, tokens=256, wire="bf16", us=1e3 * ms,
                method=cost.SOCKETS, experts=64, nodes_per_token=groups,
            )  # fmt: skip


def hosts() -> Iterator[Row]:
    """Crossdock over hosts that are network namespaces, rows over gloo: ``crossdock bench --hosts``."""
    for nodes, local, mbit, groups, wire, dispatch, combine in (
        (2, 4, 200, None, "bf16", 703, 658),
        (2, 4, 200, None, "FP8", 358, 673),
        (2, 4, 1000, None, "bf16", 203, 146),
        (4, 2, 200, None, "bf16", 982, 1024),
        (4, 2, 200, 2, "bf16", 756, 1626),
    ):
        link = Chip(8, mbit / 8e3 / local, local)
        case = f"{nodes}x{local}, 256 tokens{'' if groups is None else f', {groups} groups'}, {mbit} Mbit/s"
        for op, ms in (("dispatch", dispatch), ("combine", combine)):
            yield row(
                "Crossdock over gloo", case, op, link, ranks=nodes * local, tokens=256, wire=wire, us=1e3 * ms,
                method=cost.SOCKETS, experts=64, nodes_per_token=groups,
            )  # fmt: skip


def all_rows() -> list[Row]:
    """Every figure."""
    return [*deepep_v1(), *deepep_v2(), *many_tokens(), *few_tokens(), *two_gpus(), *one_gpu(), *namespaces(), *hosts()]
