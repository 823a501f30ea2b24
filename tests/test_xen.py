"""A kernel that nobody here wrote: Xen, by multiboot, on two processors.

It calls the BIOS, reads ACPI tables, starts the other processor from real mode, calibrates timers
and prints by interrupt.  Its first domain is none, so that it ends where it would start that.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm import StopReason
from pyvmm.boot import read_image
from pyvmm.testing import Guest
from tests.conftest import GUESTS
from tests.hosts import xen as hosts_xen
from tests.linux_guest import find_or_skip
from tests.support import requires

pytestmark = [pytest.mark.kvm, pytest.mark.slow, pytest.mark.timeout(1200)]

BOOT = 300.0  # seconds: ten on kvm_pvm, minutes where each instruction is translated


@pytest.fixture(scope="module")
def xen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requires("irqchip")
    return find_or_skip(hosts_xen.find, tmp_path_factory.mktemp("xen"))


def test_xen_starts_both_processors_and_looks_for_its_first_domain(xen: Path) -> None:
    no_domain = str(GUESTS / "hello.bin")
    append = "com1=115200,8n1 console=com1 noreboot"
    image = read_image(str(xen), append=append, modules=[no_domain])
    assert image.kind.startswith("multiboot")
    with Guest(image, cpus=2, memory=256 << 20) as guest:
        guest.wait_for("Bootloader: pyvmm", BOOT)
        guest.wait_for("Brought up 2 CPUs", BOOT)
        guest.wait_for("ELF: not an ELF binary", BOOT)
        guest.wait_for("Manual reset required ('noreboot' specified)", BOOT)
        assert guest.wait(BOOT).reason is StopReason.HALTED
