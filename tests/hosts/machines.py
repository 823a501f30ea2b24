"""The two emulators: each a function that turns a kernel and an initrd into a command line.

Both write the host's serial ports to files: the first is the kernel's console, the second carries
what init.sh sends. Neither needs its host to switch itself off: session.py ends it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import packages
from tests.hosts.packages import HostsError


@dataclass(frozen=True)
class Boot:
    """What one boot consists of: files to read, and files the emulator writes."""

    kernel: Path
    initrd: Path
    folder: Path  # of this boot alone, removed after it

    @property
    def console(self) -> Path:
        """The file that gets the first serial port's output."""
        return self.folder / "console"

    @property
    def wire(self) -> Path:
        """The file that gets the second serial port's output."""
        return self.folder / "wire"


# What the hosts' kernels need not do costs emulated instructions, and boot time; measured in Bochs:
# the self-tests of the kernel's cryptography (cryptomgr.notests) 16 s, verifying the certificates
# compiled into it (initcall_blacklist) 3 s, a console at the default 9600 baud 200,000 instructions
# a character. panic=-1: reboot at once, which ends the emulator.
KERNEL_PARAMETERS = (
    "console=ttyS0,115200 quiet mitigations=off panic=-1 cryptomgr.notests "
    "initcall_blacklist=load_system_certificate_list"
)


def amd(boot: Boot) -> list[str]:
    """Return the command line of QEMU's software SVM, on which kvm_amd loads.

    One processor: with two that take turns on a thread QEMU delivers some interrupts of guests
    twice, and with a thread each (thread=multi) the host hangs after some minutes of guests that
    raise exceptions (QEMU 7.2; docs/hosts.md).
    """
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max,+svm"),
        *("-smp", "1", "-m", "1G", "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-monitor", "none"),
        *("-serial", f"file:{boot.console}", "-serial", f"file:{boot.wire}"),
        *("-kernel", str(boot.kernel), "-initrd", str(boot.initrd)),
        *("-append", KERNEL_PARAMETERS),
    ]


# Debian's Bochs is built with its internal debugger, hence the file with "c" (continue), and its
# display in a terminal is the only one that needs no X server.
# ips is what Bochs divides instructions by to get the host's time. Far above the real speed, it
# makes the host's clock slow: its programs get more done between two timer ticks, and within their
# own time limits. An idle host's time passes at once (sync=none).
BOCHS_CONFIGURATION = """\
cpu: model=corei7_haswell_4770, count=1, ips=200000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
display_library: term
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
clock: sync=none
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={console}
com2: enabled=1, mode=file, dev={wire}
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""

# lpj, tsc, no_timer_check: three calibrations against a timer that an emulator need not do.
# iomem: init.sh programs two devices.
ISOLINUX_CONFIGURATION = """\
default host
prompt 0
label host
  kernel /vmlinuz
  append initrd=/initrd {parameters} lpj=1000000 tsc=reliable no_timer_check iomem=relaxed
"""


def intel(boot: Boot) -> list[str]:
    """Return the command line of Bochs's software VMX, on which kvm_intel loads."""
    iso = boot.folder / "host.iso"
    (boot.folder / "isolinux.cfg").write_text(
        ISOLINUX_CONFIGURATION.format(parameters=KERNEL_PARAMETERS)
    )
    contents = {
        "isolinux.bin": "/usr/lib/ISOLINUX/isolinux.bin",
        "ldlinux.c32": "/usr/lib/syslinux/modules/bios/ldlinux.c32",
        "isolinux.cfg": boot.folder / "isolinux.cfg",
        "vmlinuz": boot.kernel,
        "initrd": boot.initrd,
    }
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(iso), "-graft-points"]
    command += ["-b", "isolinux.bin", "-c", "boot.cat"]
    command += ["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    command += [f"{name}={file}" for name, file in contents.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostsError(f"xorriso: {done.stderr.strip()}")
    configuration = boot.folder / "bochsrc"
    configuration.write_text(
        BOCHS_CONFIGURATION.format(
            iso=iso, console=boot.console, wire=boot.wire, log=boot.folder / "bochs.log"
        )
    )
    commands = boot.folder / "debugger"
    commands.write_text("c\n")
    return ["bochs", "-q", "-f", str(configuration), "-rc", str(commands)]


MACHINES: dict[str, Callable[[Boot], list[str]]] = {"amd": amd, "intel": intel}

EMULATORS = {"amd": ("QEMU", "qemu-system-x86"), "intel": ("Bochs", "bochs")}


def emulator(host: str) -> str:
    """Return the name and the upstream version of a host's emulator: "Bochs 2.7"."""
    name, package = EMULATORS[host]
    return f"{name} {packages.upstream_version(package)}"
