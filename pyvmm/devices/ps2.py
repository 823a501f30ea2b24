"""The PS/2 keyboard controller (8042) at ports 0x60 and 0x64, and the keyboard behind it.

It begins as firmware leaves it: self-test passed, keyboard on, interrupts on, scan codes
translated to set 1.  Commands take no time, so the input buffer is never full.  At the second port
there is no mouse: what is sent there is answered by a timeout.  LEDs and typematic rates are
accepted and have no effect, and the A20 gate is open whatever the output port says.
Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller"
and "Keyboards".
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pyvmm.devices.bytewise import BytewiseDevice
from pyvmm.devices.keymap import RELEASED, TO_SET_1, scan_codes, typed

PS2_DATA_PORT, PS2_COMMAND_PORT = 0x60, 0x64
KEYBOARD_IRQ, MOUSE_IRQ = 1, 12

# Status, as the command port reads.
STATUS_OUTPUT_FULL = 0x01
STATUS_SELF_TEST_PASSED = 0x04
STATUS_COMMAND = 0x08  # what was written last was a command
STATUS_UNLOCKED = 0x10
STATUS_FROM_MOUSE = 0x20
STATUS_TIMEOUT = 0x40

# The command byte.
KEYBOARD_INTERRUPT, MOUSE_INTERRUPT = 0x01, 0x02
KEYBOARD_OFF, MOUSE_OFF = 0x10, 0x20
TRANSLATE = 0x40

# The output port.
NO_RESET, A20_GATE = 0x01, 0x02
OUTPUT_PORT_AT_START = 0xCF

# Commands to the controller.  The first five are followed by a byte at the data port.
WRITE_COMMAND_BYTE, WRITE_OUTPUT_PORT = 0x60, 0xD1
WRITE_KEYBOARD_BUFFER, WRITE_MOUSE_BUFFER, WRITE_TO_MOUSE = 0xD2, 0xD3, 0xD4
READ_COMMAND_BYTE, READ_OUTPUT_PORT = 0x20, 0xD0
PULSE_OUTPUT_PORT = 0xF0  # up to 0xFF: the bits that are 0 are pulsed; 0xFE is the usual reset
CONSTANT_ANSWERS = {
    0xAA: 0x55,  # self-test: passed
    0xAB: 0x00,  # test of the keyboard's lines: no error
    0xA9: 0x00,  # of the mouse's
    0xC0: 0x80,  # input port: keyboard not locked
}
SWITCHED_OFF = {0xAD: KEYBOARD_OFF, 0xA7: MOUSE_OFF}
SWITCHED_ON = {0xAE: KEYBOARD_OFF, 0xA8: MOUSE_OFF}
A20_OFF, A20_ON = 0xDD, 0xDF

# Commands to the keyboard.  The first three are followed by a parameter.
SET_LEDS, SCAN_CODE_SET, SET_TYPEMATIC = 0xED, 0xF0, 0xF3
ECHO, IDENTIFY, KEYBOARD_RESET = 0xEE, 0xF2, 0xFF
ENABLE_SCANNING, DISABLE_SCANNING, SET_DEFAULTS = 0xF4, 0xF5, 0xF6
ACKNOWLEDGE, RESEND = b"\xfa", b"\xfe"
SELF_TEST_PASSED, KEYBOARD_ID = b"\xaa", b"\xab\x83"

QUEUE_BYTES = 256


class Keyboard:
    """A keyboard: it is sent commands and has bytes for the controller.  Its owner locks it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Back to the state at power-on."""
        self._answers: deque[int] = deque()
        self._keys: deque[int] = deque()
        self._wants_parameter = 0  # the command that does
        self._scan_set = 2
        self._scanning = True

    def type(self, data: bytes) -> None:
        """Press the keys for a terminal's input; from the first that does not fit on they are lost.

        A key is queued as a whole or not at all: none seems to be held down for ever.
        """
        for chord in typed(data):
            codes = scan_codes(chord, self._scan_set)
            if not self._scanning or len(self._keys) + len(codes) > QUEUE_BYTES:
                return
            self._keys.extend(codes)

    def next(self) -> int | None:
        """Take the next byte for the controller: answers come before keys."""
        if self._answers:
            return self._answers.popleft()
        return self._keys.popleft() if self._keys else None

    def write(self, value: int) -> None:
        """A command or its parameter.  Answers to the one before that wait here are dropped."""
        command, self._wants_parameter = self._wants_parameter, 0
        answer = self._parameter(command, value) if command else self._command(value)
        self._answers = deque(answer)

    def _command(self, command: int) -> bytes:
        if command in (SET_LEDS, SCAN_CODE_SET, SET_TYPEMATIC):
            self._wants_parameter = command
        elif command in (KEYBOARD_RESET, SET_DEFAULTS, DISABLE_SCANNING):
            self.reset()
            self._scanning = command != DISABLE_SCANNING
            if command == KEYBOARD_RESET:
                return ACKNOWLEDGE + SELF_TEST_PASSED
        elif command == ENABLE_SCANNING:
            self._keys.clear()
            self._scanning = True
        elif command == IDENTIFY:
            return ACKNOWLEDGE + KEYBOARD_ID
        elif command == ECHO:
            return bytes((ECHO,))
        else:
            return RESEND
        return ACKNOWLEDGE

    def _parameter(self, command: int, value: int) -> bytes:
        if command == SCAN_CODE_SET:
            if value == 0:
                return ACKNOWLEDGE + bytes((self._scan_set,))
            if value > 3:
                return RESEND
            self._scan_set = value
        return ACKNOWLEDGE


class _Port(BytewiseDevice):
    size = 1

    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read, self._write = read, write

    def read_byte(self, offset: int) -> int:
        return self._read()

    def write_byte(self, offset: int, value: int) -> None:
        self._write(value)


class _Line:
    """An interrupt line, low at first: `irq` is called when the level changes."""

    def __init__(self, irq: Callable[[bool], None]) -> None:
        self._irq, self._level = irq, False

    def set(self, level: bool) -> None:
        if level != self._level:
            self._level = level
            self._irq(level)


class Ps2:
    """The controller: `data_port` and `command_port` go on the bus."""

    def __init__(
        self,
        reset: Callable[[], None],
        irq: Callable[[bool], None] = lambda level: None,
        mouse_irq: Callable[[bool], None] = lambda level: None,
    ) -> None:
        """`reset` is called when the guest asks for it; the others set interrupt lines."""
        self._reset_machine = reset
        self._keyboard_line, self._mouse_line = _Line(irq), _Line(mouse_irq)
        self.data_port = _Port(self._read_data, self._write_data)
        self.command_port = _Port(self._read_status, self._write_command)
        self._lock = threading.Lock()  # guards all below
        self._power_on()

    def _power_on(self) -> None:
        self._keyboard = Keyboard()
        self._command_byte = KEYBOARD_INTERRUPT | TRANSLATE | MOUSE_OFF
        self._output_port = OUTPUT_PORT_AT_START
        self._wants_data = 0  # the command that does
        self._last_written = 0  # or STATUS_COMMAND
        self._reply: tuple[int, int] | None = None  # the controller's own, and its status bits
        self._output = 0  # the output buffer; still there when it has been read
        self._output_status = 0  # STATUS_OUTPUT_FULL and what goes with it, or 0
        self._output_is_reply = False

    def reset(self) -> None:
        """Back to the state in which firmware leaves it; keys that were not read are forgotten."""
        with self._lock:
            self._power_on()
            self._update_irqs()

    def type_bytes(self, data: bytes) -> None:
        """Type what a terminal has sent, as far as the keyboard's queue has room for it."""
        with self._lock:
            self._keyboard.type(data)
            self._fill_output()

    def _read_status(self) -> int:
        always = STATUS_SELF_TEST_PASSED | STATUS_UNLOCKED
        return always | self._last_written | self._output_status

    def _read_data(self) -> int:
        with self._lock:
            value = self._output
            self._output_status = 0
            self._update_irqs()  # each byte is an interrupt of its own, even if the next is here
            self._fill_output()
            return value

    def _write_data(self, value: int) -> None:
        with self._lock:
            self._last_written = 0
            command, self._wants_data = self._wants_data, 0
            resets = command == WRITE_OUTPUT_PORT and not value & NO_RESET
            if command == WRITE_COMMAND_BYTE:
                self._command_byte = value
            elif command == WRITE_OUTPUT_PORT:
                self._output_port = value | NO_RESET
            elif command == WRITE_KEYBOARD_BUFFER:
                self._answer(value)
            elif command == WRITE_MOUSE_BUFFER:
                self._answer(value, STATUS_FROM_MOUSE)
            elif command == WRITE_TO_MOUSE:
                self._answer(RESEND[0], STATUS_FROM_MOUSE | STATUS_TIMEOUT)
            else:
                self._keyboard.write(value)
                self._command_byte &= ~KEYBOARD_OFF
            self._fill_output()
        if resets:
            self._reset_machine()

    def _write_command(self, command: int) -> None:
        with self._lock:
            self._last_written, self._wants_data = STATUS_COMMAND, 0
            if command in CONSTANT_ANSWERS:
                self._answer(CONSTANT_ANSWERS[command])
            elif command == READ_COMMAND_BYTE:
                self._answer(self._command_byte)
            elif command == READ_OUTPUT_PORT:
                self._answer(self._output_port)
            elif command == WRITE_COMMAND_BYTE or WRITE_OUTPUT_PORT <= command <= WRITE_TO_MOUSE:
                self._wants_data = command
            elif command == A20_OFF:
                self._output_port &= ~A20_GATE
            elif command == A20_ON:
                self._output_port |= A20_GATE
            self._command_byte |= SWITCHED_OFF.get(command, 0)
            self._command_byte &= ~SWITCHED_ON.get(command, 0)
            self._fill_output()
        if command >= PULSE_OUTPUT_PORT and not command & NO_RESET:
            self._reset_machine()

    def _answer(self, value: int, status: int = 0) -> None:
        """The controller says something: it replaces an unread reply, but no byte of a key."""
        self._reply = value, STATUS_OUTPUT_FULL | status
        if self._output_is_reply:
            self._output_status = 0

    def _fill_output(self) -> None:
        if not self._output_status:
            if self._reply is not None:
                self._output, self._output_status = self._reply
                self._reply, self._output_is_reply = None, True
            elif not self._command_byte & KEYBOARD_OFF:
                code = self._next_code()
                if code is not None:
                    self._output, self._output_status = code, STATUS_OUTPUT_FULL
                    self._output_is_reply = False
        self._update_irqs()

    def _next_code(self) -> int | None:
        """The next byte from the keyboard, translated if that is on; this is for set 2."""
        code = self._keyboard.next()
        if code is None or not self._command_byte & TRANSLATE:
            return code
        if code == RELEASED:
            released_key = self._keyboard.next() or 0
            return TO_SET_1.get(released_key, released_key) | 0x80
        return TO_SET_1.get(code, code)

    def _update_irqs(self) -> None:
        status, enabled = self._output_status, self._command_byte
        from_mouse = status & STATUS_FROM_MOUSE
        keyboard_wants = enabled & KEYBOARD_INTERRUPT and not enabled & KEYBOARD_OFF
        self._keyboard_line.set(bool(status and not from_mouse and keyboard_wants))
        self._mouse_line.set(bool(from_mouse and enabled & MOUSE_INTERRUPT))
