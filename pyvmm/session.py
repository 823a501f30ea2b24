"""What the stub remembers of one debugger, and how packets spell things.

The state is all here, in one class without behaviour of its own to speak of; the packets are
functions on it, in the modules that stub.py's table names.

Threads: one for each vCPU, thread id = vcpu_id + 1, in the one process with id 1. A debugger that
has announced `multiprocess` writes `p1.2`, others `2`; both are understood.
"""

from __future__ import annotations

from binascii import Error as HexError
from binascii import unhexlify
from dataclasses import dataclass, field
from enum import Enum

from pyvmm import registers
from pyvmm.rsp import PACKET_SIZE
from pyvmm.target import ExecFile, Target

PID = 1
ANY, ALL = 0, -1  # thread ids with a meaning of their own

# Bytes of guest memory (or of a document) in one reply: hex doubles them, and so does escaping
# in the worst case.
MAX_DATA = PACKET_SIZE // 2

EBUSY, EINVAL = 16, 22  # the numbers are Linux's; clients show them, none interprets

_HEX_DIGITS = b"0123456789abcdefABCDEF"


class PacketError(Exception):
    """The debugger sent a packet that means nothing. The session goes on: an E reply."""


class Phase(Enum):
    """Where the session stands; the values say why a packet cannot be answered now.

    STOPPED --(c, s, vCont)--> RUNNING --(stop)--> STOPPED
                                       --(the VM ends)--> ENDED
    STOPPED, RUNNING --(D)--> DETACHED --(vAttach)--> RUNNING
    any --(k, vKill)--> ENDED
    """

    STOPPED = "the guest is stopped"
    RUNNING = "the guest is running"  # and a stop reply is owed
    DETACHED = "the debugger has detached"
    ENDED = "the VM has ended"

    __hash__ = object.__hash__  # Enum's own, of the name, is slow


_NEXT = {
    Phase.STOPPED: {Phase.RUNNING, Phase.DETACHED, Phase.ENDED},
    Phase.RUNNING: {Phase.STOPPED, Phase.DETACHED, Phase.ENDED},
    Phase.DETACHED: {Phase.RUNNING, Phase.ENDED},
    Phase.ENDED: set[Phase](),
}


@dataclass
class Session:
    """The state of one debugger's session."""

    target: Target
    layout: registers.Layout = field(init=False)
    general: int = ANY  # thread id of Hg: registers and memory
    control: int = ALL  # thread id of Hc: `c` and `s`, never mixed up with `general`
    stopped_vcpu: int = 0  # whose stop was reported last: what ANY means
    phase: Phase = Phase.STOPPED
    announced: frozenset[bytes] = frozenset()  # features of the debugger, from qSupported
    no_ack_mode: bool = False
    list_threads: bool = False  # lldb: name all threads in stop replies
    error_strings: bool = False  # lldb: E with a message
    console: str = ""  # what the user is to read before the next reply
    physical: bool = False  # addresses of memory packets are GPAs
    open_files: dict[int, ExecFile] = field(default_factory=dict)
    documents: dict[bytes, bytes] = field(default_factory=dict)  # being read in pieces by qXfer

    def __post_init__(self) -> None:
        self.choose_layout()

    def enter(self, phase: Phase) -> None:
        """Every change of phase goes through here; the handlers do not try others."""
        assert phase in _NEXT[self.phase], f"{self.phase} -> {phase}"
        self.phase = phase

    def choose_layout(self) -> None:
        """Settle what the registers look like, until the debugger asks for a description again."""
        self.layout = registers.layout(self.target.architecture(), self.target.has_avx())

    def selected(self, thread: int | None = None) -> int:
        """The vcpu_id that `thread` (of Hg, if None) means for registers and memory."""
        thread = self.general if thread is None else thread
        return thread - 1 if thread > 0 else self.stopped_vcpu

    def parse_thread(self, text: bytes) -> int:
        """A thread id from a packet: ANY, ALL, or one that exists. Raises PacketError."""
        if text.startswith(b"p"):
            process, dot, text = text[1:].partition(b".")
            if process not in (b"-1", b"0") and parse_hex(process) != PID:
                raise PacketError(f"there is no process {process.decode()}, only {PID}")
            if not dot:
                return ALL
        if text == b"-1":
            return ALL
        thread = parse_hex(text)
        if thread and thread - 1 not in self.target.vcpu_ids():
            raise PacketError(f"there is no thread {thread}")
        return thread

    def format_thread(self, vcpu_id: int) -> str:
        """The thread id of a vCPU, as this debugger writes it."""
        process = f"p{PID:x}." if b"multiprocess" in self.announced else ""
        return f"{process}{vcpu_id + 1:x}"


def parse_hex(text: bytes) -> int:
    """A hexadecimal number of at most 64 bits. Stricter than int(): no sign, no 0x, no spaces."""
    if not text or len(text) > 16 or text.strip(_HEX_DIGITS):
        raise PacketError("a hexadecimal number is malformed")
    return int(text, 16)


def unhex(text: bytes) -> bytes:
    """The bytes that a string of hexadecimal digits stands for."""
    try:
        return unhexlify(text)
    except HexError:
        raise PacketError("hexadecimal data is malformed") from None


def decode_register(
    row: registers.Register, data: bytes, file: registers.RegisterFile
) -> dict[str, registers.Value]:
    """What to write so that the register reads back as `data`."""
    try:
        return row.decode(data, file)
    except ValueError as error:
        raise PacketError(str(error)) from None


def split_numbers(text: bytes, count: int) -> list[int]:
    """`count` hexadecimal numbers with commas between them."""
    numbers = [parse_hex(number) for number in text.split(b",")]
    if len(numbers) != count:
        raise PacketError(f"{count} numbers are needed")
    return numbers


def split_thread_suffix(session: Session, args: bytes) -> tuple[bytes, int]:
    """lldb's `;thread:2;` at the end of g, G, p and P: the rest, and the vcpu_id."""
    args, separator, suffix = args.partition(b";")
    if not separator:
        return args, session.selected()
    name, _, thread = suffix.rstrip(b";").partition(b":")
    if name != b"thread":
        raise PacketError("only a thread can be named here")
    return args, session.selected(session.parse_thread(thread))
