"""The guest's text screen, for people: as text, as text with colours, and live on a terminal.

The screen is 25 lines of 80 cells in guest RAM; a cell is a character of code page 437 and an
attribute (bits 0-3: foreground, 4-7: background).  It is read when somebody wants to see it: the
guest's writes cost nothing.  A guest cannot send a terminal anything but what is painted here: all
256 characters, control characters included, have a glyph.
Left out: blinking (attribute bit 7 is a bright background instead), the palette, other sizes, and
terminals that are not UTF-8.
Sources: IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem" (attributes, addresses);
ECMA-48, "Control functions" (CUP, ED, SGR); XTerm Control Sequences, "Functions using CSI" (bright
colours, and the private modes: 7 auto-wrap, 25 cursor, 1049 alternate screen).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

from pyvmm import threads
from pyvmm.console import Output
from pyvmm.devices.vga import COLUMNS, ROWS, SCREEN_BYTES, TEXT_BYTES, TEXT_GPA, Vga
from pyvmm.light import NamedTuple

_LINE_BYTES = COLUMNS * 2
_TEXT_CELLS = TEXT_BYTES // 2

# Code page 437 with the glyphs that a PC shows for control characters, where Python's codec has
# the control characters themselves.
_GLYPHS = (
    " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
    + bytes(range(0x20, 0x7F)).decode("ascii")
    + "⌂"
    + bytes(range(0x80, 0xFF)).decode("cp437")
    + " "
)

# SGR codes by VGA colour: its bits are blue, green, red, where a terminal's are red, green, blue.
_ORDER = (0, 4, 2, 6, 1, 5, 3, 7)
_FOREGROUND = tuple(str(base + colour) for base in (30, 90) for colour in _ORDER)
_BACKGROUND = tuple(str(base + colour) for base in (40, 100) for colour in _ORDER)
_PLAIN = "\x1b[0m"

_ENTER = "\x1b[?1049h\x1b[?7l"  # a glyph that a terminal draws wider must not wrap
_LEAVE = _PLAIN + "\x1b[?7h\x1b[?25h\x1b[?1049l"
_CLEAR = _PLAIN + "\x1b[2J"
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Screen:
    """What a monitor would show of `vga` and of guest RAM, `read_memory(gpa, length)`.

    The methods may be called while the guest runs, from any thread.
    """

    def __init__(self, read_memory: Callable[[int, int], bytes], vga: Vga) -> None:
        self._read_memory, self._vga = read_memory, vga

    def cells(self) -> bytes:
        """The 80x25 cells that are shown now, two bytes each."""
        offset = self._vga.start % _TEXT_CELLS * 2
        shown = self._read_memory(TEXT_GPA + offset, min(SCREEN_BYTES, TEXT_BYTES - offset))
        if len(shown) < SCREEN_BYTES:  # addresses wrap at the end of text memory
            shown += self._read_memory(TEXT_GPA, SCREEN_BYTES - len(shown))
        return shown

    def cursor(self) -> tuple[int, int] | None:
        """(row, column) of the cursor, from 0; None when it is off or outside of the screen."""
        location = self._vga.cursor
        if location is None:
            return None
        cell = (location - self._vga.start) % _TEXT_CELLS
        return divmod(cell, COLUMNS) if cell < ROWS * COLUMNS else None

    def text(self) -> list[str]:
        """The 25 lines, without the spaces at their ends."""
        return [_characters(line).rstrip() for line in _lines(self.cells())]

    def ansi(self) -> str:
        """The 25 lines of 80 characters, with colours as ANSI escape sequences."""
        return "\n".join(_painted(line) + _PLAIN for line in _lines(self.cells()))


def _lines(cells: bytes) -> Iterator[bytes]:
    return (cells[at : at + _LINE_BYTES] for at in range(0, SCREEN_BYTES, _LINE_BYTES))


def _characters(cells: bytes) -> str:
    return cells[::2].decode("latin-1").translate(_GLYPHS)


def _painted(cells: bytes) -> str:
    """Characters with their colours, starting from unknown ones and leaving the last ones set."""
    characters, painted, at = _characters(cells), [], 0
    foreground = background = ""
    for attribute, run in itertools.groupby(cells[1::2]):
        codes = []
        if foreground != _FOREGROUND[attribute & 0x0F]:
            foreground = _FOREGROUND[attribute & 0x0F]
            codes.append(foreground)
        if background != _BACKGROUND[attribute >> 4]:
            background = _BACKGROUND[attribute >> 4]
            codes.append(background)
        end = at + len(list(run))
        painted.append(f"\x1b[{';'.join(codes)}m{characters[at:end]}")
        at = end
    return "".join(painted)


class _Frame(NamedTuple):
    """What the terminal shows, and its size, which decides how much of that can be seen."""

    lines: int
    columns: int
    cells: bytes
    cursor: tuple[int, int] | None


class LiveScreen:
    """Shows a screen on a terminal while open: a context manager that restores the terminal.

    A thread looks 20 times a second, at the terminal's size, too, so SIGWINCH needs no handler.
    When nothing has changed it does next to nothing: a thread that computes keeps vCPU threads from
    handling their exits.  A terminal smaller than the screen shows the upper left part.
    What else writes to the terminal meanwhile spoils the picture until those lines change.
    """

    _SECONDS = 0.05
    _PATIENCE_SECONDS = 2.0  # how long a terminal may take nothing before it is given up

    def __init__(self, screen: Screen, fd: int, on_error: Callable[[Exception], None]) -> None:
        """`fd` is a terminal.  `on_error` is told, on the thread, why nothing is shown any more."""
        self._screen, self._fd, self._on_error = screen, fd, on_error
        self._output = Output(fd)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)

    def __enter__(self) -> LiveScreen:
        threads.start(self._thread)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(self._PATIENCE_SECONDS)
        if self._thread.is_alive():  # nobody reads the terminal: ^S, or a lost connection
            self._output.stop()
            self._thread.join(self._PATIENCE_SECONDS)
        if not self._thread.is_alive():  # else leave it what it uses
            self._output.close()
        self._leave()

    def _leave(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        with contextlib.suppress(OSError):  # it may have gone
            if poll.poll(self._PATIENCE_SECONDS * 1000):
                os.write(self._fd, _LEAVE.encode())

    def _run(self) -> None:
        """The thread's body."""
        try:
            self._output(_ENTER.encode())
            shown = None
            while not self._stopped.wait(self._SECONDS):
                wanted = self._frame()
                if wanted != shown:
                    self._output("".join(_update(shown, wanted)).encode())
                    shown = wanted
        except Exception as error:
            self._on_error(error)

    def _frame(self) -> _Frame:
        columns, lines = os.get_terminal_size(self._fd)
        # A serial line does not know its size: it says 0.
        return _Frame(
            lines or ROWS, columns or COLUMNS, self._screen.cells(), self._screen.cursor()
        )


def _update(shown: _Frame | None, wanted: _Frame) -> Iterator[str]:
    """What a terminal that shows one frame needs to show the other; `shown` None: all of it."""
    yield _HIDE_CURSOR
    if shown is None or shown[:2] != wanted[:2]:  # what a resized terminal shows is anybody's guess
        yield _CLEAR
        before: Iterable[bytes | None] = itertools.repeat(None)
    else:
        before = _lines(shown.cells)
    for row, (old, new) in enumerate(zip(before, _lines(wanted.cells), strict=False)):
        if row < wanted.lines and new != old:
            yield _at(row, 0) + _painted(new[: wanted.columns * 2])
    if wanted.cursor is not None:
        row, column = wanted.cursor
        if row < wanted.lines and column < wanted.columns:
            yield _at(row, column) + _SHOW_CURSOR


def _at(row: int, column: int) -> str:
    return f"\x1b[{row + 1};{column + 1}H"
