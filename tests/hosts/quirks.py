"""What the emulated hosts need around the tests: a pytest plugin, used only inside the hosts.

Bochs's clock is slow (see machines.py), so that tests that repeat something as often as the host's
speed allows would take it for a fast one: they are told that it is SLOW_CLOCK times slower. QEMU's
clock is right: pyvmm and gdb take up to ten seconds to start while others want the processors, so
the time within which something must happen is longer.

Bochs 2.7 takes "NMIs are blocked" from one VM to the next: once a guest has halted in its NMI
handler, the guests of all later VMs appear to be in theirs (KVM reads it in the new guest's
interruptibility state), until one of them executes iret. See docs/hosts.md for the experiment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import kvm
from pyvmm.hypervisor import VM
from pyvmm.lab import HANDLERS, Lab, LabMode
from pyvmm.x86 import VECTOR_NMI
from tests import support

NOP, IRETQ = b"\x90", b"\x48\xcf"
SLOW_CLOCK = 4  # a second there takes six to fourteen
MORE_PATIENCE = 3


def _is_bochs() -> bool:
    return "vmx" in Path("/proc/cpuinfo").read_text()


def pytest_configure() -> None:
    """Before any test is imported."""
    if _is_bochs():
        measured = support.slowness
        support.slowness = functools.cache(lambda: SLOW_CLOCK * measured())
    else:
        support.PATIENCE *= MORE_PATIENCE


@pytest.fixture(autouse=True)
def unblocked_nmis(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On Bochs, after each test that has raised an NMI: a guest takes one and returns from it."""
    raised = []
    inject_nmi = VM.inject_nmi

    def spy(vm: VM, vcpu_id: int) -> None:
        raised.append(vcpu_id)
        inject_nmi(vm, vcpu_id)

    monkeypatch.setattr(VM, "inject_nmi", spy)
    yield
    if raised and _is_bochs():
        with Lab(LabMode.LONG, NOP) as lab:
            lab.write(HANDLERS + 16 * VECTOR_NMI, IRETQ)
            lab.cpu.ioctl(kvm.KVM_NMI)
            lab.run()
