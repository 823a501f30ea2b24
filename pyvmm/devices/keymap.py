"""The keys of a US keyboard: their scan codes, and which of them type a terminal's characters.

A terminal sends characters, a keyboard sends keys.  So each character becomes a chord: the keys
that have to be down together for it, modifiers first.  Alt, the keypad and the keys that no
terminal sends are left out.
Source: IBM PS/2 Hardware Interface Technical Reference, "Keyboards", the three scan code tables.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyvmm.light import NamedTuple


class Key(NamedTuple):
    """A key by its codes in the scan code sets; `extended`: sets 1 and 2 put 0xE0 before it."""

    set_1: int
    set_2: int
    set_3: int
    extended: bool = False


Chord = tuple[Key, ...]

EXTENDED, RELEASED = 0xE0, 0xF0  # prefixes; set 1 marks a released key by bit 7 instead

SHIFT = Key(0x2A, 0x12, 0x12)
CONTROL = Key(0x1D, 0x14, 0x11)
ESCAPE = Key(0x01, 0x76, 0x08)
BACKSPACE = Key(0x0E, 0x66, 0x66)
TAB = Key(0x0F, 0x0D, 0x0D)
ENTER = Key(0x1C, 0x5A, 0x5A)

# The rows of keys: what is printed on them, without and with shift; the first one's code in set 1,
# which counts; the codes in set 2, and those of set 3 are the same but for one.
_ROWS = (
    ("1234567890-=", "!@#$%^&*()_+", 0x02, "16 1e 26 25 2e 36 3d 3e 46 45 4e 55"),
    ("qwertyuiop[]", "QWERTYUIOP{}", 0x10, "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b"),
    ("asdfghjkl;'`", 'ASDFGHJKL:"~', 0x1E, "1c 1b 23 2b 34 33 3b 42 4b 4c 52 0e"),
    ("\\zxcvbnm,./", "|ZXCVBNM<>?", 0x2B, "5d 1a 22 21 2a 32 31 3a 41 49 4a"),
    (" ", " ", 0x39, "29"),
)
_SET_3_EXCEPTIONS = {0x5D: 0x5C}  # the backslash

HOME = Key(0x47, 0x6C, 0x6E, extended=True)
END = Key(0x4F, 0x69, 0x65, extended=True)

# Keys for which a terminal sends a sequence (xterm, "PC-Style Function Keys"; screen and the
# Linux console differ in two).
_SEQUENCES = {
    b"\x1b[A": Key(0x48, 0x75, 0x63, extended=True),  # up
    b"\x1b[B": Key(0x50, 0x72, 0x60, extended=True),
    b"\x1b[C": Key(0x4D, 0x74, 0x6A, extended=True),  # right
    b"\x1b[D": Key(0x4B, 0x6B, 0x61, extended=True),
    b"\x1b[H": HOME,
    b"\x1b[F": END,
    b"\x1b[1~": HOME,
    b"\x1b[4~": END,
    b"\x1b[2~": Key(0x52, 0x70, 0x67, extended=True),  # insert
    b"\x1b[3~": Key(0x53, 0x71, 0x64, extended=True),
    b"\x1b[5~": Key(0x49, 0x7D, 0x6F, extended=True),  # page up
    b"\x1b[6~": Key(0x51, 0x7A, 0x6D, extended=True),
    b"\x1bOP": Key(0x3B, 0x05, 0x07),  # F1
    b"\x1bOQ": Key(0x3C, 0x06, 0x0F),
    b"\x1bOR": Key(0x3D, 0x04, 0x17),
    b"\x1bOS": Key(0x3E, 0x0C, 0x1F),
    b"\x1b[15~": Key(0x3F, 0x03, 0x27),
    b"\x1b[17~": Key(0x40, 0x0B, 0x2F),
    b"\x1b[18~": Key(0x41, 0x83, 0x37),
    b"\x1b[19~": Key(0x42, 0x0A, 0x3F),
    b"\x1b[20~": Key(0x43, 0x01, 0x47),
    b"\x1b[21~": Key(0x44, 0x09, 0x4F),
    b"\x1b[23~": Key(0x57, 0x78, 0x56),
    b"\x1b[24~": Key(0x58, 0x07, 0x5E),  # F12
}
_LONGEST_SEQUENCE = max(map(len, _SEQUENCES))


def _chords() -> dict[bytes, Chord]:
    """How to type each character and each sequence."""
    chords: dict[bytes, Chord] = {}
    for plain, shifted, first, codes in _ROWS:
        for n, code in enumerate(bytes.fromhex(codes)):
            key = Key(first + n, code, _SET_3_EXCEPTIONS.get(code, code))
            chords[shifted[n].encode()] = SHIFT, key
            chords[plain[n].encode()] = (key,)
    for control in range(0x20):  # ^@, ^A ... ^Z, ^[ ... ^_
        chords[bytes((control,))] = (CONTROL, *chords[chr(control | 0x40).lower().encode()])
    chords |= {b"\b": (BACKSPACE,), b"\x7f": (BACKSPACE,), b"\t": (TAB,), b"\x1b": (ESCAPE,)}
    chords |= {b"\r": (ENTER,), b"\n": (ENTER,)}
    return chords | {sequence: (key,) for sequence, key in _SEQUENCES.items()}


_CHORDS = _chords()

# What the keyboard controller makes of set 2: for all codes in the table above, and for 2, which
# is no key but a keyboard's answer.
TO_SET_1 = {key.set_2: key.set_1 for chord in _CHORDS.values() for key in chord} | {0x02: 0x41}


def typed(data: bytes) -> Iterator[Chord]:
    """The chords for what a terminal has sent; characters of no key are left out.

    An unknown sequence is typed as the characters that it consists of, and so is one that goes on
    in the next read(): nobody can tell its beginning from the Escape key.
    """
    at = 0
    while at < len(data):
        for length in range(min(_LONGEST_SEQUENCE, len(data) - at), 0, -1):
            chord = _CHORDS.get(data[at : at + length])
            if chord is not None:
                yield chord
                break
        at += length


def scan_codes(chord: Chord, scan_set: int) -> bytes:
    """What a keyboard sends, in scan code set 1, 2 or 3, when a chord is pressed and released."""
    pressed = b"".join(_key_codes(key, scan_set, released=False) for key in chord)
    return pressed + b"".join(_key_codes(key, scan_set, released=True) for key in reversed(chord))


def _key_codes(key: Key, scan_set: int, *, released: bool) -> bytes:
    prefix = [EXTENDED] if key.extended and scan_set != 3 else []
    if scan_set == 1:
        return bytes((*prefix, key.set_1 | (0x80 if released else 0)))
    if released:
        prefix.append(RELEASED)
    return bytes((*prefix, key.set_2 if scan_set == 2 else key.set_3))
