"""The host probe: each experiment once, findings that agree with one another and with the host."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyvmm import Machine, StopReason, hostprobe, kvm
from pyvmm.boot import Image, Mode, Segment, read_image
from pyvmm.hostprobe import FINDINGS, HostProbe, Injection, host
from pyvmm.lab import Lab, LabMode
from pyvmm.x86 import VECTOR_BP
from tests.conftest import REPOSITORY
from tests.support import PATIENCE, requires

pytestmark = pytest.mark.kvm

EXPERIMENTS = [
    name for name, value in vars(HostProbe).items() if isinstance(value, functools.cached_property)
]


class CountedLab(Lab):
    """Counts the laboratories that are built."""

    built = 0

    def __init__(self, mode: LabMode, code: bytes, device: str = "/dev/kvm") -> None:
        type(self).built += 1
        super().__init__(mode, code, device)


@pytest.fixture
def labs(monkeypatch: pytest.MonkeyPatch) -> type[CountedLab]:
    """The laboratories that the probe builds, counted from now on."""
    counted = type("Counted", (CountedLab,), {"built": 0})
    monkeypatch.setattr(hostprobe, "Lab", counted)
    return counted


def pyvmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyvmm", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_cpuid_offers_cmpxchg16b_to_kernels_only_where_it_works(tmp_path: Path) -> None:
    code = tmp_path / "kernel.bin"
    code.write_bytes(bytes.fromhex("b801000000 31c9 0fa2 f4"))  # eax = 1, ecx = 0; cpuid; hlt
    with Machine(read_image(code)._replace(is_linux=True)) as machine:
        assert machine.run(timeout=PATIENCE).reason is StopReason.HALTED
        assert bool(machine.registers()["rcx"] >> 13 & 1) == host().cmpxchg16b


# --- at most once, and only when asked -----------------------------------------------------------


def test_each_experiment_is_made_at_most_once(labs: type[CountedLab]) -> None:
    probe = HostProbe()
    assert labs.built == 0, "a probe that nobody asks makes no experiment"
    for name in EXPERIMENTS:
        first = getattr(probe, name)
        before = labs.built
        assert getattr(probe, name) == first
        assert labs.built == before, f"{name} was made twice"


def test_all_vms_of_a_process_share_the_findings() -> None:
    assert host() is host()
    assert host("/dev/kvm") is host()


def test_findings_asked_for_by_many_threads_are_made_once(labs: type[CountedLab]) -> None:
    usual = sys.getswitchinterval()
    probe = HostProbe()
    start = threading.Barrier(4)
    found: list[bool] = []

    def ask() -> None:
        start.wait()
        found.append(probe.breakpoint)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert found == [found[0]] * 4
    assert labs.built == 1


def test_guest_that_merely_runs_pays_for_no_experiment() -> None:
    """hello.bin: not even the module is imported."""
    script = (
        "import sys; from pyvmm.machine import Machine\n"
        "with Machine('guests/hello.bin') as machine: print(machine.run(timeout=30).reason.name)\n"
        "print('pyvmm.hostprobe' in sys.modules, 'pyvmm.lab' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=50
    )
    assert done.stdout.split() == ["HALTED", "False", "False"], done.stderr


def test_experiments_leave_signals_as_they_were() -> None:
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    handler = signal.getsignal(signal.SIGALRM)
    assert HostProbe().long_mode in (True, False)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    assert signal.getsignal(signal.SIGALRM) is handler
    assert not signal.sigpending()


def test_experiments_work_on_any_thread() -> None:
    expected = host().breakpoint
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(HostProbe().breakpoint))
    thread.start()
    thread.join()
    assert found == [expected]


def test_guest_that_spins_does_not_stop_the_probe() -> None:
    with Lab(LabMode.LONG, b"\xeb\xfe") as lab:
        assert lab.run(0.05) == kvm.KVM_EXIT_INTR


# --- what was found ----------------------------------------------------------------------------


def test_this_host_runs_guests_at_all() -> None:
    assert host().long_mode
    assert host().protected_mode
    assert host().real_mode


def test_findings_agree_with_one_another() -> None:
    found = host()
    if not found.breakpoint:
        assert found.injection is Injection.UNRELIABLE, "nothing leaves, so nothing is handed back"
        assert found.own_int3_native, "else a guest's int3 would be lost"
    if not found.own_int3_native:
        assert found.breakpoint, "pyvmm delivers it, and for that it must leave the guest"
    assert found.own_int3_user
    if found.iret32:
        assert found.protected_mode


def test_findings_are_those_of_a_known_kind_of_host() -> None:
    """hosts.md: each kind of KVM has one set of answers; a new one deserves a look."""
    found = host()
    kind = (found.breakpoint, found.own_int3_native, found.injection)
    assert kind in {
        (True, True, Injection.EXIT_LENGTH),  # Intel
        (True, True, Injection.UNRELIABLE),  # AMD
        (False, True, Injection.UNRELIABLE),  # AMD as QEMU emulates it
        (True, False, Injection.NOTHING),  # ring 0 emulated by KVM's instruction emulator
    }
    if not found.own_int3_native:
        assert not (found.breakpoint_user or found.step_user or found.hardware_breakpoint_user)
        assert not found.iret32
        assert not found.paging32
        assert not found.breakpoint_real
        assert found.step and found.step_real and found.hardware_breakpoint
        assert not found.watchpoint
    if found.injection is Injection.EXIT_LENGTH:
        assert found.breakpoint_user and found.iret32 and found.step
        assert found.hardware_breakpoint and found.watchpoint


def test_a_crash_names_what_the_host_cannot_do() -> None:
    page_directory_then_paging = bytes.fromhex("b800b00000 0f22d8 0f20c0 0d00000080 0f22c0")
    code = page_directory_then_paging + b"\x0f\x0b"  # ud2, for hosts that can
    image = Image("paging", "flat", Mode.PROTECTED, 0x100000, (Segment(0x100000, code, len(code)),))
    with Machine(image) as machine:
        stop = machine.run(timeout=PATIENCE)
    assert stop.reason is StopReason.CRASHED
    named = "no paging in 32-bit mode: see `pyvmm --probe`, paging32" in stop.report
    assert named == (host().crash_registers and not host().paging32)


def test_repeating_an_experiment_finds_the_same() -> None:
    again = HostProbe()
    for name in EXPERIMENTS:
        assert getattr(again, name) == getattr(host(), name), name


def test_finding_about_the_guests_own_int3_is_what_plain_kvm_does() -> None:
    with Lab(LabMode.LONG, b"\xcc\x90") as lab:
        delivered = lab.run() == kvm.KVM_EXIT_HLT and lab.delivered_vector() == VECTOR_BP
        assert delivered == host().own_int3_native


# --- requires(), which the other tests skip with -----------------------------------------------


def test_requires_skips_exactly_where_a_finding_is_missing() -> None:
    for finding in FINDINGS:
        if finding.measure(host()):
            requires(finding.name)
        else:
            with pytest.raises(pytest.skip.Exception) as skipped:
                requires(finding.name)
            expected = f"host probe: {finding.name} is missing: {finding.bad}"
            assert str(skipped.value) == expected


# --- the command -------------------------------------------------------------------------------


def test_probe_prints_a_row_for_each_finding() -> None:
    done = pyvmm("--probe")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [finding.name for finding in FINDINGS]
    for line, finding in zip(lines, FINDINGS, strict=True):
        works = finding.measure(host())
        assert (" yes " in line) == works
        assert line.endswith(finding.good if works else finding.bad)


def test_probe_as_json_says_the_same() -> None:
    done = pyvmm("--probe", "--json")
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["findings"] == {f.name: f.measure(host()) for f in FINDINGS}
    assert facts["kernel"] == os.uname().release
    assert facts["breakpoint_injection"] == host().injection.name.lower()


def test_names_of_findings_are_unique_and_easy_to_type() -> None:
    names = [finding.name for finding in FINDINGS]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def requiring(name: str) -> int:
    """The exit status of --probe --require, without a process of its own."""
    from pyvmm import probereport

    return probereport.main("/dev/kvm", [name], as_json=True)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_require_tells_whether_a_finding_is_there(
    finding: hostprobe.Finding, capsys: pytest.CaptureFixture[str]
) -> None:
    works = finding.measure(host())
    assert requiring(finding.name) == (0 if works else 4)
    complaint = capsys.readouterr().err
    assert (finding.name in complaint) == (not works)


@pytest.mark.parametrize(
    ("required", "status"),
    [("long-mode,real-mode", 0), ("no-such-thing", 2), ("", None)],
)
def test_require_on_the_command_line(required: str, status: int | None) -> None:
    done = pyvmm("--probe", "--require", required)
    if status is None:
        assert done.returncode in (0, 2)
    else:
        assert done.returncode == status
    assert "Traceback" not in done.stderr
    if status == 2:
        assert required in done.stderr
        assert "long-mode" in done.stderr, "the names that there are"


def test_require_names_everything_that_is_missing() -> None:
    missing = [finding.name for finding in FINDINGS if not finding.measure(host())]
    done = pyvmm("--probe", "--require", ",".join(["long-mode", *missing]))
    assert done.returncode == (4 if missing else 0)
    assert all(name in done.stderr for name in missing)
