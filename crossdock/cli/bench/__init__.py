"""``crossdock bench``: times dispatch and combine between ranks of this host, beside all-to-all and the limit."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from crossdock.cli.bench.config import LAYOUTS, WIRES, Config, Job, make_job
from crossdock.cli.bench.cuda_measure import measure_on_gpus
from crossdock.cli.bench.figures import figures, limits_of
from crossdock.cli.bench.host_figures import HostFigure, host_figures
from crossdock.cli.bench.measure import measure
from crossdock.cli.bench.outcome import BASELINES, Outcome
from crossdock.cli.bench.over_hosts import HostsConfig, make_hosts_job, measure_over_hosts
from crossdock.cli.device import add_device_option, choose_device, gpus_for
from crossdock.cli.hosts import parse_grid, run_hosts
from crossdock.cli.machine import this_machine
from crossdock.cli.options import HelpFormatter, check_extras, check_left_out, keep_defaults, numbers, open_to_write
from crossdock.cli.world import run_world
from crossdock.errors import ConfigError

_WITHOUT_HOSTS = sorted({*Config.__dataclass_fields__, "plot"} - set(HostsConfig.__dataclass_fields__))


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the ``bench`` command."""
    parser = commands.add_parser(
        "bench",
        help="time dispatch and combine on this machine",
        description="Times dispatch and combine among ranks of this host, on its GPUs or on CPUs, beside the same "
        "exchange by all_to_all_single and beside the machine's own bandwidth. Rows are compared with those of an "
        "exchange over gloo, bit for bit, before anything is timed.",
        formatter_class=HelpFormatter,
    )
    add_device_option(parser)
    parser.add_argument("--ranks", type=int, default=4, help="processes to start; not with --hosts")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each rank")
    parser.add_argument("--hidden", type=int, default=7168, help="values per token")
    parser.add_argument("--experts", type=int, default=64, help="experts of all ranks together")
    parser.add_argument("--topk", type=int, default=8, help="experts per token")
    parser.add_argument("--wire", choices=WIRES, default="bf16", help="format of dispatched rows")
    parser.add_argument("--layout", choices=LAYOUTS, default="compact", help="layout of received rows")
    parser.add_argument("--alignment", type=int, default=1, help="of each expert's rows, of expanded ones")
    parser.add_argument("--reduce", choices=("token", "rank"), default="token", help="where picks are summed first")
    parser.add_argument("--load", default="uniform", help="uniform, zipf, hot, or an .npy FILE of recorded picks")
    parser.add_argument("--seed", type=int, default=0, help="of picks and values")
    parser.add_argument(
        "--repeats",
        type=int,
        default=None,
        help="timed calls of each operation, 20, with --hosts 5; on CUDA of ten",
    )
    parser.add_argument(
        "--baseline", choices=BASELINES, default="fresh", help="gloo into new tensors, or into buffers that are kept"
    )
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append one JSON line per operation")
    hosts = parser.add_argument_group("over hosts that are network namespaces of this machine (root and iproute2)")
    hosts.add_argument("--hosts", default=None, metavar="NxU", help="hosts and ranks on each, such as 2x4")
    hosts.add_argument("--rate", default="200mbit", help="of each host's link, each way, as tc writes it")
    hosts.add_argument("--rail", choices=("dist", "nixl"), default="dist", help="what sends rows between hosts")
    hosts.add_argument(
        "--topk-groups", type=int, default=None, help="also with a gate that picks from so many hosts' experts"
    )
    cuda = parser.add_argument_group("on CUDA")
    cuda.add_argument("--num-sms", type=int, default=None, help="SMs that each rank's calls use")
    cuda.add_argument("--expand", choices=("sender", "receiver"), default=None, help="who makes a row per pick")
    cuda.add_argument("--mover", choices=("kernel", "copy"), default=None, help="what moves compact rows")
    cuda.add_argument("--mps-percentage", type=float, default=None, help="of a shared GPU's SMs, what each rank sees")
    cuda.add_argument(
        "--sweep-sms", type=numbers, default=(), metavar="N,N,...", help="also time other numbers of SMs, a line each"
    )
    cuda.add_argument("--plot", type=Path, default=None, metavar="FILE", help="draw the sweep into an HTML file")
    keep_defaults(parser, run)


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes JSON lines and plot if asked to.

    Raises:
        ConfigError: the arguments do not fit together, or a file cannot be written.
        BackendUnavailable: rich (or, for a plot, plotly or jinja2) is not installed, or there is no GPU.
        CrossdockError: a rank failed, or an operation gave wrong rows.
    """
    check_extras("the command line", *(("rich",) if args.plot is None else ()))
    from crossdock.cli.bench import report  # noqa: PLC0415 - it imports rich, which is an extra

    if args.hosts is not None:
        check_left_out(args, _WITHOUT_HOSTS, "with --hosts, where it means nothing; leave it out", allowed=("cpu",))
        _run_over_hosts(args)
        return
    check_left_out(args, ("rate", "rail", "topk_groups"), "is of hosts; pass --hosts with it, such as --hosts 2x4")
    config = make_config(args)
    for path, option in ((args.json, "json"), (args.plot, "plot")):
        if path is not None:
            open_to_write(path, option).close()
    outcome = bench(config, make_job(config))
    report.print_outcome(outcome)
    if args.json is not None:
        with open_to_write(args.json, "json") as file:
            file.writelines(line + "\n" for line in outcome.json_lines())
    if args.plot is not None:
        from crossdock.cli.bench.chart import sweep_page  # noqa: PLC0415 - it imports plotly, which is an extra

        with open_to_write(args.plot, "plot", "w") as file:
            file.write(sweep_page(outcome))


def _run_over_hosts(args: argparse.Namespace) -> None:
    from crossdock.cli.bench import hosts_report  # noqa: PLC0415 - it imports rich, which is an extra

    values = {name: getattr(args, name) for name in HostsConfig.__dataclass_fields__}
    config = HostsConfig(**{**values, "repeats": 5 if args.repeats is None else args.repeats})
    if args.json is not None:
        open_to_write(args.json, "json").close()
    measured, machine = bench_over_hosts(config), this_machine(with_gpu=False)
    hosts_report.print_hosts(config, measured, machine)
    if args.json is not None:
        with open_to_write(args.json, "json") as file:
            file.writelines(line + "\n" for line in hosts_report.json_lines(config, measured, machine))


def bench_over_hosts(config: HostsConfig) -> list[HostFigure]:
    """Makes the hosts, and measures; shows a bar meanwhile.

    Raises:
        CrossdockError: a rank failed, an operation gave wrong rows, or there can be no network namespaces here.
    """
    from crossdock.cli.bench import report  # noqa: PLC0415 - it imports rich, which is an extra

    job = make_hosts_job(config)
    with report.progress_bar() as show:
        grid = parse_grid(config.hosts)
        ranks = run_hosts(measure_over_hosts, job, grid=grid, rate=config.rate, on_progress=show)
    return host_figures(job, ranks)


def bench(config: Config, job: Job) -> Outcome:
    """Starts the ranks, and measures; shows a bar meanwhile.

    Raises:
        CrossdockError: a rank failed, or an operation gave wrong rows.
    """
    from crossdock.cli.bench import report  # noqa: PLC0415 - it imports rich, which is an extra

    device = torch.device(config.device)
    with (
        report.progress_bar() as show,
        gpus_for(device, config.ranks, percentage=config.mps_percentage) as gpus,
    ):
        program = measure if gpus is None else measure_on_gpus
        ranks = run_world(program, job, num_ranks=config.ranks, on_progress=show, gpus=gpus)
    limit = limits_of(ranks)
    return Outcome(
        config=config,
        figures=figures([rank.samples for rank in ranks], limit),
        sweep=figures([rank.sweep for rank in ranks], limit),
        limits=limit,
        machine=this_machine(with_gpu=config.device == "cuda"),
        gpu=ranks[0].gpu,
        sharing=None if gpus is None else gpus.sharing,
    )


def make_config(args: argparse.Namespace) -> Config:
    """The run's configuration from the arguments, with ``--device auto`` resolved.

    Raises:
        ConfigError: a plot was asked for without a sweep.
    """
    if args.plot is not None and not args.sweep_sms:
        raise ConfigError(f"plot={args.plot} shows a sweep; pass --sweep-sms 2,4,8,16 with it")
    values = {name: getattr(args, name) for name in Config.__dataclass_fields__}
    repeats = 20 if args.repeats is None else args.repeats
    return Config(**{**values, "device": choose_device(args.device).type, "repeats": repeats})
