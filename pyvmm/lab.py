"""A laboratory guest: one vCPU, 2 MiB of RAM and a handler behind each exception vector.

The host probe and the tests need to see what a processor does with a few bytes of code.  The lab
puts the code at CODE, enters it in the mode and privilege level asked for, and tells what came of
it: the exit, or the exception that was delivered and the frame it pushed.  Each handler is a single
`hlt`, so a delivered exception is a KVM_EXIT_HLT with RIP behind the handler of its vector.

It is built on plain kvm.py, below the hypervisor layer: what is measured here is the host's own
behaviour, before pyvmm makes up for anything.
"""

from __future__ import annotations

import signal
import struct
import threading
from enum import Enum
from types import TracebackType

from pyvmm import handles, kvm
from pyvmm.memory import GuestMemory
from pyvmm.x86 import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR4_OSFXSR,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    RFLAGS_FIXED,
    RFLAGS_IF,
    TYPE_TSS32_BUSY,
    descriptor,
    flat_segment,
)

RAM = 2 << 20  # bytes
PAGE_TABLES, GDT, IDT, TSS = 0x1000, 0x4000, 0x5000, 0x6000
STACK, USER_STACK = 0x9000, 0xA000  # they grow down
DATA = 0xB000
CODE, HANDLERS = 0x10000, 0x11000  # handler of vector n: HANDLERS + 16 * n

KERNEL_CODE, KERNEL_DATA, USER_DATA, USER_CODE, TSS_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x28
CODE32 = 0x38

_HLT = b"\xf4"


class LabMode(Enum):
    """How the code under test is entered."""

    LONG = "64-bit, CPL 0"
    USER = "64-bit, CPL 3"
    PROTECTED = "32-bit, CPL 0"
    REAL = "real mode"


class Lab:
    """A throw-away VM.  Use it as a context manager, from one thread."""

    def __init__(self, mode: LabMode, code: bytes, device: str = "/dev/kvm") -> None:
        """Prepare to run `code`, which should end by itself (a `hlt` is appended)."""
        self.mode = mode
        system = handles.SystemHandle(device)
        try:
            mmap_size = system.vcpu_mmap_size()
            cpuid = system.supported_cpuid()
            self._vm = system.create_vm()
        finally:
            system.close()
        self.memory = GuestMemory(self._vm)
        self.vcpu: handles.VcpuHandle | None = None
        try:
            self._vm.ioctl(kvm.KVM_SET_TSS_ADDR, 0xFFFBD000)  # Intel real mode without EPT
            self.memory.add_slot(0, RAM)
            self.vcpu = self._vm.create_vcpu(0, mmap_size)
            self.vcpu.ioctl(kvm.KVM_SET_CPUID2, cpuid)
            self._lay_out_memory()
            self._set_entry_state()
            self.write(CODE, code + _HLT)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the VM."""
        if self.vcpu is not None:
            self.vcpu.close()
        self._vm.close()
        self.memory.close()

    # --- what the experimenter uses ---

    @property
    def cpu(self) -> handles.VcpuHandle:
        """The vCPU's handle."""
        assert self.vcpu is not None
        return self.vcpu

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory."""
        self.memory.write(gpa, data)

    def read_u64(self, gpa: int) -> int:
        """Read eight bytes of guest memory."""
        return int.from_bytes(self.memory.read(gpa, 8), "little")

    def run(self, seconds: float = 2.0) -> int:
        """Enter until an exit; returns its KVM_EXIT_* reason, or KVM_EXIT_INTR after `seconds`.

        A host that fails an experiment may well spin: the guest is interrupted then.
        """
        here = threading.get_ident()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        try:
            self.cpu.set_signal_mask(blocked - {signal.SIGALRM})
            alarm = threading.Timer(seconds, signal.pthread_kill, (here, signal.SIGALRM))
            alarm.daemon = True
            alarm.start()
            finished = kvm.run(self.cpu.fd)
            alarm.cancel()
            alarm.join()
            signal.sigtimedwait({signal.SIGALRM}, 0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return self.cpu.run.exit_reason if finished else kvm.KVM_EXIT_INTR

    def complete(self) -> bool:
        """Finish the I/O of the last exit without entering; True when that made another exit."""
        self.cpu.run.immediate_exit = 1
        finished = kvm.run(self.cpu.fd)
        self.cpu.run.immediate_exit = 0
        return finished

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return int(self.cpu.get(kvm.kvm_regs).rip)

    def delivered_vector(self) -> int | None:
        """Which exception's handler the guest has halted in, if any."""
        linear = self.rip + (
            self.cpu.get(kvm.kvm_sregs).cs.base if self.mode is LabMode.REAL else 0
        )
        vector, rest = divmod(linear - 1 - HANDLERS, 16)
        return vector if rest == 0 and 0 <= vector < 32 else None

    def pushed_rip(self) -> int:
        """The saved RIP in the frame of an exception without an error code."""
        return self._pushed(0)

    def _pushed(self, number: int) -> int:
        rsp = self.cpu.get(kvm.kvm_regs).rsp
        size = {LabMode.REAL: 2, LabMode.PROTECTED: 4}.get(self.mode, 8)
        return int.from_bytes(self.memory.read(rsp + number * size, size), "little")

    def inject(self, vector: int) -> None:
        """Queue an exception as pyvmm does, for the next entry."""
        events = self.cpu.get(kvm.kvm_vcpu_events)
        events.exception.injected, events.exception.nr = 1, vector
        events.exception.pending = events.exception.has_error_code = 0
        self.cpu.set(events)

    # --- the guest's world ---

    def _lay_out_memory(self) -> None:
        user_writable_present = 0x7
        large_page = 0x80
        self.write(PAGE_TABLES, struct.pack("<Q", PAGE_TABLES + 0x1000 | user_writable_present))
        self.write(
            PAGE_TABLES + 0x1000, struct.pack("<Q", PAGE_TABLES + 0x2000 | user_writable_present)
        )
        self.write(PAGE_TABLES + 0x2000, struct.pack("<Q", user_writable_present | large_page))
        for vector in range(32):
            self.write(HANDLERS + 16 * vector, _HLT)
        if self.mode is LabMode.REAL:
            # The interrupt vector table: offset, segment.
            for vector in range(32):
                self.write(4 * vector, struct.pack("<HH", 16 * vector, HANDLERS >> 4))
            return
        segments = [
            flat_segment(KERNEL_CODE, code=True, bits=64),
            flat_segment(KERNEL_DATA, code=False),
            flat_segment(USER_DATA, code=False, dpl=3),
            flat_segment(USER_CODE, code=True, bits=64, dpl=3),
        ]
        tss = self._tss_segment()
        self.write(GDT, struct.pack("<5Q", 0, *map(descriptor, segments)))
        self.write(GDT + TSS_SELECTOR, struct.pack("<QQ", descriptor(tss), 0))
        self.write(GDT + CODE32, struct.pack("<Q", descriptor(flat_segment(CODE32, code=True))))
        self.write(TSS + 4, struct.pack("<Q", STACK))  # RSP0: the stack for CPL 3 -> 0
        for vector in range(32):
            handler = HANDLERS + 16 * vector
            # Gates with DPL 3, so that int3 and int n work from CPL 3 too.
            if self.mode is LabMode.PROTECTED:
                gate = struct.pack("<HHHH", handler & 0xFFFF, CODE32, 0xEE00, handler >> 16)
                self.write(IDT + 8 * vector, gate)
            else:
                gate = struct.pack(
                    "<HHHHQ", handler & 0xFFFF, KERNEL_CODE, 0xEE00, handler >> 16, 0
                )
                self.write(IDT + 16 * vector, gate)

    @staticmethod
    def _tss_segment() -> kvm.kvm_segment:
        return kvm.kvm_segment(
            base=TSS, limit=0x67, selector=TSS_SELECTOR, type=TYPE_TSS32_BUSY, present=1
        )

    def _set_entry_state(self) -> None:
        regs = kvm.kvm_regs(rip=CODE, rsp=STACK, rflags=RFLAGS_FIXED)
        sregs = self.cpu.get(kvm.kvm_sregs)
        if self.mode is LabMode.REAL:
            sregs.cs.selector, sregs.cs.base = CODE >> 4, CODE
            regs.rip = 0
        else:
            sregs.cr0 |= CR0_PE | CR0_ET | CR0_NE
            sregs.gdt.base, sregs.gdt.limit = GDT, CODE32 + 7
            sregs.idt.base, sregs.idt.limit = IDT, 32 * 16 - 1
            sregs.tr = self._tss_segment()
            user = self.mode is LabMode.USER
            data = flat_segment(USER_DATA if user else KERNEL_DATA, code=False, dpl=3 * user)
            sregs.ds = sregs.es = sregs.ss = data
            if self.mode is LabMode.PROTECTED:
                sregs.cs = flat_segment(CODE32, code=True)
            else:
                sregs.cr0 |= CR0_PG
                sregs.cr3, sregs.cr4 = PAGE_TABLES, CR4_PAE | CR4_OSFXSR
                sregs.efer = EFER_LME | EFER_LMA
                selector = USER_CODE if user else KERNEL_CODE
                sregs.cs = flat_segment(selector, code=True, bits=64, dpl=3 * user)
            if user:
                regs.rsp = USER_STACK
                regs.rflags |= RFLAGS_IF
        self.cpu.set(sregs)
        self.cpu.set(regs)
