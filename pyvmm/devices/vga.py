"""The VGA's ports: the cursor of the 80x25 text screen, and registers that keep what is written.

The text itself is ordinary RAM of the guest at TEXT_GPA, and writing it makes no exit; screen.py
shows it.  Of the registers, the cursor's and the start address (hardware scrolling) have an effect;
the others are there so that a driver finds a VGA in mode 3, as a BIOS leaves it, and reads back
what it wrote.
Left out: graphics modes (a guest that sets one sees no error, and the screen goes on to be the
text), other sizes, fonts, the palette, blanking, write protection, and the monochrome ports 0x3B4.
Sources: IBM PS/2 Hardware Interface Technical Reference, "Video Subsystem"; FreeVGA, "VGA Chipset
Reference", "Input Status #1 Register" and "CRT Controller Registers".
"""

from __future__ import annotations

import itertools
import threading

from pyvmm.devices.bytewise import BytewiseDevice

VGA_PORT = 0x3C0

TEXT_GPA = 0xB8000
TEXT_BYTES = 0x8000  # up to 0xBFFFF: text memory is larger than the screen
ROWS, COLUMNS = 25, 80
SCREEN_BYTES = ROWS * COLUMNS * 2  # a cell is a character and its attribute
# A BIOS leaves the screen so: a guest that writes characters alone relies on the attributes.
BLANK_SCREEN = b" \x07" * (ROWS * COLUMNS)

# Offsets from VGA_PORT.
ATTRIBUTE, ATTRIBUTE_READ, MISC, ENABLE, SEQUENCER = 0x00, 0x01, 0x02, 0x03, 0x04
DAC_MASK, DAC_READ_INDEX, DAC_WRITE_INDEX, DAC_DATA = 0x06, 0x07, 0x08, 0x09
FEATURE_READ, MISC_READ, GRAPHICS, CRTC, STATUS_FEATURE = 0x0A, 0x0C, 0x0E, 0x14, 0x1A
_INPUT_STATUS_0 = MISC  # what it reads as

# CRT controller registers.
MAX_SCAN_LINE, CURSOR_START, CURSOR_END = 0x09, 0x0A, 0x0B
START_HIGH, START_LOW, CURSOR_HIGH, CURSOR_LOW = 0x0C, 0x0D, 0x0E, 0x0F
CURSOR_OFF = 0x20  # in CURSOR_START
SCAN_LINE_MASK = 0x1F  # in MAX_SCAN_LINE, CURSOR_START and CURSOR_END

STATUS_DISPLAY_DISABLED, STATUS_VERTICAL_RETRACE = 0x01, 0x08
DAC_STATE_READING, DAC_STATE_WRITING = 0x03, 0x00
_DAC_BYTES = 256 * 3

# Mode 3, 80x25 text, on a colour display.
_MODE_3 = {
    SEQUENCER: bytes.fromhex("03 00 03 00 02"),
    GRAPHICS: bytes.fromhex("00 00 00 00 00 10 0e 00 ff"),
    CRTC: bytes.fromhex(
        "5f 4f 50 82 55 81 bf 1f 00 4f 0d 0e 00 00 00 00 9c 8e 8f 28 1f 96 b9 a3 ff"
    ),
}
_MODE_3_ATTRIBUTE = bytes.fromhex("00 01 02 03 04 05 14 07 38 39 3a 3b 3c 3d 3e 3f 0c 00 0f 08 00")
_MODE_3_PLAIN = {MISC: 0x67, ENABLE: 0x01, DAC_MASK: 0xFF, STATUS_FEATURE: 0x00}
_ATTRIBUTE_INDEX = 0x1F
_ATTRIBUTE_SCREEN_ON = 0x20

# Ports that read as what was written to another one, or to themselves.
_READS_PLAIN = {
    MISC_READ: MISC,
    ENABLE: ENABLE,
    DAC_MASK: DAC_MASK,
    FEATURE_READ: STATUS_FEATURE,
}


class _Registers:
    """Byte registers behind an index; where there is none, 0 is read and writes are ignored."""

    def __init__(self, values: bytes) -> None:
        self.index = 0
        self.values = bytearray(values)

    def read(self, index: int) -> int:
        return self.values[index] if index < len(self.values) else 0

    def write(self, index: int, value: int) -> None:
        if index < len(self.values):
            self.values[index] = value


class Vga(BytewiseDevice):
    """The colour ports of a VGA, 0x3C0 to 0x3DF."""

    size = 0x20

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what reset() sets
        self.reset()

    def reset(self) -> None:
        """Back to mode 3, with the cursor at the top left."""
        with self._lock:
            self._indexed = {port: _Registers(values) for port, values in _MODE_3.items()}
            self._attribute = _Registers(_MODE_3_ATTRIBUTE)
            self._attribute.index = _ATTRIBUTE_SCREEN_ON
            self._attribute_wants_data = False  # the flip-flop
            self._plain = dict(_MODE_3_PLAIN)
            self._dac = bytearray(_DAC_BYTES)
            self._dac_next = 0  # the byte of _dac that the next access of DAC_DATA is for
            self._dac_state = DAC_STATE_WRITING
            # A driver may wait for either bit, in either state: it never waits long.  Three states,
            # so that two vCPUs that take turns do not always get the same one.
            self._status = itertools.cycle(
                (0, STATUS_DISPLAY_DISABLED, STATUS_DISPLAY_DISABLED | STATUS_VERTICAL_RETRACE)
            )

    @property
    def start(self) -> int:
        """Which cell of text memory is shown at the top left."""
        with self._lock:
            return self._crtc_pair(START_HIGH, START_LOW)

    @property
    def cursor(self) -> int | None:
        """Which cell of text memory the cursor is at; None when it is not shown."""
        with self._lock:
            crtc = self._indexed[CRTC].values
            top = crtc[CURSOR_START] & SCAN_LINE_MASK
            bottom = min(crtc[CURSOR_END] & SCAN_LINE_MASK, crtc[MAX_SCAN_LINE] & SCAN_LINE_MASK)
            if crtc[CURSOR_START] & CURSOR_OFF or top > bottom:
                return None
            return self._crtc_pair(CURSOR_HIGH, CURSOR_LOW)

    def _crtc_pair(self, high: int, low: int) -> int:
        crtc = self._indexed[CRTC].values
        return crtc[high] << 8 | crtc[low]

    def read_byte(self, offset: int) -> int:
        """A register; all ones at ports that a VGA does not have."""
        with self._lock:
            if offset in self._indexed:
                return self._indexed[offset].index
            if offset - 1 in self._indexed:
                registers = self._indexed[offset - 1]
                return registers.read(registers.index)
            if offset in _READS_PLAIN:
                return self._plain[_READS_PLAIN[offset]]
            if offset == STATUS_FEATURE:
                self._attribute_wants_data = False
                return next(self._status)
            if offset == ATTRIBUTE:
                return self._attribute.index
            if offset == ATTRIBUTE_READ:
                return self._attribute.read(self._attribute.index & _ATTRIBUTE_INDEX)
            if offset == _INPUT_STATUS_0:
                return 0
            return self._read_dac(offset)

    def _read_dac(self, offset: int) -> int:
        if offset == DAC_READ_INDEX:
            return self._dac_state
        if offset == DAC_WRITE_INDEX:
            return self._dac_next // 3
        if offset == DAC_DATA:
            value = self._dac[self._dac_next]
            self._dac_next = (self._dac_next + 1) % _DAC_BYTES
            return value
        return 0xFF

    def write_byte(self, offset: int, value: int) -> None:
        """A register; nothing happens at ports that a VGA does not have."""
        with self._lock:
            if offset in self._indexed:
                self._indexed[offset].index = value
            elif offset - 1 in self._indexed:
                registers = self._indexed[offset - 1]
                registers.write(registers.index, value)
            elif offset in self._plain:
                self._plain[offset] = value
            elif offset == ATTRIBUTE:
                self._write_attribute(value)
            elif offset in (DAC_READ_INDEX, DAC_WRITE_INDEX):
                reading = offset == DAC_READ_INDEX
                self._dac_state = DAC_STATE_READING if reading else DAC_STATE_WRITING
                self._dac_next = value * 3
            elif offset == DAC_DATA:
                self._dac[self._dac_next] = value & 0x3F
                self._dac_next = (self._dac_next + 1) % _DAC_BYTES

    def _write_attribute(self, value: int) -> None:
        """The attribute controller has one port for both: index, then data, then index..."""
        if self._attribute_wants_data:
            self._attribute.write(self._attribute.index & _ATTRIBUTE_INDEX, value)
        else:
            self._attribute.index = value & (_ATTRIBUTE_INDEX | _ATTRIBUTE_SCREEN_ON)
        self._attribute_wants_data = not self._attribute_wants_data
