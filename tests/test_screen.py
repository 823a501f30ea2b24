"""The text screen: what a person sees of 0xB8000, as text, in colours, and live on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator

import pytest

from pyvmm.devices.vga import BLANK_SCREEN, COLUMNS, ROWS, SCREEN_BYTES, TEXT_BYTES, TEXT_GPA, Vga
from pyvmm.screen import LiveScreen, Screen
from tests.conftest import open_fds
from tests.support import PATIENCE

GREY_ON_BLACK, WHITE_ON_BLUE = 0x07, 0x1F
CRTC = 0x14  # offset of the index port


class Guest:
    """Text memory and the VGA, and what a guest does with them."""

    def __init__(self) -> None:
        self.memory = bytearray(TEXT_BYTES)
        self.memory[:SCREEN_BYTES] = BLANK_SCREEN
        self.vga = Vga()
        self.screen = Screen(self.read_memory, self.vga)

    def read_memory(self, gpa: int, length: int) -> bytes:
        assert gpa >= TEXT_GPA and gpa + length <= TEXT_GPA + TEXT_BYTES, "not text memory"
        return bytes(self.memory[gpa - TEXT_GPA : gpa - TEXT_GPA + length])

    def write(
        self, row: int, column: int, text: bytes, attribute: int = GREY_ON_BLACK, start: int = 0
    ) -> None:
        cell = start + row * COLUMNS + column
        for n, character in enumerate(text):
            at = (cell + n) * 2 % TEXT_BYTES
            self.memory[at : at + 2] = bytes((character, attribute))

    def crtc(self, index: int, value: int) -> None:
        self.vga.write(CRTC, 2, value << 8 | index)

    def move_cursor(self, row: int, column: int, start: int = 0) -> None:
        cell = start + row * COLUMNS + column
        self.crtc(0x0E, cell >> 8)
        self.crtc(0x0F, cell & 0xFF)

    def scroll(self, start: int) -> None:
        self.crtc(0x0C, start >> 8)
        self.crtc(0x0D, start & 0xFF)


@pytest.fixture
def guest() -> Guest:
    return Guest()


# --- as text -------------------------------------------------------------------------------------


def test_the_screen_is_25_lines_without_trailing_spaces(guest: Guest) -> None:
    guest.write(0, 0, b"Booting...")
    guest.write(1, 4, b"indented  ")
    guest.write(24, 79, b"!")
    text = guest.screen.text()
    assert len(text) == 25
    assert text[:2] == ["Booting...", "    indented"]
    assert text[2:24] == [""] * 22
    assert text[24] == " " * 79 + "!"


def test_memory_that_was_never_written_is_blank(guest: Guest) -> None:
    guest.memory[:SCREEN_BYTES] = bytes(SCREEN_BYTES)
    assert guest.screen.text() == [""] * 25


@pytest.mark.parametrize(
    ("characters", "shown"),
    [
        (b"\xc9\xcd\xbb", "╔═╗"),
        (b"\x81ber \x9c5 \xe3", "über £5 π"),
        (b"\xb0\xb1\xb2\xdb", "░▒▓█"),
        (b"\x01\x03\x10\x1b\x1e", "☺♥►←▲"),  # where ASCII has control characters
        (b"~\x7f", "~⌂"),
        (b"a\xffb\x00c", "a b c"),  # both are blank
    ],
)
def test_characters_are_those_of_code_page_437(guest: Guest, characters: bytes, shown: str) -> None:
    guest.write(0, 0, characters)
    assert guest.screen.text()[0] == shown


def test_every_character_has_one_printable_glyph_of_its_own(guest: Guest) -> None:
    for row in range(4):
        guest.write(row, 0, bytes(range(row * 64, row * 64 + 64)) + b"|")
    glyphs = "".join(line[:64] for line in guest.screen.text()[:4])
    assert len(glyphs) == 256
    assert glyphs.isprintable()  # so a guest cannot send escape sequences
    assert len(set(glyphs)) == 254  # 0x00, 0x20 and 0xff are blank


@pytest.mark.parametrize("start", [80, 81, 8192, 16384 - 1000, 16383, 0x4000, 0xFFFF])
def test_the_screen_begins_at_the_start_address_and_wraps_with_text_memory(
    guest: Guest, start: int
) -> None:
    guest.write(0, 0, b"first", start=start)
    guest.write(24, 75, b"last!", start=start)
    guest.move_cursor(24, 79, start)
    guest.scroll(start)
    text = guest.screen.text()
    assert (text[0][:5], text[24][75:]) == ("first", "last!")
    assert len(guest.screen.cells()) == SCREEN_BYTES
    assert guest.screen.cursor() == (24, 79)


def test_the_cursor_has_a_row_and_a_column(guest: Guest) -> None:
    assert guest.screen.cursor() == (0, 0)
    guest.move_cursor(3, 79)
    assert guest.screen.cursor() == (3, 79)


@pytest.mark.parametrize("cell", [25 * 80, 0x3FFF, 0xFFFF])
def test_a_cursor_outside_of_the_screen_is_not_seen(guest: Guest, cell: int) -> None:
    guest.move_cursor(0, cell)
    assert guest.screen.cursor() is None


def test_a_cursor_that_is_off_is_not_seen(guest: Guest) -> None:
    guest.crtc(0x0A, 0x20)
    assert guest.screen.cursor() is None


# --- in colours ----------------------------------------------------------------------------------


def test_colours_are_set_where_they_change_and_nowhere_else(guest: Guest) -> None:
    guest.write(0, 0, b"OK", 0x0A)
    guest.write(0, 2, b" \x07", 0x0A)
    guest.write(0, 4, b"FAIL", WHITE_ON_BLUE)
    guest.write(0, 8, b"x", 0x1C)
    first, second = guest.screen.ansi().split("\n")[:2]
    assert first == (f"\x1b[92;40mOK •\x1b[97;44mFAIL\x1b[91mx\x1b[37;40m{' ' * 71}\x1b[0m")
    assert second == f"\x1b[37;40m{' ' * 80}\x1b[0m"


@pytest.mark.parametrize(
    ("attribute", "codes"),
    [
        (0x00, "30;40"),
        (0x01, "34;40"),  # blue and red change places
        (0x02, "32;40"),
        (0x04, "31;40"),
        (0x06, "33;40"),  # brown
        (0x07, "37;40"),
        (0x08, "90;40"),
        (0x0E, "93;40"),
        (0x4F, "97;41"),
        (0x70, "30;47"),
        (0x87, "37;100"),  # blinking is bright
        (0xFF, "97;107"),
    ],
)
def test_attributes_become_the_terminal_s_colours(guest: Guest, attribute: int, codes: str) -> None:
    guest.write(0, 0, b"x" * 80, attribute)
    assert guest.screen.ansi().split("\n")[0] == f"\x1b[{codes}m{'x' * 80}\x1b[0m"


def test_without_its_escapes_the_coloured_screen_is_the_text(guest: Guest) -> None:
    for row in range(ROWS):
        for column in range(COLUMNS):
            guest.write(row, column, bytes((row * 7 + column,)), (row * COLUMNS + column) % 256)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", guest.screen.ansi())
    assert [line.rstrip() for line in plain.split("\n")] == guest.screen.text()


# --- live on a terminal --------------------------------------------------------------------------

DEFAULT_COLOURS = ("39", "49")
_SEQUENCE = re.compile(r"\x1b\[(\?)?([0-9;]*)([A-Za-z])")


class Terminal:
    """A terminal that knows the sequences which LiveScreen sends, and no others."""

    def __init__(self, lines: int, columns: int) -> None:
        self.lines, self.columns = lines, columns
        self.row = self.column = 0
        self.colours = DEFAULT_COLOURS
        self.cursor_visible = self.auto_wrap = True
        self.cells = self._blank()
        self._main: tuple[list[list[tuple[str, str, str]]], int, int] | None = None
        self.printed: list[int] = []  # the rows that were written to, since it was cleared

    def _blank(self) -> list[list[tuple[str, str, str]]]:
        return [[(" ", *self.colours)] * self.columns for _ in range(self.lines)]

    @property
    def alternate(self) -> bool:
        """Is the alternate screen shown?"""
        return self._main is not None

    def text(self) -> list[str]:
        return ["".join(glyph for glyph, _, _ in line).rstrip() for line in self.cells]

    def colours_at(self, row: int, column: int) -> tuple[str, str]:
        return self.cells[row][column][1:]

    def resize(self, lines: int, columns: int) -> None:
        """As xterm does it: lines are cut, new ones are blank."""
        self.lines, self.columns = lines, columns
        blank = self._blank()
        for row, line in zip(blank, self.cells, strict=False):
            row[: len(line)] = line[:columns]
        self.cells = blank
        self.row, self.column = min(self.row, lines - 1), min(self.column, columns - 1)

    def feed(self, text: str) -> str:
        """Interpret `text`; returns an unfinished sequence at its end."""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self._print(text[at])
                at += 1
                continue
            found = _SEQUENCE.match(text, at)
            if found is None:
                assert len(text) - at < 10, f"what is {text[at : at + 10]!r}?"
                return text[at:]
            private, parameters, final = found.groups()
            self._control(bool(private), parameters.split(";"), final)
            at = found.end()
        return ""

    def _print(self, glyph: str) -> None:
        assert glyph.isprintable(), f"{glyph!r} was sent to the terminal"
        assert self.column < self.columns or not self.auto_wrap, "the terminal would wrap"
        self.cells[self.row][min(self.column, self.columns - 1)] = (glyph, *self.colours)
        self.column += 1
        if not self.printed or self.printed[-1] != self.row:
            self.printed.append(self.row)

    def _control(self, private: bool, parameters: list[str], final: str) -> None:
        if private:
            self._mode(parameters[0], {"h": True, "l": False}[final])
        elif final == "H":
            self.row, self.column = (int(number) - 1 for number in parameters)
            assert 0 <= self.row < self.lines and 0 <= self.column < self.columns, "clipped"
        elif final == "J":
            assert parameters == ["2"]
            self.cells = self._blank()
        elif final == "m":
            for code in parameters:
                self._colour(code)
        else:
            raise AssertionError(f"CSI {parameters} {final}")

    def _mode(self, mode: str, on: bool) -> None:
        if mode == "25":
            self.cursor_visible = on
        elif mode == "7":
            self.auto_wrap = on
        elif mode == "1049":
            assert on != self.alternate
            if on:
                self._main = self.cells, self.row, self.column
                self.cells = self._blank()
            else:
                assert self._main is not None
                self.cells, self.row, self.column = self._main
                self._main = None
        else:
            raise AssertionError(f"mode {mode}")

    def _colour(self, code: str) -> None:
        foreground, background = self.colours
        if code == "0":
            self.colours = DEFAULT_COLOURS
        elif code[:-1] in ("3", "9"):
            self.colours = code, background
        elif code[:-1] in ("4", "10"):
            self.colours = foreground, code
        else:
            raise AssertionError(f"SGR {code}")


class Live:
    """A LiveScreen on a pseudo-terminal, read by a Terminal."""

    def __init__(self, guest: Guest, lines: int, columns: int) -> None:
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        self.terminal = Terminal(lines or ROWS, columns or COLUMNS)
        self.set_size(lines, columns)
        self.errors: list[Exception] = []
        self.live = LiveScreen(guest.screen, self.slave, self.errors.append)
        self._unread = b""
        self._unfinished = ""

    def set_size(self, lines: int, columns: int) -> None:
        """What the kernel says the size is."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def resize(self, lines: int, columns: int) -> None:
        """The user resizes the window: the terminal first, then the kernel is told."""
        self.wait_picture_complete()
        self.terminal.resize(lines, columns)
        self.set_size(lines, columns)

    def read(self, seconds: float = 0) -> bool:
        """Let the terminal interpret what has come; False when nothing comes within `seconds`."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self._unread += os.read(self.master, 65536)
        text = self._unread.decode(errors="ignore")  # all but a character that is not whole yet
        self._unread = self._unread[len(text.encode()) :]
        self._unfinished = self.terminal.feed(self._unfinished + text)
        return True

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"never seen: {what}\n{self.terminal.text()}"
            assert self.errors == []
            self.read(0.1)

    def wait_text(self, *lines: str) -> None:
        """Wait until the terminal begins with these lines."""
        self.wait(lambda: self.terminal.text()[: len(lines)] == list(lines), f"{lines}")

    def wait_picture_complete(self) -> None:
        """Wait for the cursor: it is hidden first and shown last."""
        self.wait(lambda: self.terminal.cursor_visible, "the end of the picture")

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def shown(guest: Guest, lines: int = 30, columns: int = 100) -> Iterator[Live]:
    """A screen that is shown live, from its first picture on; the terminal must be restored."""
    before = open_fds()
    live = Live(guest, lines, columns)
    try:
        with live.live:
            live.wait(lambda: live.terminal.alternate, "the alternate screen")
            yield live
        while live.read():
            pass
        assert live.errors == []
        terminal = live.terminal
        assert (terminal.alternate, terminal.cursor_visible, terminal.auto_wrap) == (
            False, True, True,
        )  # fmt: skip
        assert terminal.colours == DEFAULT_COLOURS
        assert set(terminal.text()) == {""}  # what was there before
    finally:
        live.close()
    assert open_fds() == before
    assert "screen" not in [thread.name for thread in threading.enumerate()]


def test_a_terminal_shows_the_screen_and_what_changes_there(guest: Guest) -> None:
    guest.write(0, 0, b"hello")
    with shown(guest) as live:
        live.wait_text("hello", "")
        guest.write(1, 2, b"\x10 world")
        live.wait_text("hello", "  ► world")
        guest.memory[:SCREEN_BYTES] = BLANK_SCREEN
        live.wait_text(*[""] * 25)


def test_a_terminal_shows_every_cell_in_its_colours(guest: Guest) -> None:
    for row in range(ROWS):
        for column in range(COLUMNS):
            guest.write(row, column, bytes((row * 7 + column,)), (row * COLUMNS + column) % 256)
    guest.write(24, 79, b"!", WHITE_ON_BLUE)
    with shown(guest, 25, 80) as live:
        live.wait_text(*guest.screen.text())
        assert live.terminal.colours_at(0, 1) == ("34", "40")
        assert live.terminal.colours_at(24, 79) == ("97", "44")


def test_a_change_of_colour_alone_is_shown(guest: Guest) -> None:
    guest.write(2, 0, b"hello")
    with shown(guest) as live:
        live.wait_text("", "", "hello")
        guest.write(2, 0, b"hello", 0x4F)
        live.wait(lambda: live.terminal.colours_at(2, 4) == ("97", "41"), "white on red")
        assert live.terminal.colours_at(2, 5) == ("37", "40")


def test_only_the_lines_that_changed_are_painted(guest: Guest) -> None:
    with shown(guest) as live:
        guest.write(0, 0, b"ready")
        live.wait_text("ready")
        live.wait_picture_complete()
        live.terminal.printed.clear()
        guest.write(7, 0, b"one line")
        live.wait(lambda: live.terminal.text()[7] == "one line", "the line")
        assert live.terminal.printed == [7]


def test_nothing_is_sent_while_nothing_changes(guest: Guest) -> None:
    with shown(guest) as live:
        guest.write(0, 0, b"ready")
        live.wait_text("ready")
        live.wait_picture_complete()
        assert not live.read(0.2)


def test_the_cursor_is_where_the_guest_s_is(guest: Guest) -> None:
    guest.move_cursor(24, 79)
    with shown(guest) as live:
        terminal = live.terminal
        live.wait(lambda: (terminal.row, terminal.column) == (24, 79), "the cursor")
        live.wait(lambda: terminal.cursor_visible, "a visible cursor")
        guest.move_cursor(1, 2)
        live.wait(lambda: (terminal.row, terminal.column) == (1, 2), "the cursor has moved")
        guest.crtc(0x0A, 0x20)
        live.wait(lambda: not terminal.cursor_visible, "no cursor")
        guest.crtc(0x0A, 0x0D)
        live.wait(lambda: terminal.cursor_visible, "a cursor again")


def test_hardware_scrolling_is_shown(guest: Guest) -> None:
    guest.write(1, 0, b"second")
    with shown(guest) as live:
        live.wait_text("", "second")
        guest.scroll(80)
        live.wait_text("second", "")


@pytest.mark.parametrize(("lines", "columns"), [(24, 80), (25, 79), (10, 20), (1, 1)])
def test_a_small_terminal_shows_the_upper_left_part(guest: Guest, lines: int, columns: int) -> None:
    for row in range(ROWS):
        guest.write(row, 0, bytes(ord("a") + (row + column) % 26 for column in range(COLUMNS)))
    guest.move_cursor(24, 79)
    with shown(guest, lines, columns) as live:
        live.wait_text(*[line[:columns] for line in guest.screen.text()[:lines]])
        assert not live.terminal.cursor_visible
        guest.move_cursor(0, 0)
        live.wait(lambda: live.terminal.cursor_visible, "the cursor")


def test_a_terminal_that_is_resized_is_painted_anew(guest: Guest) -> None:
    guest.write(0, 0, b"first")
    guest.write(20, 70, b"far away")
    with shown(guest) as live:
        live.wait_text("first")
        live.resize(10, 40)
        guest.write(1, 0, b"second")
        live.wait_text("first", "second")
        live.resize(30, 100)
        live.wait(lambda: live.terminal.text()[20] == " " * 70 + "far away", "all of it again")
        assert live.terminal.colours_at(29, 99) == DEFAULT_COLOURS  # not the guest's background


def test_a_terminal_that_does_not_know_its_size_is_taken_to_be_large_enough(guest: Guest) -> None:
    guest.write(24, 75, b"last!")
    with shown(guest, 0, 0) as live:
        live.wait(lambda: live.terminal.text()[24] == " " * 75 + "last!", "the last line")


def test_the_terminal_is_restored_when_the_guest_ends_with_an_error(guest: Guest) -> None:
    guest.write(0, 0, b"X", WHITE_ON_BLUE)
    with contextlib.suppress(KeyboardInterrupt), shown(guest) as live:
        live.wait_text("X")
        raise KeyboardInterrupt


def test_the_terminal_is_restored_when_the_end_comes_at_once(guest: Guest) -> None:
    for _ in range(5):
        with shown(guest):
            pass


def test_memory_that_cannot_be_read_is_reported_and_the_terminal_restored(guest: Guest) -> None:
    def broken(gpa: int, length: int) -> bytes:
        raise ValueError("no memory")

    guest.screen = Screen(broken, guest.vga)
    live = Live(guest, 30, 100)
    with live.live:
        deadline = time.monotonic() + PATIENCE
        while not live.errors and time.monotonic() < deadline:
            live.read(0.05)
    while live.read():
        pass
    assert [str(error) for error in live.errors] == ["no memory"]
    assert not live.terminal.alternate
    live.close()


def test_a_terminal_that_has_gone_is_reported_and_leaves_nothing_behind(guest: Guest) -> None:
    live = Live(guest, 30, 100)
    reported = threading.Event()
    live.live = LiveScreen(guest.screen, live.slave, lambda error: reported.set())
    with live.live:
        os.close(live.master)
        assert reported.wait(PATIENCE)
    os.close(live.slave)
    assert "screen" not in [thread.name for thread in threading.enumerate()]


def test_a_terminal_that_nobody_reads_does_not_hold_up_the_end(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveScreen, "_PATIENCE_SECONDS", 0.5)
    before = open_fds()
    live = Live(guest, 30, 100)
    with live.live:
        termios.tcflow(live.slave, termios.TCOOFF)  # what ^S does
        guest.write(0, 0, b"never seen")
        time.sleep(0.2)  # the thread is to get to the write that waits
    assert "screen" not in [thread.name for thread in threading.enumerate()]
    termios.tcflow(live.slave, termios.TCOON)
    live.close()
    assert live.errors == []
    assert open_fds() == before
