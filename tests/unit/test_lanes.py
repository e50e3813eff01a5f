"""Lanes share out all tests of a run, each to one of them."""

from types import SimpleNamespace

from tests.lanes import LONGEST, taken


def test_every_test_is_one_lane_s_and_a_module_stays_together(tmp_path):
    """Also where pytest has put tests of another module in between."""
    names = ["a.py::x", "b.py::y", f"{LONGEST[0]}::z", "a.py::w", "b.py::v"]
    items = [SimpleNamespace(nodeid=name) for name in names]
    lanes = [taken(items, tmp_path) for _ in range(2)]
    first, second = next(lanes[0]).nodeid, next(lanes[1]).nodeid
    assert (first, second) == (f"{LONGEST[0]}::z", "a.py::x")
    rest = [[item.nodeid for item in lane] for lane in reversed(lanes)]
    assert rest == [["a.py::w", "b.py::y", "b.py::v"], []]
