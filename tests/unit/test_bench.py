"""The benchmark's own arithmetic: ratios, turns, the gate, and what RESULTS.md says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import report
from bench.gate import BOUNDS, CHECKS, judge
from bench.measure import OURS, Absent, Figure, alternate, figure, processor_time, resident_growth

RATE = Figure("receive", "instances/s", 500.0, {"DCMTK": 400.0, "Orthanc": 50.0}, "higher", {"DCMTK": 1.0})
COST = Figure("receive: cost", "ms", 3.0, {"DCMTK": 1.0}, "lower", {"DCMTK": 1.0}, limit=4.0)


def test_a_bar_is_a_least_ratio_where_higher_is_better_and_a_most_where_lower_is():
    assert RATE.ratio("DCMTK") == pytest.approx(1.25)
    assert (RATE.meets("DCMTK"), RATE.meets("Orthanc")) == (True, None)
    assert COST.meets("DCMTK") is False
    assert (COST.within_limit, RATE.within_limit) == (True, None)


def test_cases_take_turns_and_the_median_counts():
    turns = []

    def case(name, values):
        return lambda: turns.append(name) or next(values)

    measured = alternate({OURS: case("a", iter([1.0, 9.0, 2.0])), "b": case("b", iter([3.0, 3.0, 4.0]))}, rounds=3)
    assert "".join(turns) == "ababab"
    made = figure(measured, "x", "s")
    assert (made.ours, dict(made.others), made.spread[OURS]) == (2.0, {"b": 3.0}, (1.0, 9.0))


def test_a_peer_that_is_absent_is_left_out():
    def absent():
        raise Absent("not installed")

    assert list(alternate({OURS: lambda: 1.0, "peer": absent}, rounds=2)) == [OURS]


def _part(*figures):
    return report.Part("receive", "python -m bench receive", "2026-01-01 12:00", "abc", 3, (0.1, 0.2), figures)


def test_results_say_ratios_before_figures_and_mark_what_is_missed():
    text = report.render([_part(RATE, COST)], {"processor": "some, 2 cores"})
    assert "| receive | DCMTK | 1.25 | at least 1 | held |" in text
    assert "| receive: cost | DCMTK | 3 | at most 1 | **missed** |" in text
    assert "| receive: cost | 3 ms | at most 4 | held |" in text
    assert text.index("## Ratios") < text.index("| receive | instances/s | 500 | 400 | 50 |")
    assert "load average 0.1 to 0.2" in text
    assert "| processor | some, 2 cores |" in text


def test_a_part_that_is_measured_again_replaces_its_earlier_self_and_no_other(tmp_path):
    report.write_part(_part(RATE), tmp_path)
    other = report.Part("load", "c", "d", "e", 1, (0.0, 0.0), (Figure("loading", "s", 7.0, {"pydicom": 14.0}),))
    report.write_part(other, tmp_path)
    report.write_part(_part(COST), tmp_path)
    parts = report.read_parts(tmp_path / "results.json")
    assert parts["receive"].figures == (COST,)
    assert parts["load"] == other
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| loading | pydicom | 0.5 |" in text
    assert "instances/s" not in text


@pytest.fixture
def bounds(tmp_path):
    path = tmp_path / "bounds.toml"
    path.write_text("[dear]\nat_most = 1.5\n")
    return path


@pytest.mark.parametrize(("ratio", "held"), [(1.4, True), (1.6, False)])
def test_the_gate_holds_below_its_bound_and_breaks_above(bounds, ratio, held):
    (verdict,) = judge(bounds, {"dear": lambda: ratio})
    assert verdict.held is held
    assert str(verdict).startswith("held" if held else "BROKEN")


@pytest.mark.parametrize("ci", ["", "true"])
def test_what_the_gate_cannot_measure_breaks_it_only_in_ci(bounds, monkeypatch, ci):
    def absent():
        raise Absent("storescu is not installed")

    monkeypatch.setenv("CI", ci)
    (verdict,) = judge(bounds, {"dear": absent})
    assert verdict.held is not bool(ci)


def test_every_bound_has_its_check_and_every_check_its_bound():
    import tomllib

    assert set(tomllib.loads(BOUNDS.read_text())) == set(CHECKS)


def test_twice_the_cost_breaks_the_gate(monkeypatch):
    from bench import gate

    original = gate.read_header
    monkeypatch.setattr(gate.cases, "chest_ct", lambda *_: _small())
    honest = gate.reading_headers()
    monkeypatch.setattr(gate, "read_header", lambda *a: max((original(*a) for _ in range(4)), key=id))
    assert gate.reading_headers() > 2 * honest


def test_processor_time_and_memory_are_those_of_the_process_with_its_children():
    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}]); print(1, flush=True); input()\n"
    code += "x = b'1' * 50_000_000; print(len(x), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert processor_time(process.pid) >= 0.3
        with resident_growth(process.pid) as growth:
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            assert 45 < growth() < 70
        process.stdin.write(b"\n")


def _small():
    from bench.cases import cache
    from dicom_node.demo.phantom import make_thorax, write_series

    folder = cache() / "small"
    return sorted(folder.glob("*.dcm")) or write_series(make_thorax(slices=8, size=(32, 32)), folder)
