import json
import sys
from dataclasses import replace

import pytest

from crossdock.cli import doctor, main
from crossdock.cli.doctor import examine, show
from crossdock.cli.doctor.facts import Fact, Links, RankFacts, Report, RoundTrip, Section, check_needs
from crossdock.cli.doctor.host import network
from crossdock.errors import BackendUnavailable, ConfigError
from crossdock.transport import shm
from tests.child import run_child


@pytest.fixture(scope="module")
def report():
    return examine(together=False)


def with_trip(report, trip):
    ranks = [RankFacts(rank=r, host="a", device="cpu", versions={}, namespaces={"mnt": str(r)}) for r in range(2)]
    return replace(report, ranks=tuple(ranks), round_trips=(trip,))


def test_what_the_suite_runs_on_is_found(report):
    facts = report.facts()
    for name in ("crossdock", "python", "torch", "gloo", "shm", "atomics", "network"):
        assert facts[name].state == "ok", facts[name]
    check_needs(report, ["torch", "shm"])


def test_a_need_that_is_missing_is_an_error_with_the_remedy(report):
    section = Section(title="More", facts=(Fact(name="tape", found="none", needed="a backup", problem="buy one"),))
    with pytest.raises(BackendUnavailable, match="tape: buy one"):
        check_needs(replace(report, sections=(*report.sections, section)), ["torch", "tape"])


def test_an_unknown_need_is_told_what_there_is(report):
    with pytest.raises(ConfigError, match=r"need='cude' is unknown; pass crossdock, python, .*\bcuda\b"):
        check_needs(report, ["cude"])


def test_a_round_trip_that_failed_is_an_error_whatever_was_asked_for(report):
    with pytest.raises(BackendUnavailable, match="shared memory: rank 1: full"):
        check_needs(with_trip(report, RoundTrip(transport="shared memory", problem="rank 1: full")), [])


def test_shared_memory_is_judged_by_what_allocates_segments(monkeypatch, tmp_path):
    monkeypatch.setenv("CROSSDOCK_SHM_DIR", str(tmp_path / "nowhere"))
    fact = examine(together=False).facts()["shm"]
    said = shm.allocate(tmp_path / "nowhere" / "file", 1, [])
    assert fact.state == "missing"
    assert fact.problem.partition("(")[2] == said.partition("(")[2]
    monkeypatch.setenv("CROSSDOCK_SHM_DIR", str(tmp_path))
    assert examine(together=False).facts()["shm"].state == "ok"
    assert not list(tmp_path.iterdir())


def test_an_interface_that_is_not_there_is_found():
    (fact,) = network({"GLOO_SOCKET_IFNAME": "nowhere0"})
    assert "GLOO_SOCKET_IFNAME=nowhere0 names no interface" in fact.problem
    (fact,) = network({"GLOO_SOCKET_IFNAME": "lo"})
    assert fact.problem is None


@pytest.mark.parametrize("has_rich", [True, False])
def test_prints_all_lines_also_without_rich(report, capsys, monkeypatch, has_rich):
    if has_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(show.importlib.util, "find_spec", lambda _: None)
    matrix = [[None, 1.5], [2.5, None]]
    links = Links(transport="rope", what_latency="us", latency_us=matrix, what_rate="GB/s", gb_per_s=matrix)
    show.print_report(with_trip(report, RoundTrip(transport="rope", problem=None, links=links)))
    said = capsys.readouterr().out
    assert all(name in said for name in report.facts())
    assert "rank 1: a, cpu, in other namespaces than rank 0: mnt" in said
    assert "rope: every value came back" in said
    assert "2.5" in said


def test_json_is_the_report(capsys):
    assert main(["doctor", "--json", "--need", "torch"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [section["title"] for section in said["sections"]][:3] == ["Software", "Host", "GPUs"]


def test_status_1_and_the_report_all_the_same(capsys, monkeypatch):
    missing = Report(sections=(Section(title="A", facts=(Fact(name="cuda", found="no", needed="", problem="none"),)),))
    monkeypatch.setattr(doctor, "examine", lambda **_: missing)
    assert main(["doctor", "--need", "cuda"]) == 1
    out, err = capsys.readouterr()
    assert "cuda" in out
    assert err == "crossdock doctor: error: cuda: none\n"


def test_group_wants_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["doctor", "--group"]) == 2
    assert "torchrun --nproc-per-node 2 -m crossdock doctor --group" in capsys.readouterr().err


def test_ranks_of_a_torchrun_send_to_each_other():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "crossdock", "doctor", "--group", "--json"]
    done = run_child(command)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [rank["rank"] for rank in said["ranks"]] == [0, 1]
    trips = {trip["transport"]: trip for trip in said["round_trips"]}
    assert {"gloo", "shared memory"} <= set(trips)
    for trip in trips.values():
        assert trip["problem"] is None
        latency = trip["links"]["latency_us"]
        assert latency[0][0] is latency[1][1] is None
        assert min(latency[0][1], latency[1][0]) > 0
