"""What this host's KVM really does, found out by running tiny guests.

"KVM" is not one thing: the vendor's module decides how #BP, stepping and re-injection behave, and
its capability bits are no evidence.  So nothing here looks at a vendor's name or a version: each
finding is an experiment in a Lab (lab.py), made at most once in a process and only when somebody
asks.  A guest that is merely run pays for none.

The rest of pyvmm asks `host()` for what it needs to know.  `FINDINGS` is the table behind
`pyvmm --probe`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from enum import Enum

from pyvmm import handles, kvm
from pyvmm.lab import CODE, DATA, KERNEL_CODE, Lab, LabMode
from pyvmm.light import Any, NamedTuple, TypeVar
from pyvmm.x86 import CR0_PG, DR6_HITS, EFER_SCE, MSR_LSTAR, MSR_STAR, VECTOR_BP

_ENABLE, _STEP = kvm.KVM_GUESTDBG_ENABLE, kvm.KVM_GUESTDBG_SINGLESTEP
_SW_BP, _HW_BP = kvm.KVM_GUESTDBG_USE_SW_BP, kvm.KVM_GUESTDBG_USE_HW_BP

_NOP, _INT3 = b"\x90", b"\xcc"
_INT3_LONG = b"\x66\xcc"  # with a prefix: two bytes


class Injection(Enum):
    """What KVM adds to RIP when a #BP is injected, to make the saved RIP."""

    NOTHING = "saves RIP as it is"
    EXIT_LENGTH = "adds the length of the last int3 that left the guest"
    UNRELIABLE = "something else"


_Result = TypeVar("_Result")


class experiment(functools.cached_property[_Result]):
    """A property that is measured when first read, once also when several threads read it."""

    def __get__(self, probe: Any, owner: type | None = None) -> Any:
        if probe is None:
            return self
        with probe.lock:  # cached_property's own lock is gone from Python 3.12 on
            return super().__get__(probe, owner)


class HostProbe:
    """The findings about one host; each `experiment` is made when first asked for."""

    def __init__(self, device: str = "/dev/kvm") -> None:
        self.device = device
        self.lock = threading.RLock()  # one experiment at a time

    def _lab(self, mode: LabMode, code: bytes) -> Lab:
        return Lab(mode, code, self.device)

    # --- int3 ---

    def _intercepts(self, mode: LabMode, instruction: bytes) -> bool:
        """Whether `instruction` leaves the guest, at its own address, when breakpoints are on."""
        with self._lab(mode, instruction + _NOP) as lab:
            start = lab.rip
            lab.cpu.set_guest_debug(_ENABLE | _SW_BP)
            reason = lab.run()
            # An emulation failure at an int3 is as good as an exit: it happens instead of the
            # instruction, and its bytes are known.
            return lab.rip == start and (
                (reason == kvm.KVM_EXIT_DEBUG and lab.cpu.run.debug.exception == VECTOR_BP)
                or reason == kvm.KVM_EXIT_INTERNAL_ERROR
            )

    @experiment
    def breakpoint(self) -> bool:
        """int3 at CPL 0 in 64-bit mode leaves the guest."""
        return self._intercepts(LabMode.LONG, _INT3)

    @experiment
    def breakpoint_as_such(self) -> bool:
        """The same, and as a debug exit: not by way of a failed emulation."""
        with self._lab(LabMode.LONG, _INT3) as lab:
            lab.cpu.set_guest_debug(_ENABLE | _SW_BP)
            return lab.run() == kvm.KVM_EXIT_DEBUG

    @experiment
    def breakpoint_user(self) -> bool:
        """int3 at CPL 3 leaves the guest."""
        return self._intercepts(LabMode.USER, _INT3)

    @experiment
    def breakpoint_real(self) -> bool:
        """int3 in real mode leaves the guest."""
        return self._intercepts(LabMode.REAL, _INT3)

    @experiment
    def hlt_leaves(self) -> bool:
        """hlt in real mode and at CPL 0 leaves the guest: a trap instruction where int3 is none.

        INT1 (F1) would be another, and one that also works with an in-kernel irqchip; it is not
        tried, because QEMU's software SVM stops the whole host at it.
        """
        return all(self._reaches_end(mode) for mode in (LabMode.REAL, LabMode.LONG))

    def _own_int3(self, mode: LabMode) -> bool:
        """Whether the guest's own handler runs, and sees the address after the int3."""
        with self._lab(mode, _INT3 + _NOP) as lab:
            start = lab.rip
            if lab.run() == kvm.KVM_EXIT_HLT:
                return lab.delivered_vector() == VECTOR_BP and lab.pushed_rip() == start + 1
            return False

    @experiment
    def own_int3_native(self) -> bool:
        """The host delivers a guest's own int3 at CPL 0 by itself (if not, pyvmm does)."""
        return self._own_int3(LabMode.LONG)

    @experiment
    def own_int3_user(self) -> bool:
        """A guest's own int3 at CPL 3 reaches its handler."""
        return self._own_int3(LabMode.USER)

    @experiment
    def injection(self) -> Injection:
        """What the host adds to RIP when a #BP is injected after an int3 has left the guest."""
        moved = 8
        with self._lab(LabMode.LONG, _INT3_LONG + _NOP * 32) as lab:
            lab.cpu.set_guest_debug(_ENABLE | _SW_BP)
            if lab.run() not in (kvm.KVM_EXIT_DEBUG, kvm.KVM_EXIT_INTERNAL_ERROR):
                return Injection.UNRELIABLE  # never an exit, so there is nothing to inject after
            regs = lab.cpu.get(kvm.kvm_regs)
            regs.rip += moved
            lab.cpu.set(regs)
            lab.inject(VECTOR_BP)
            if lab.run() != kvm.KVM_EXIT_HLT:
                return Injection.NOTHING
            added = lab.pushed_rip() - (CODE + moved)
            return {0: Injection.NOTHING, len(_INT3_LONG): Injection.EXIT_LENGTH}.get(
                added, Injection.UNRELIABLE
            )

    # --- stepping ---

    def _steps(self, mode: LabMode) -> bool:
        """Whether two single-steps over two instructions stop behind each."""
        with self._lab(mode, _NOP * 4) as lab:
            start = lab.rip
            for executed in (1, 2):
                # A host may stop a few times without progress (see stepping.py).
                for _ in range(16):
                    lab.cpu.set_guest_debug(_ENABLE | _STEP)
                    if lab.run() != kvm.KVM_EXIT_DEBUG:
                        return False
                    if lab.rip != start + executed - 1:
                        break
                if lab.rip != start + executed:
                    return False
            return True

    @experiment
    def step(self) -> bool:
        """Single-step at CPL 0."""
        return self._steps(LabMode.LONG)

    @experiment
    def step_user(self) -> bool:
        """Single-step at CPL 3."""
        return self._steps(LabMode.USER)

    @experiment
    def step_user_delivered(self) -> bool:
        """A single-step at CPL 3 executes its instruction, but its #DB goes to the guest.

        pyvmm takes it back there (steptraps.py), so for its users that is as good.
        """
        with self._lab(LabMode.USER, _NOP * 4) as lab:
            start = lab.rip
            lab.cpu.set_guest_debug(_ENABLE | _STEP)
            lab.run()
            rsp = lab.cpu.get(kvm.kvm_regs).rsp
            return lab.memory.read(rsp, 8) == (start + 1).to_bytes(8, "little")

    @experiment
    def step_real(self) -> bool:
        """Single-step in real mode."""
        return self._steps(LabMode.REAL)

    # --- debug registers ---

    def _hits(self, mode: LabMode, code: bytes, gva: int, kind_and_length: int) -> bool:
        with self._lab(mode, code) as lab:
            dr7 = 0x400 | 2 | kind_and_length << 16
            lab.cpu.set_guest_debug(_ENABLE | _HW_BP, [gva, 0, 0, 0, 0, 0, 0, dr7])
            return lab.run() == kvm.KVM_EXIT_DEBUG and bool(lab.cpu.run.debug.dr6 & DR6_HITS)

    @experiment
    def hardware_breakpoint(self) -> bool:
        """Hardware execute breakpoint at CPL 0."""
        return self._hits(LabMode.LONG, _NOP * 4, CODE + 2, 0b0000)

    @experiment
    def hardware_breakpoint_user(self) -> bool:
        """Hardware execute breakpoint at CPL 3."""
        return self._hits(LabMode.USER, _NOP * 4, CODE + 2, 0b0000)

    @experiment
    def watchpoint(self) -> bool:
        """Hardware watchpoint on data, at CPL 0."""
        store_dword_at_data = b"\x89\x04\x25" + DATA.to_bytes(4, "little")
        return self._hits(LabMode.LONG, store_dword_at_data + _NOP, DATA, 0b1101)

    @experiment
    def watchpoint_user(self) -> bool:
        """Hardware watchpoint on data, at CPL 3."""
        store_dword_at_data = b"\x89\x04\x25" + DATA.to_bytes(4, "little")
        return self._hits(LabMode.USER, store_dword_at_data + _NOP, DATA, 0b1101)

    # --- running ---

    def _reaches_end(self, mode: LabMode, code: bytes = _NOP) -> bool:
        with self._lab(mode, code) as lab:
            start = lab.rip
            return lab.run() == kvm.KVM_EXIT_HLT and lab.rip == start + len(code) + 1

    @experiment
    def long_mode(self) -> bool:
        """A 64-bit guest runs."""
        return self._reaches_end(LabMode.LONG)

    @experiment
    def protected_mode(self) -> bool:
        """A 32-bit guest runs."""
        return self._reaches_end(LabMode.PROTECTED)

    @experiment
    def real_mode(self) -> bool:
        """A 16-bit guest runs."""
        return self._reaches_end(LabMode.REAL)

    @experiment
    def iret32(self) -> bool:
        """`iret` works in 32-bit protected mode."""
        # pushf; push cs; push the address behind; iret
        code = b"\x9c\x0e\x68" + (CODE + 8).to_bytes(4, "little") + b"\xcf"
        return self._reaches_end(LabMode.PROTECTED, code)

    @experiment
    def iret32_leaves(self) -> bool:
        """It does not, but fails in a way that lets pyvmm execute it (emulate.py)."""
        with self._lab(LabMode.PROTECTED, b"\xcf") as lab:
            return lab.run() == kvm.KVM_EXIT_INTERNAL_ERROR and lab.rip == CODE

    @experiment
    def paging32(self) -> bool:
        """Paging can be switched on in 32-bit mode."""
        large_pages_on = bytes.fromhex("b8 00b00000 0f22d8 0f20e0 83c810 0f22e0")  # cr3, CR4.PSE
        paging_on = bytes.fromhex("0f20c0 0d00000080 0f22c0")  # CR0.PG
        with self._lab(LabMode.PROTECTED, large_pages_on + paging_on) as lab:
            present_writable_large = 0x83  # 4 MiB, mapped one to one
            lab.write(DATA, present_writable_large.to_bytes(4, "little"))
            end = lab.rip + len(large_pages_on + paging_on) + 1
            reached = lab.run() == kvm.KVM_EXIT_HLT and lab.rip == end
            return reached and bool(lab.cpu.get(kvm.kvm_sregs).cr0 & CR0_PG)

    @experiment
    def cmpxchg16b(self) -> bool:
        """lock cmpxchg16b at CPL 0."""
        return self._reaches_end(
            LabMode.LONG, b"\xf0\x48\x0f\xc7\x0c\x25" + DATA.to_bytes(4, "little")
        )

    @experiment
    def syscall_user(self) -> bool:
        """`syscall` at CPL 3: the first instruction at its entry is executed at CPL 0."""
        code = b"\x0f\x05"
        with self._lab(LabMode.USER, code) as lab:
            sregs = lab.cpu.get(kvm.kvm_sregs)
            sregs.efer |= EFER_SCE
            lab.cpu.set(sregs)
            entry = CODE + len(code)  # where the lab's hlt is, which is #GP at CPL 3
            lab.cpu.set_msrs({MSR_STAR: KERNEL_CODE << 32, MSR_LSTAR: entry})
            return lab.run() == kvm.KVM_EXIT_HLT and lab.rip == entry + 1

    @experiment
    def crash_registers(self) -> bool:
        """After a triple fault the registers are those of the guest (AMD's KVM resets them)."""
        with self._lab(LabMode.LONG, b"\x0f\x0b") as lab:
            sregs = lab.cpu.get(kvm.kvm_sregs)
            sregs.idt.limit = 0
            lab.cpu.set(sregs)
            return lab.run() == kvm.KVM_EXIT_SHUTDOWN and lab.rip == CODE

    def _extension(self, capability: int) -> bool:
        system = handles.SystemHandle(self.device)
        try:
            return system.check_extension(capability) > 0
        finally:
            system.close()

    @experiment
    def irqchip(self) -> bool:
        """In-kernel interrupt controllers."""
        return self._extension(kvm.KVM_CAP_IRQCHIP)

    @experiment
    def coalesced_pio(self) -> bool:
        """Port writes can be collected by the kernel."""
        return self._extension(kvm.KVM_CAP_COALESCED_PIO)

    @experiment
    def readonly_memory(self) -> bool:
        """Memory slots can be read-only."""
        return self._extension(kvm.KVM_CAP_READONLY_MEM)

    @experiment
    def statistics(self) -> bool:
        """Binary statistics descriptors."""
        return self._extension(kvm.KVM_CAP_BINARY_STATS_FD)


class Finding(NamedTuple):
    """A row of the table: `name` is what --require takes, `good`/`bad` what it means to a user."""

    name: str
    title: str
    measure: Callable[[HostProbe], bool]
    good: str
    bad: str


FINDINGS = (
    Finding(
        "long-mode", "64-bit guests", lambda h: h.long_mode,
        "run", "do not run: pyvmm is of little use here",
    ),
    Finding(
        "protected-mode", "32-bit guests", lambda h: h.protected_mode,
        "run", "do not run",
    ),
    Finding(
        "real-mode", "16-bit guests", lambda h: h.real_mode,
        "run", "do not run",
    ),
    Finding(
        "iret32", "iret in 32-bit mode", lambda h: h.iret32 or h.iret32_leaves,
        "32-bit kernels can take interrupts",
        "32-bit kernels that take interrupts fail",
    ),
    Finding(
        "paging32", "paging in 32-bit mode", lambda h: h.paging32,
        "32-bit kernels can have page tables",
        "32-bit kernels get #GP when they switch paging on; 64-bit ones are not affected",
    ),
    Finding(
        "breakpoint", "software breakpoints, CPL 0", lambda h: h.breakpoint,
        "break works in kernels", "int3 stays in the guest: the debugger plants hlt instead",
    ),
    Finding(
        "breakpoint-user", "software breakpoints, CPL 3", lambda h: h.breakpoint_user,
        "break works in user programs",
        "int3 stays in the guest: break works once it has a #GP handler",
    ),
    Finding(
        "breakpoint-real", "software breakpoints, real mode",
        lambda h: h.breakpoint_real or h.hlt_leaves,
        "break works in real mode", "break fails in real mode: use hbreak",
    ),
    Finding(
        "own-int3", "a guest's own int3", lambda h: h.own_int3_native or h.breakpoint,
        "reaches the guest's handler, with the right return address", "is lost",
    ),
    Finding(
        "injection", "breakpoints handed back to the guest",
        lambda h: h.injection is not Injection.UNRELIABLE,
        "KVM would do it right; pyvmm does it on every host",
        "KVM would return to the wrong address; pyvmm does it",
    ),
    Finding(
        "step", "single-step, CPL 0", lambda h: h.step,
        "stepi works in kernels", "stepi fails",
    ),
    Finding(
        "step-user", "single-step, CPL 3", lambda h: h.step_user or h.step_user_delivered,
        "stepi works in user programs", "a step in a user program traps into the guest's kernel",
    ),
    Finding(
        "step-real", "single-step, real mode", lambda h: h.step_real,
        "stepi works in real mode", "stepi fails in real mode",
    ),
    Finding(
        "hw-breakpoint", "hardware breakpoints, CPL 0", lambda h: h.hardware_breakpoint,
        "hbreak works in kernels, also before code is loaded", "hbreak never stops",
    ),
    Finding(
        "hw-breakpoint-user", "hardware breakpoints, CPL 3",
        lambda h: h.hardware_breakpoint_user,
        "hbreak works in user programs", "hbreak never stops in user programs",
    ),
    Finding(
        "watchpoint", "watchpoints, CPL 0", lambda h: h.watchpoint,
        "watch stops when data is touched", "watch never stops: gdb must step (slow)",
    ),
    Finding(
        "watchpoint-user", "watchpoints, CPL 3", lambda h: h.watchpoint_user,
        "watch works in user programs", "watch never stops in user programs",
    ),
    Finding(
        "cmpxchg16b", "lock cmpxchg16b, CPL 0", lambda h: h.cmpxchg16b,
        "kernels can use it", "fails, so CPUID hides it from Linux",
    ),
    Finding(
        "syscall-user", "syscall, CPL 3", lambda h: h.syscall_user,
        "enters the kernel", "stays at CPL 3: kernels boot, and their programs cannot call them",
    ),
    Finding(
        "crash-registers", "registers after a triple fault", lambda h: h.crash_registers,
        "are the guest's", "are lost: the host has reset the vCPU",
    ),
    Finding(
        "irqchip", "in-kernel interrupt controllers", lambda h: h.irqchip,
        "interrupts and several processors work", "guests get no interrupts",
    ),
    Finding(
        "coalesced-pio", "coalesced port writes", lambda h: h.coalesced_pio,
        "printing is fast", "printing costs an exit a byte",
    ),
    Finding(
        "readonly-memory", "read-only memory", lambda h: h.readonly_memory,
        "guests can have ROM", "no ROM for guests",
    ),
    Finding(
        "statistics", "KVM statistics", lambda h: h.statistics,
        "exits are counted by the kernel; halted vCPUs are told apart", "no exit statistics",
    ),
)  # fmt: skip


def host(device: str = "/dev/kvm") -> HostProbe:
    """The findings about this host, shared by all VMs of the process."""
    return _host(device)


_host = functools.cache(HostProbe)
