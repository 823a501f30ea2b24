"""The devices of a PC, and where they are.

    port    IRQ
    0x3F8   4    COM1
    0x0E9        debug console, QEMU's and Bochs's
    0x0F4        debug-exit, QEMU's
    0x060   1    keyboard controller (and 0x64)
    0x070        clock and CMOS memory
    0x3C0        screen
    0x510        fw_cfg, QEMU's
    0x600        power management: off at 0x604 and 0xB004, a timer at 0x608
    0xCF9        reset

PICs, IOAPIC, LAPICs and the PIT are in the kernel, in a machine that has them.  COM1 and the two
debug ports exist from the start.  The others are made when the guest touches their ports, and their
modules imported then: most guests touch few of them, and would wait for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from pyvmm.bus import Bus, Device, LateDevices
from pyvmm.devices.debugcon import DEBUGCON_PORT, DebugConsole
from pyvmm.devices.debugexit import DEBUG_EXIT_PORT, DebugExit
from pyvmm.devices.serial import COM1_IRQ, COM1_PORT, Serial
from pyvmm.light import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from pyvmm.devices.ps2 import Ps2
    from pyvmm.devices.vga import Vga


class Wiring(NamedTuple):
    """What devices do to the machine around them; `set_irq` takes an IRQ and a level."""

    transmit: Callable[[bytes], None]
    wake: Callable[[], None]
    set_irq: Callable[[int, bool], None]
    reset: Callable[[], None]
    power_off: Callable[[], None]
    debug_exit: Callable[[int], None]


class Facts(NamedTuple):
    """What devices tell the guest of the machine; memory in bytes."""

    memory_below_4g: int
    memory_above_4g: int
    cpus: int
    command_line: bytes


class Pc:
    """All devices of one machine."""

    def __init__(self, ports: Bus, wiring: Wiring, facts: Facts) -> None:
        """Put them on `ports`."""
        self._wiring, self._facts = wiring, facts
        self.serial = Serial(wiring.transmit, wiring.wake, self._irq(COM1_IRQ))
        self.debug_console = DebugConsole(wiring.transmit)
        self._resets = [self.serial.reset]  # of the devices that were made
        ports.claim(COM1_PORT, Serial.size, self.serial, "COM1")
        ports.claim(DEBUGCON_PORT, DebugConsole.size, self.debug_console, "debug console")
        debug_exit = DebugExit(wiring.debug_exit)
        ports.claim(DEBUG_EXIT_PORT, DebugExit.size, debug_exit, "debug-exit")
        self._late: dict[str, LateDevices] = {}
        for name, make, places in (
            ("keyboard controller", self._make_keyboard, {0x60: 1, 0x64: 1}),
            ("clock", self._make_clock, {0x70: 2}),
            ("screen", self._make_screen, {0x3C0: 0x20}),
            ("fw_cfg", self._make_fw_cfg, {0x510: 2}),
            ("power management", self._make_power, {0x600: 4, 0x604: 2, 0x608: 4, 0xB004: 2}),
            ("reset control", self._make_reset_control, {0xCF9: 1}),
        ):
            late = self._late[name] = LateDevices(make)
            for port, size in places.items():
                ports.claim(port, size, late.at(port), name)

    def _irq(self, number: int) -> Callable[[bool], None]:
        return partial(self._wiring.set_irq, number)

    @property
    def keyboard(self) -> Ps2:
        """What types for the guest."""
        self._late["keyboard controller"].get(0x60)
        return self._ps2

    @property
    def screen(self) -> Vga:
        """Where the cursor is."""
        return cast("Vga", self._late["screen"].get(0x3C0))

    def reset(self) -> None:
        """All devices back to power-on; the clock goes on."""
        for reset in self._resets:
            reset()

    # --- one function for each group of devices that is made later --------------------------------

    def _make_keyboard(self) -> Mapping[int, Device]:
        from pyvmm.devices.ps2 import KEYBOARD_IRQ, MOUSE_IRQ, Ps2

        self._ps2 = Ps2(self._wiring.reset, self._irq(KEYBOARD_IRQ), self._irq(MOUSE_IRQ))
        self._resets.append(self._ps2.reset)
        return {0x60: self._ps2.data_port, 0x64: self._ps2.command_port}

    def _make_clock(self) -> Mapping[int, Device]:
        from pyvmm.devices.rtc import Rtc

        rtc = Rtc(self._facts.memory_below_4g, self._facts.memory_above_4g)
        self._resets.append(rtc.reset)
        return {0x70: rtc}

    def _make_screen(self) -> Mapping[int, Device]:
        from pyvmm.devices.vga import Vga

        vga = Vga()
        self._resets.append(vga.reset)
        return {0x3C0: vga}

    def _make_fw_cfg(self) -> Mapping[int, Device]:
        from pyvmm.devices.fwcfg import FwCfg

        memory = self._facts.memory_below_4g + self._facts.memory_above_4g
        fw_cfg = FwCfg(memory, self._facts.cpus, self._facts.command_line)
        self._resets.append(fw_cfg.reset)
        return {0x510: fw_cfg}

    def _make_power(self) -> Mapping[int, Device]:
        from pyvmm.devices.pm import Pm1Control, Pm1Events, PmTimer

        timer, control = PmTimer(), Pm1Control(self._wiring.power_off)
        events = Pm1Events(timer)
        self._resets += [events.reset, control.reset]
        return {0x600: events, 0x604: control, 0x608: timer, 0xB004: control}

    def _make_reset_control(self) -> Mapping[int, Device]:
        from pyvmm.devices.pm import ResetControl

        control = ResetControl(self._wiring.reset)
        self._resets.append(control.reset)
        return {0xCF9: control}
