"""The benchmark suite's own code: what it makes of figures.  Nothing is measured here."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import chart, gcc, processes, report
from benchmarks.__main__ import existing_file, named
from benchmarks.measure import (
    PYVMM,
    Context,
    Goal,
    Measure,
    Result,
    Sample,
    Spread,
    Unavailable,
    run,
    unavailable,
)
from benchmarks.measures import MEASURES, virtio
from benchmarks.measures.boot import find_linux
from benchmarks.measures.debug import write_packets
from benchmarks.measures.memory import peak_mib
from benchmarks.rspclient import escaped, escaped_to_fit, framed
from pyvmm.rsp import Decoder

SVG = "{http://www.w3.org/2000/svg}"


def measure(unit="exits/s", goal=None, contenders=None):
    return Measure(
        "a|b", unit, "What <it> means.", "what the kernel alone costs",
        lambda context: contextlib.nullcontext(contenders or {}), goal,
    )  # fmt: skip


def result(ours, unit="exits/s", goal=None, **peers):
    """A result with these figures, round by round; a peer's string says why it has none."""
    names = (PYVMM, *peers)
    samples = {name: figures for name, figures in peers.items() if not isinstance(figures, str)}
    missing = {name: why for name, why in peers.items() if isinstance(why, str)}
    return Result(
        measure(unit, goal),
        names,
        {name: [Sample(x) for x in figures] for name, figures in {PYVMM: ours, **samples}.items()},
        missing,
    )


# --- the measures --------------------------------------------------------------------------------


def test_each_measure_says_what_it_is():
    assert len({m.name for m in MEASURES}) == len(MEASURES)
    for m in MEASURES:
        assert m.unit in {"ms", "us", "MiB"} or m.unit.endswith("/s"), m.name
        assert m.meaning.endswith("."), m.name
        assert m.floor, m.name
        assert m.goal is None or (m.goal.at_least is None) != (m.goal.at_most is None), m.name


def test_a_goal_is_at_least_where_more_is_better():
    for m in MEASURES:
        assert m.goal is None or (m.goal.at_most is not None) == m.less_is_better, m.name


def test_named_keeps_the_order_of_the_table():
    assert [m.name for m in named("gdb-g,start")] == ["start", "gdb-g"]
    with pytest.raises(argparse.ArgumentTypeError, match="no measure nonsense"):
        named("start,nonsense")


def test_description_has_name_unit_meaning_floor_and_goal():
    text = report.description(measure("us", Goal(at_most=100)))
    assert text.splitlines() == [
        "a|b (us): What <it> means.",
        "    floor: what the kernel alone costs",
        "    goal: <= 100 us",
    ]


# --- running -------------------------------------------------------------------------------------


def test_run_takes_turns_and_does_not_count_the_first(tmp_path):
    taken = []

    def sampler(name):
        def sample():
            taken.append(name)
            return Sample(len(taken))

        return sample

    contenders = {PYVMM: sampler("us"), "C": unavailable("no gcc"), "QEMU": sampler("them")}
    done = run(measure(contenders=contenders), Context(tmp_path, True), 2)
    assert taken == ["us", "them"] * 3
    assert [s.value for s in done.samples[PYVMM]] == [3, 5]
    assert done.unavailable == {"C": "no gcc"}
    assert done.peers == ["C", "QEMU"]
    with pytest.raises(Unavailable):
        contenders["C"]()


def test_ratio_is_formed_round_by_round():
    assert result([10, 40, 30], C=[10, 20, 10]).ratio("C") == Spread(2, 1, 3)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("C", at_least=2), True),
        (Goal("C", at_least=2.1), False),
        (Goal("C", at_most=1.9), False),
        (Goal(at_most=30), True),
        (Goal("QEMU", at_least=1), None),
    ],
)
def test_goal_is_told_by_the_median(goal, met):
    done = result([10, 40, 30], goal=goal, C=[10, 20, 10], QEMU="not here")
    assert done.goal_met() is met


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8666, "0.87"),
        (93.14, "93.1"),
        (512.4, "512"),
        (1234.5, "1,230"),
        (128456, "128,000"),
    ],
)
def test_number_has_three_digits_that_matter(value, text):
    assert report.number(value) == text


def test_table_has_a_line_for_each_peer():
    done = result([50, 60], goal=Goal("C", at_least=0.85), QEMU="no qemu", C=[100, 100])
    head, rule, first, second = report.table([done]).splitlines()
    assert head.split()[:4] == ["measure", "unit", PYVMM, "peer"]
    assert set(rule) == {"-"}
    assert first.startswith("a|b") and "no qemu" in first
    assert second.split()[0] == "C" and second.endswith("MISSED")
    assert "0.55 (0.50-0.60)" in second


def test_measure_that_failed_says_so():
    done = Result(measure(), (PYVMM,), unavailable={PYVMM: "failed: it broke"})
    assert "failed: it broke" in report.table([done])
    assert chart.bars([done]) == []


def test_markdown_escapes_what_would_divide_a_cell():
    lines = report.markdown([result([1], C=[2])], ["Where.", "What."], "chart.svg").splitlines()
    assert lines[:4] == ["Where.", "", "What.", ""]
    assert lines[4].endswith("(chart.svg)")
    head, rule, row = lines[6:]
    assert rule == "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    assert head.count("|") == rule.count("|") == row.count("|") - 1
    assert row.startswith(r"| a\|b | exits/s |")


def test_replace_measured_leaves_the_rest_alone():
    document = f"before\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nafter\n"
    new = report.replace_measured(document, "new")
    assert new == document.replace("old", "new")
    assert report.replace_measured(new, "new") == new


@pytest.mark.parametrize(
    "document", ["", report.BEGIN, report.END, f"{report.END}\n{report.BEGIN}\n"]
)
def test_replace_measured_wants_both_lines(document):
    with pytest.raises(ValueError, match="are needed"):
        report.replace_measured(document, "new")


def test_json_has_each_sample():
    done = result([1, 2], C=[2, 2], QEMU="not here")
    host = {"kernel": "6.1"}
    written = json.loads(json.dumps(report.as_json([done], host)))
    (row,) = written["measures"]
    assert written["host"] == host
    assert [s["value"] for s in row["contenders"][PYVMM]["samples"]] == [1, 2]
    assert row["contenders"]["C"]["ratio"]["median"] == 0.75
    assert row["contenders"]["QEMU"] == {"unavailable": "not here"}


# --- the chart -----------------------------------------------------------------------------------


def test_chart_is_about_better_and_not_about_more():
    more = result([20], goal=Goal("C", at_least=0.5), C=[10])
    less = result([20], "ms", Goal("C", at_most=4), C=[10])
    (first, second) = chart.bars([more, less])
    assert (first.times.median, first.goal) == (2, 0.5)
    assert (second.times.median, second.goal) == (0.5, 0.25)


def test_times_better_turns_the_spread_round():
    assert chart.times_better(measure("ms"), Spread(2, 1, 4)) == Spread(0.5, 0.25, 1)


def test_svg_is_well_formed_and_escaped():
    rows = [result([20, 30], goal=Goal("C", at_least=3), C=[10, 10], QEMU="none"), result([1])]
    root = ElementTree.fromstring(chart.svg(rows, "Linux <6.1> & more"))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "Linux <6.1> & more" in texts
    assert "2.50 (2.00-3.00)" in texts
    assert len(list(root.iter(f"{SVG}polygon"))) == 1
    assert [bar.get("class") for bar in root.iter(f"{SVG}rect")] == ["paper", "better"]
    assert "prefers-color-scheme: dark" in root.find(f"{SVG}style").text


def test_svg_has_room_for_extremes_and_for_nothing():
    for rows in ([], [result([1e6], C=[1])], [result([1], "us", C=[1e6])]):
        root = ElementTree.fromstring(chart.svg(rows, ""))
        width = float(root.get("width"))
        for line in root.iter(f"{SVG}line"):
            assert 0 <= float(line.get("x1")) <= width and 0 <= float(line.get("x2")) <= width


# --- what measures are made of -------------------------------------------------------------------


def test_peak_is_read_from_the_kernels_record():
    assert peak_mib("Name:\tpython3\nVmPeak:\t  99 kB\nVmHWM:\t   16384 kB\n") == 16


def test_escaped_data_fits_its_room():
    data = bytes(range(256)) * 3 + b"}}}}####"
    for room in (1, 2, 50, 300, 2000):
        content, length = escaped_to_fit(data, room)
        assert content == escaped(data[:length])
        assert len(content) <= room
        assert length in (len(data), 0) or len(escaped(data[: length + 4])) > room - 4


@pytest.mark.parametrize("in_binary", [True, False])
def test_written_packets_hold_all_data_and_are_not_too_long(in_binary):
    data = bytes(range(256)) * 20
    written = b""
    for payload in write_packets(data, 1024, in_binary):
        packet = framed(payload)
        assert len(packet) <= 1024
        (event,) = Decoder().receive(packet)
        assert isinstance(event, bytes)
        header, _, content = event.partition(b":")
        content = content if in_binary else bytes.fromhex(content.decode())
        assert int(header.partition(b",")[2], 16) == len(content)
        written += content
    assert written == data


# --- processes -----------------------------------------------------------------------------------


def test_text_is_found_wherever_reads_end():
    code = "import time; print('a', end='', flush=True); time.sleep(0.05); print('bcd', flush=True)"
    with processes.started([sys.executable, "-c", code]) as process:
        assert processes.wait_for(process, b"abc", 20) == b"d\n"


def test_process_that_ends_without_the_text_says_why():
    with processes.started([sys.executable, "-c", "exit('it broke')"]) as process:
        with pytest.raises(RuntimeError, match="ended without 'abc': it broke"):
            processes.wait_for(process, b"abc", 20)


def test_process_that_does_not_print_is_not_waited_for_longer():
    with processes.started([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with pytest.raises(RuntimeError, match="no 'abc' within 0 s"):
            processes.wait_for(process, b"abc", 0)


def test_cpu_time_of_a_process_grows():
    code = "print('a', flush=True)\nwhile True: pass"
    with processes.started([sys.executable, "-c", code]) as process:
        processes.wait_for(process, b"a", 20)
        before = processes.cpu_seconds(process)
        while processes.cpu_seconds(process) == before:
            pass


# --- what a compiler makes -----------------------------------------------------------------------


def test_without_a_compiler_the_column_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="apt install gcc"):
        gcc.compiled(tmp_path / "any.c", tmp_path / "any")


@pytest.mark.parametrize("device", [2, 3])
def test_virtio_guest_begins_where_it_is_entered(tmp_path, device):
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    work = {"DEVICE": device, "BYTES": 4096, "COUNT": 9, "DEPTH": 1, "RANDOM": 0, "SECTORS": 64}
    made = virtio.guest(tmp_path, "guest", **work)
    assert made.read_bytes().startswith(bytes.fromhex("bc 00000800"))  # mov esp, 0x80000
    made.write_bytes(b"kept")
    assert virtio.guest(tmp_path, "guest", **work).read_bytes() == b"kept"


# --- the Linux that is booted --------------------------------------------------------------------


def linux(folder, *files, kernel=None, initrd=None):
    for name in files:
        (folder / name).touch()
    context = Context(folder, True, kernel and folder / kernel, initrd and folder / initrd)
    found = find_linux(context, folder)
    return found[0].name, found[1].name, found[2]


def test_linux_is_debians_own(tmp_path):
    found = linux(tmp_path, "vmlinuz-6.1", "initrd.img-6.1")
    assert found == ("vmlinuz-6.1", "initrd.img-6.1", b"(initramfs) ")


def test_linux_is_the_one_that_the_user_names(tmp_path):
    found = linux(tmp_path, "vmlinuz-6.1", "initrd.img-6.1", kernel="mine", initrd="archive")
    assert found == ("mine", "archive", b"# ")


@pytest.mark.parametrize(
    ("files", "kernel", "missing"),
    [
        ((), None, "no .*/vmlinuz.*: give it with --kernel"),
        (("vmlinuz-6.1",), None, "no initrd for .*/vmlinuz-6.1: give it with --initrd"),
        (("vmlinuz-6.1", "initrd.img-6.1"), "mine", "no initrd for .*/mine"),
    ],
)
def test_linux_that_is_incomplete_says_what_is_missing(tmp_path, files, kernel, missing):
    with pytest.raises(Unavailable, match=missing):
        linux(tmp_path, *files, kernel=kernel)


def test_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(argparse.ArgumentTypeError, match="no file"):
        existing_file(str(tmp_path / "none"))
