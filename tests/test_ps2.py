"""The keyboard controller and its keyboard, as drivers use them.

The expected bytes are those that QEMU 7.2's i8042 and keyboard answered to the same accesses,
unless it says otherwise.
"""

from __future__ import annotations

import string
import threading

import pytest

from pyvmm.devices.keymap import scan_codes, typed
from pyvmm.devices.ps2 import (
    QUEUE_BYTES,
    STATUS_COMMAND,
    STATUS_FROM_MOUSE,
    STATUS_OUTPUT_FULL,
    STATUS_TIMEOUT,
    Ps2,
)

UNTRANSLATED = 0x25  # a command byte: keyboard interrupt, no translation


class Line:
    """An interrupt line as an edge-triggered controller sees it."""

    def __init__(self) -> None:
        self.level, self.edges = False, 0

    def __call__(self, level: bool) -> None:
        assert level != self.level
        self.level = level
        self.edges += level


class Keyboard:
    """A controller and what it did, with accesses as a driver makes them."""

    def __init__(self) -> None:
        self.resets = 0
        self.irq, self.mouse_irq = Line(), Line()
        self.controller = Ps2(self._reset, self.irq, self.mouse_irq)

    def _reset(self) -> None:
        self.resets += 1

    @property
    def status(self) -> int:
        return self.controller.command_port.read(0, 1)

    def command(self, command: int, *data: int) -> None:
        """Give the controller a command."""
        self.controller.command_port.write(0, 1, command)
        self.send(*data)

    def send(self, *data: int) -> None:
        """Write to the data port: for the keyboard, unless a command precedes."""
        for value in data:
            self.controller.data_port.write(0, 1, value)

    def read(self) -> int:
        return self.controller.data_port.read(0, 1)

    def read_all(self) -> bytes:
        """What a driver gets that reads as long as there is something."""
        got = bytearray()
        while self.status & STATUS_OUTPUT_FULL:
            got.append(self.read())
        return bytes(got)

    def type(self, data: bytes) -> bytes:
        """What a driver gets when somebody types."""
        self.controller.type_bytes(data)
        return self.read_all()


@pytest.fixture
def keyboard() -> Keyboard:
    return Keyboard()


def hexed(data: bytes) -> str:
    return data.hex(" ")


# --- the controller ------------------------------------------------------------------------------


def test_it_begins_as_firmware_leaves_it(keyboard: Keyboard) -> None:
    assert keyboard.status & ~STATUS_COMMAND == 0x14  # self-test passed, not locked, empty
    keyboard.command(0x20)
    assert keyboard.read() == 0x61
    assert keyboard.type(b"a") == b"\x1e\x9e"


@pytest.mark.parametrize(
    ("command", "answer"),
    [(0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00), (0xC0, 0x80), (0x20, 0x61), (0xD0, 0xCF)],
)
def test_a_command_is_answered(keyboard: Keyboard, command: int, answer: int) -> None:
    keyboard.command(command)
    assert keyboard.status & 0x3F == 0x1D
    assert keyboard.read() == answer
    assert keyboard.status & STATUS_OUTPUT_FULL == 0


def test_status_tells_whether_a_command_or_data_was_written_last(keyboard: Keyboard) -> None:
    # As the manual says; QEMU's bit is always set.
    keyboard.command(0xAE)
    assert keyboard.status & STATUS_COMMAND
    keyboard.send(0xF4)
    assert not keyboard.status & STATUS_COMMAND


@pytest.mark.parametrize("value", [0x00, 0x25, 0x65, 0xFF])
def test_the_command_byte_reads_as_written(keyboard: Keyboard, value: int) -> None:
    keyboard.command(0x60, value)
    keyboard.command(0x20)
    assert keyboard.read() == value


@pytest.mark.parametrize(("off", "on", "bit"), [(0xAD, 0xAE, 0x10), (0xA7, 0xA8, 0x20)])
def test_ports_are_switched_off_and_on_in_the_command_byte(
    keyboard: Keyboard, off: int, on: int, bit: int
) -> None:
    keyboard.command(off)
    keyboard.command(0x20)
    assert keyboard.read() & bit
    keyboard.command(on)
    keyboard.command(0x20)
    assert not keyboard.read() & bit


def test_a_keyboard_that_is_switched_off_keeps_its_keys(keyboard: Keyboard) -> None:
    keyboard.command(0xAD)
    assert keyboard.type(b"a") == b""
    keyboard.command(0xAA)  # the controller itself still answers
    assert keyboard.read_all() == b"\x55"
    keyboard.command(0xAE)
    assert keyboard.read_all() == b"\x1e\x9e"


def test_sending_to_the_keyboard_switches_it_on(keyboard: Keyboard) -> None:
    keyboard.command(0xAD)
    keyboard.send(0xEE)
    assert keyboard.read() == 0xEE
    keyboard.command(0x20)
    assert keyboard.read() == 0x61


def test_the_last_byte_can_be_read_again(keyboard: Keyboard) -> None:
    assert keyboard.type(b"a") == b"\x1e\x9e"
    assert keyboard.read() == 0x9E


def test_an_unread_answer_gives_way_to_the_next(keyboard: Keyboard) -> None:
    for command in (0xAA, 0xAB, 0x20):
        keyboard.command(command)
    assert keyboard.read_all() == b"\x61"


def test_an_answer_waits_behind_an_unread_key_but_comes_before_the_next(keyboard: Keyboard) -> None:
    keyboard.controller.type_bytes(b"ab")
    keyboard.command(0xAA)
    assert hexed(keyboard.read_all()) == "1e 55 9e 30 b0"


def test_a_command_that_waits_for_data_is_dropped_by_the_next(keyboard: Keyboard) -> None:
    keyboard.command(0x60)
    keyboard.command(0x20)
    keyboard.send(0xEE)  # an echo of the keyboard's, and no command byte
    assert hexed(keyboard.read_all()) == "61 ee"


@pytest.mark.parametrize(
    ("command", "status"), [(0xD2, STATUS_OUTPUT_FULL), (0xD3, STATUS_OUTPUT_FULL | 0x20)]
)
def test_the_output_buffer_can_be_written(keyboard: Keyboard, command: int, status: int) -> None:
    keyboard.command(command, 0xF0)
    assert keyboard.status & 0x21 == status
    assert keyboard.read_all() == b"\xf0"  # not taken for a scan code
    assert keyboard.status & 0x21 == 0


def test_nobody_answers_for_the_mouse(keyboard: Keyboard) -> None:
    # QEMU has a mouse; this is what IBM's manual says of a device that is not there.
    keyboard.command(0xD4, 0xFF)
    assert keyboard.status & 0x61 == STATUS_OUTPUT_FULL | STATUS_FROM_MOUSE | STATUS_TIMEOUT
    assert keyboard.read_all() == b"\xfe"
    assert keyboard.type(b"a") == b"\x1e\x9e"
    assert keyboard.status & 0x61 == 0


def test_the_a20_gate_is_kept_in_the_output_port(keyboard: Keyboard) -> None:
    for command, data, expected in [
        (0xD1, [0xDD], 0xDD),
        (0xDF, [], 0xDF),
        (0xDD, [], 0xDD),
        (0xD1, [0xDF], 0xDF),
        (0xFF, [], 0xDF),  # pulses nothing: said to make A20 take effect
    ]:
        keyboard.command(command, *data)
        keyboard.command(0xD0)
        assert keyboard.read() == expected
    assert keyboard.resets == 0


@pytest.mark.parametrize(
    ("command", "data", "resets"),
    [
        (0xFE, [], 1),
        (0xF0, [], 1),
        (0xFC, [], 1),
        (0xFF, [], 0),
        (0xFD, [], 0),
        (0xD1, [0xFE], 1),
        (0xD1, [0x00], 1),
        (0xD1, [0x01], 0),
    ],
)
def test_what_resets_the_machine(
    keyboard: Keyboard, command: int, data: list[int], resets: int
) -> None:
    keyboard.command(command, *data)
    assert keyboard.resets == resets


def test_when_the_reset_ends_the_vcpu_s_thread_the_controller_goes_on(keyboard: Keyboard) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    controller = Ps2(stop)
    for port, value in (controller.command_port, 0xFE), (controller.data_port, 0xFE):
        controller.command_port.write(0, 1, 0xD1)
        with pytest.raises(Stopped):
            port.write(0, 1, value)
        controller.reset()
    controller.type_bytes(b"a")
    assert controller.data_port.read(0, 1) == 0x1E


def test_after_a_reset_it_is_as_new(keyboard: Keyboard) -> None:
    keyboard.command(0x60, 0x02)
    keyboard.command(0xD1, 0x01)
    keyboard.send(0xF0, 0x01)
    keyboard.send(0xED)
    keyboard.controller.type_bytes(b"old")
    keyboard.command(0xD3, 0x11)
    keyboard.controller.reset()
    assert not keyboard.irq.level
    assert not keyboard.mouse_irq.level
    assert keyboard.status == 0x14
    keyboard.command(0xD0)
    assert keyboard.read_all() == b"\xcf"
    test_it_begins_as_firmware_leaves_it(keyboard)


# --- the keyboard's commands ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        ([0xFF], "fa aa"),
        ([0xF2], "fa ab 83"),
        ([0xEE], "ee"),
        ([0xF4], "fa"),
        ([0xF5], "fa"),
        ([0xF6], "fa"),
        ([0xED, 0x07], "fa fa"),
        ([0xF3, 0x2B], "fa fa"),
        ([0xF0, 0x00], "fa fa 02"),
        ([0xF0, 0x01], "fa fa"),
        ([0xF0, 0x07], "fa fe"),
        ([0x00], "fe"),
        ([0x01], "fe"),
        ([0xE5], "fe"),
        ([0xFE], "fe"),
    ],
)
def test_the_keyboard_answers_commands(keyboard: Keyboard, sent: list[int], answers: str) -> None:
    keyboard.command(0x60, UNTRANSLATED)
    got = bytearray()
    for value in sent:
        keyboard.send(value)
        got += keyboard.read_all()
    assert hexed(got) == answers


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        ([0xF2], "fa ab 41"),
        ([0xF0, 0x00], "fa 41"),
        ([0xF0, 0x01, 0xF0, 0x00], "fa 43"),
        ([0xF0, 0x03, 0xF0, 0x00], "fa 3f"),
        ([0xFF], "fa aa"),
    ],
)
def test_answers_of_the_keyboard_are_translated_too(
    keyboard: Keyboard, sent: list[int], answers: str
) -> None:
    for value in sent:
        keyboard.read_all()
        keyboard.send(value)
    assert hexed(keyboard.read_all()) == answers


def test_a_parameter_that_looks_like_a_command_is_none(keyboard: Keyboard) -> None:
    keyboard.send(0xED)
    keyboard.send(0xFF)
    assert hexed(keyboard.read_all()) == "fa fa"
    keyboard.send(0xEE)
    assert hexed(keyboard.read_all()) == "ee"


def test_answers_come_before_keys_that_wait(keyboard: Keyboard) -> None:
    keyboard.controller.type_bytes(b"ab")
    assert keyboard.read() == 0x1E
    keyboard.send(0xED)
    assert hexed(keyboard.read_all()) == "9e fa 30 b0"


@pytest.mark.parametrize("command", [0xF4, 0xF5, 0xF6, 0xFF])
def test_commands_that_forget_keys(keyboard: Keyboard, command: int) -> None:
    keyboard.command(0xAD)
    keyboard.controller.type_bytes(b"abc")
    keyboard.send(command)
    assert keyboard.read_all().rstrip(b"\xaa") == b"\xfa"


def test_keys_are_lost_while_scanning_is_disabled(keyboard: Keyboard) -> None:
    keyboard.send(0xF5)
    assert keyboard.type(b"a") == b"\xfa"
    keyboard.send(0xF4)
    assert keyboard.type(b"b") == b"\xfa\x30\xb0"
    keyboard.send(0xF5)
    keyboard.send(0xFF)
    assert keyboard.type(b"c") == b"\xfa\xfa\xaa\x2e\xae"


# --- keys ----------------------------------------------------------------------------------------


def test_each_scan_code_set_has_its_codes(keyboard: Keyboard) -> None:
    text = b"A\x1b[A\\"
    assert hexed(keyboard.type(text)) == "2a 1e 9e aa e0 48 e0 c8 2b ab"
    keyboard.command(0x60, UNTRANSLATED)
    for scan_set, codes in [
        (1, "2a 1e 9e aa e0 48 e0 c8 2b ab"),
        (2, "12 1c f0 1c f0 12 e0 75 e0 f0 75 5d f0 5d"),
        (3, "12 1c f0 1c f0 12 63 f0 63 5c f0 5c"),
    ]:
        keyboard.send(0xF0)
        keyboard.read_all()
        keyboard.send(scan_set)
        assert keyboard.read_all() == b"\xfa"
        assert hexed(keyboard.type(text)) == codes


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (b"\r", "1c 9c"),
        (b"\n", "1c 9c"),
        (b"\x7f", "0e 8e"),
        (b"\b", "0e 8e"),
        (b"\t", "0f 8f"),
        (b"\x1b", "01 81"),
        (b" ", "39 b9"),
        (b"0", "0b 8b"),
        (b")", "2a 0b 8b aa"),
        (b"~", "2a 29 a9 aa"),
        (b"\x03", "1d 2e ae 9d"),  # ^C
        (b"\x1f", "1d 2a 0c 8c aa 9d"),  # ^_ is control, shift and minus
        (b"\x1b[D", "e0 4b e0 cb"),
        (b"\x1b[3~", "e0 53 e0 d3"),
        (b"\x1b[1~", "e0 47 e0 c7"),
        (b"\x1bOP", "3b bb"),
        (b"\x1b[18~", "41 c1"),  # F7, whose code is the only one above 0x7f in set 2
        (b"\x1bx", "01 81 2d ad"),
        (b"\x1b[", "01 81 1a 9a"),
        (b"\xc3\xa4\xff", ""),  # on no key of a US keyboard
    ],
)
def test_what_a_terminal_sends_becomes_keys(keyboard: Keyboard, data: bytes, codes: str) -> None:
    assert hexed(keyboard.type(data)) == codes
    assert hexed(keyboard.type(data + data)) == f"{codes} {codes}".strip()


# A US keyboard as a driver for set 1 knows it: what each key types, by its code.
PLAIN = "\0\x1b1234567890-=\b\tqwertyuiop[]\r\0asdfghjkl;'`\0\\zxcvbnm,./\0\0\0 "
SHIFTED = '\0\x1b!@#$%^&*()_+\b\tQWERTYUIOP{}\r\0ASDFGHJKL:"~\0|ZXCVBNM<>?\0\0\0 '


def decoded(codes: bytes) -> str:
    """What a driver makes of scan codes."""
    text, shift, control = "", False, False
    for code in codes:
        if code & 0x7F == 0x2A:
            shift = code < 0x80
        elif code & 0x7F == 0x1D:
            control = code < 0x80
        elif code < 0x80:
            character = (SHIFTED if shift else PLAIN)[code]
            text += chr(ord(character.upper()) & 0x1F) if control else character
    return text


def test_a_guest_s_driver_reads_every_character_that_was_typed(keyboard: Keyboard) -> None:
    controls = "".join(map(chr, range(0x20)))
    for character in string.ascii_letters + string.digits + string.punctuation + " " + controls:
        got = decoded(keyboard.type(character.encode()))
        assert got == character.replace("\n", "\r")


def test_every_key_that_is_pressed_is_released() -> None:
    for chord in typed(bytes(range(128))):
        pressed: list[int] = []
        for code in scan_codes(chord, 1):
            if code & 0x80:
                pressed.remove(code & 0x7F)
            else:
                pressed.append(code)
        assert pressed == []


def test_keys_that_find_no_room_are_lost_as_a_whole(keyboard: Keyboard) -> None:
    codes = keyboard.type(b"Q" * 1000 + b"x")
    presses = codes.count(0x10)
    assert 10 < presses < QUEUE_BYTES
    assert codes == b"\x2a\x10\x90\xaa" * presses
    assert keyboard.type(b"x") == b"\x2d\xad"


# --- interrupts ----------------------------------------------------------------------------------


def test_each_byte_of_a_key_is_an_interrupt(keyboard: Keyboard) -> None:
    keyboard.controller.type_bytes(b"A")
    got = bytearray()
    while keyboard.irq.edges > len(got):  # a handler that reads one byte and does not look further
        got.append(keyboard.read())
    assert hexed(got) == "2a 1e 9e aa"
    assert not keyboard.irq.level
    assert keyboard.mouse_irq.edges == 0


def test_without_permission_there_is_no_interrupt(keyboard: Keyboard) -> None:
    keyboard.command(0x60, 0x64)
    keyboard.controller.type_bytes(b"a")
    assert not keyboard.irq.level
    keyboard.command(0x60, 0x65)  # the byte is still there
    assert keyboard.irq.level
    keyboard.command(0xAD)
    assert not keyboard.irq.level


def test_the_mouse_s_bytes_use_the_mouse_s_interrupt(keyboard: Keyboard) -> None:
    # i8042_check_aux() of Linux, which tests whether IRQ 12 arrives.
    keyboard.command(0x60, 0x47)
    keyboard.command(0xD3, 0xA5)
    assert keyboard.mouse_irq.level
    assert not keyboard.irq.level
    assert keyboard.read() == 0xA5
    assert not keyboard.mouse_irq.level


# --- drivers -------------------------------------------------------------------------------------


def test_osdev_s_initialisation_finds_two_ports_that_work(keyboard: Keyboard) -> None:
    # The steps of "PS/2 Controller" in OSDev's wiki.
    keyboard.command(0xAD)
    keyboard.command(0xA7)
    keyboard.read()
    keyboard.command(0x20)
    config = keyboard.read() & ~0x43
    keyboard.command(0x60, config)
    keyboard.command(0xAA)
    assert keyboard.read() == 0x55
    keyboard.command(0xA8)
    keyboard.command(0x20)
    assert not keyboard.read() & 0x20
    keyboard.command(0xA7)
    for test in (0xAB, 0xA9):
        keyboard.command(test)
        assert keyboard.read() == 0
    keyboard.command(0xAE)
    keyboard.command(0x60, config & ~0x10 | 0x01)
    keyboard.send(0xFF)
    assert keyboard.read_all() == b"\xfa\xaa"
    assert keyboard.irq.edges == 2
    assert keyboard.type(b"a") == b"\x1c\xf0\x1c"  # set 2, as nothing is translated


def test_linux_finds_the_controller_and_the_keyboard(keyboard: Keyboard) -> None:
    # drivers/input/serio/i8042.c
    keyboard.command(0x20)
    before = keyboard.read()
    keyboard.command(0x60, before & ~0x01 | 0x10)
    assert keyboard.status & 0x10  # else "keylock active"
    keyboard.command(0xD3, 0x5A)
    assert keyboard.status & STATUS_FROM_MOUSE
    assert keyboard.read() == 0x5A
    for command, bit in (0xA7, 0x20), (0xA8, 0x00):
        keyboard.command(command)
        keyboard.command(0x20)
        assert keyboard.read() & 0x20 == bit
    keyboard.command(0x60, 0x61)
    # drivers/input/keyboard/atkbd.c
    keyboard.send(0xF2)
    assert keyboard.read_all()[:2] == b"\xfa\xab"
    for value in (0xED, 0x00, 0xF3, 0x00, 0xF4):
        keyboard.send(value)
        assert keyboard.read_all() == b"\xfa"


# --- abuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_wider_accesses_reach_one_register_each(keyboard: Keyboard, size: int) -> None:
    ones_above = (1 << 8 * size) - 0x100
    keyboard.controller.command_port.write(0, size, 0x11223344556677AA)
    assert keyboard.controller.command_port.read(0, size) == ones_above | 0x1D
    assert keyboard.controller.data_port.read(0, size) == ones_above | 0x55
    keyboard.controller.data_port.write(0, size, 0x11223344556677EE)
    assert keyboard.read_all() == b"\xee"


def test_no_sequence_of_bytes_harms_it(keyboard: Keyboard) -> None:
    for command in range(256):
        for value in range(256):
            keyboard.command(command)
            keyboard.send(value)
            if value % 16 == 0:
                keyboard.controller.type_bytes(b"A\x1b[A")
                for _ in range(10):
                    assert 0 <= keyboard.read() <= 0xFF
    for _ in range(1000):
        keyboard.send(0xF2)  # answers that nobody reads do not heap up
        keyboard.command(0xAA)
    assert len(keyboard.read_all()) < QUEUE_BYTES + 10
    keyboard.controller.reset()
    test_it_begins_as_firmware_leaves_it(keyboard)


def test_typing_while_a_handler_reads_loses_no_byte() -> None:
    interrupts = threading.Semaphore(0)

    def set_line(level: bool) -> None:
        if level:
            interrupts.release()

    controller = Ps2(lambda: None, set_line)
    got = bytearray()

    def handle() -> None:
        while len(got) < 160 and interrupts.acquire(timeout=20):
            got.append(controller.data_port.read(0, 1))

    handler = threading.Thread(target=handle)
    handler.start()
    for _ in range(80):  # three bytes each, in set 2: all of them would fit into the queue
        controller.type_bytes(b"a")
    handler.join(20)
    assert got == b"\x1e\x9e" * 80
