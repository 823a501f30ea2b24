"""The stub: packets from a debugger -> operations on a Target, as one table. No socket, no KVM.

    stub = Stub(target)
    reply = stub.handle(payload)        # None: the reply is owed until the VM stops
    texts = stub.take_console()         # packets to be sent before it, for the user to read
    reply = stub.stop_reply(report)     # that reply, when the VM has stopped or ended

`PACKETS` is the table. A row holds a packet's name, its handler and the words by which `qSupported`
advertises it, so what is advertised and what works cannot drift. A packet whose first byte is `q`,
`Q` or `v` has a name that ends at the first `:`, `;` or `,`, and it must be equal to the row's
(`qCRC` is not `qC`); all others have a name of one byte.

To add a packet: write a function (session, args) -> reply beside its like, and add a row.

The defaults: an unknown packet gets the empty reply, which tells the debugger that it is unknown.
A packet that makes no sense, that the target refuses, or that needs a stopped guest while the guest
runs gets an error reply. Nothing that a debugger sends raises.

Errors: gdb before 15 and most other clients understand `E NN`, some replies of gdb before 15 also
`E.message`; newer ones announce that they understand that everywhere. lldb has its own way. So the
message goes wherever it can be shown, and the target keeps it for `monitor error`.
"""

from __future__ import annotations

import re
from binascii import hexlify
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pyvmm import stub_data, stub_files, stub_run
from pyvmm.registers import Architecture
from pyvmm.rsp import PACKET_SIZE
from pyvmm.session import EBUSY, EINVAL, MAX_DATA, PacketError, Phase, Session, unhex
from pyvmm.target import StopReport, Target, TargetError

Handler = Callable[[Session, bytes], bytes | None]


@dataclass(frozen=True)
class Row:
    """One packet."""

    name: bytes
    handler: Handler
    separator: bytes = b""  # between name and arguments
    token: bytes = b""  # in the reply to qSupported
    any_phase: bool = False  # makes sense not only while the guest is stopped
    shows_message: bool = False  # gdb before 15 shows an `E.message` reply to this packet


# ---- Packets about the session itself ----


def _supported(session: Session, args: bytes) -> bytes:
    """qSupported:FEATURE;...: what the debugger can do, and what the stub can do.

    A feature is announced as `name+` (or `name=value`); it is remembered without the `+`.
    """
    words = args.split(b";")
    session.announced = frozenset(word[:-1] for word in words if word[1:].endswith(b"+"))
    tokens = [b"PacketSize=%x" % PACKET_SIZE]
    tokens += [row.token for row in PACKETS if row.token]
    offered = [document.name for document in stub_files.offered(session)]
    tokens += [b"qXfer:%b:read+" % name for name in offered]
    tokens += [b"%b+" % name for name in _BOTH_SIDES if name in session.announced]
    return b";".join(tokens)


# Features that are no packets: they work if both sides say so.
_BOTH_SIDES = (b"swbreak", b"hwbreak", b"multiprocess", b"no-resumed", b"error-message")


def _ok(session: Session, args: bytes) -> bytes:
    """OK: the stub does this anyway."""
    return b"OK"


def _unsupported(session: Session, args: bytes) -> bytes:
    """The empty reply, on purpose."""
    return b""


def _no_acks(session: Session, args: bytes) -> bytes:
    """QStartNoAckMode: the caller tells the link after this reply."""
    session.no_ack_mode = True
    return b"OK"


def _list_threads(session: Session, args: bytes) -> bytes:
    """QListThreadsInStopReply, from lldb."""
    session.list_threads = True
    return b"OK"


def _error_strings(session: Session, args: bytes) -> bytes:
    """QEnableErrorStrings, from lldb."""
    session.error_strings = True
    return b"OK"


def _attached(session: Session, args: bytes) -> bytes:
    """qAttached: the guest was there before, so gdb shall detach when it quits, not kill."""
    return b"1"


def _physical_supported(session: Session, args: bytes) -> bytes:
    """qqemu.Supported: which of QEMU's own packets there are."""
    return b"PhyMemMode"


_TRIPLES = {
    Architecture.X86_64: ("x86_64-unknown-none", 8),
    Architecture.I386: ("i386-unknown-none", 4),
    Architecture.I8086: ("i386-unknown-none-code16", 4),
}


def _host_info(session: Session, args: bytes) -> bytes:
    """qHostInfo and qProcessInfo, from lldb. No process id: it would look for that process."""
    triple, pointer_size = _TRIPLES[session.layout.architecture]
    return b"triple:%b;endian:little;ptrsize:%d;" % (hexlify(triple.encode()), pointer_size)


def _watchpoints(session: Session, args: bytes) -> bytes:
    """qWatchpointSupportInfo, from lldb: an x86 processor has DR0 to DR3."""
    return b"num:4;"


def _offsets(session: Session, args: bytes) -> bytes:
    """qOffsets: where the first segment of the debugger's file is. Asked when it connects."""
    base = session.target.moved_base()
    return b"" if base is None else b"TextSeg=%x" % base


def _monitor(session: Session, args: bytes) -> bytes:
    """qRcmd,HEX: a `monitor` command. Errors are text, too: gdb before 15 shows no others here.

    The text goes before the reply: as part of it lldb would show it in hex.
    """
    command = unhex(args).decode(errors="replace")
    try:
        session.console += session.target.monitor(command, session.selected())
    except TargetError as error:
        session.console += f"{error.message}\n"
    return b"OK"


# ---- The table ----

PACKETS: tuple[Row, ...] = (
    # session
    Row(b"qSupported", _supported, b":"),
    Row(b"QStartNoAckMode", _no_acks, token=b"QStartNoAckMode+"),
    Row(b"vMustReplyEmpty", _unsupported),
    Row(b"!", _ok),
    Row(b"qAttached", _attached, b":"),
    Row(b"qSymbol", _ok, b":"),
    Row(b"qOffsets", _offsets),
    Row(b"qRcmd", _monitor, b","),
    Row(b"qXfer", stub_files.read_document, b":"),
    Row(b"vFile", stub_files.file_operation, b":", any_phase=True),
    # registers and memory
    Row(b"g", stub_data.read_all_registers, shows_message=True),
    Row(b"G", stub_data.write_all_registers, shows_message=True),
    Row(b"p", stub_data.read_register, shows_message=True),
    Row(b"P", stub_data.write_register, shows_message=True),
    Row(b"m", stub_data.read_memory_hex),
    Row(b"M", stub_data.write_memory_hex),
    Row(b"x", stub_data.read_memory_binary, token=b"binary-upload+"),
    Row(b"X", stub_data.write_memory_binary),
    Row(b"qqemu.Supported", _physical_supported),
    Row(b"qqemu.PhyMemMode", stub_data.physical_mode),
    Row(b"Qqemu.PhyMemMode", stub_data.set_physical_mode, b":"),
    # running and stopping
    Row(b"vCont", stub_run.resume_threads, b";", b"vContSupported+", shows_message=True),
    Row(b"vCont?", stub_run.supported_actions),
    Row(b"c", partial(stub_run.resume_plain, b"c")),
    Row(b"s", partial(stub_run.resume_plain, b"s")),
    Row(b"C", partial(stub_run.resume_plain, b"C")),
    Row(b"S", partial(stub_run.resume_plain, b"S")),
    Row(b"?", stub_run.why_stopped),
    Row(b"vCtrlC", stub_run.interrupt, any_phase=True),
    Row(b"Z", stub_run.insert_breakpoint),
    Row(b"z", stub_run.remove_breakpoint),
    # threads
    Row(b"H", stub_run.select_thread),
    Row(b"T", stub_run.is_alive),
    Row(b"qC", stub_run.current_thread),
    Row(b"qfThreadInfo", stub_run.first_threads),
    Row(b"qsThreadInfo", stub_run.more_threads),
    Row(b"qThreadExtraInfo", stub_run.describe_thread, b","),
    # the end
    Row(b"D", stub_run.detach, b";", any_phase=True),
    Row(b"k", stub_run.kill, any_phase=True),
    Row(b"vKill", stub_run.kill_process, b";", any_phase=True),
    Row(b"vAttach", stub_run.attach, b";", any_phase=True),
    # lldb's own
    Row(b"QThreadSuffixSupported", _ok),
    Row(b"QListThreadsInStopReply", _list_threads),
    Row(b"QEnableErrorStrings", _error_strings),
    Row(b"qHostInfo", _host_info),
    Row(b"qProcessInfo", _host_info),
    Row(b"qWatchpointSupportInfo", _watchpoints, b":"),
    Row(b"qThreadStopInfo", stub_run.thread_stop),
    Row(b"qMemoryRegionInfo", stub_data.memory_region, b":"),
)
_ROW_OF = {row.name: row for row in PACKETS}

_LONG_NAMES = frozenset((b"q", b"Q", b"v"))  # what begins one
_NAME_END = re.compile(rb"[:;,]")
_THREAD_STOP = b"qThreadStopInfo"  # the one name that its argument follows without a separator


def _find(payload: bytes) -> tuple[Row | None, bytes]:
    """The row of a packet, and what follows its name."""
    name = payload[:1]
    if name in _LONG_NAMES:
        if payload.startswith(_THREAD_STOP):
            name = _THREAD_STOP
        else:
            end = _NAME_END.search(payload)
            name = payload[: end.start()] if end else payload
    return _ROW_OF.get(name), payload[len(name) :]


class Stub:
    """One debugger's session with a target. Not thread-safe: one thread feeds it."""

    def __init__(self, target: Target) -> None:
        self.session = Session(target)

    @property
    def no_ack_mode(self) -> bool:
        """Whether the debugger wants no acknowledgements; look at it after each reply."""
        return self.session.no_ack_mode

    @property
    def owes_reply(self) -> bool:
        """Whether the debugger waits for a stop reply."""
        return self.session.phase is Phase.RUNNING

    def handle(self, payload: bytes) -> bytes | None:
        """The reply to a packet; None if it is owed until the VM stops."""
        row, args = _find(payload)
        if not row:
            return b""
        try:
            if self.session.phase is not Phase.STOPPED and not row.any_phase:
                raise TargetError(EBUSY, self.session.phase.value)
            if row.separator and args:
                separator, args = args[:1], args[1:]
                if separator != row.separator:
                    raise PacketError("the arguments are malformed")
            return row.handler(self.session, args)
        except PacketError as error:
            return self._error(EINVAL, str(error), row)
        except TargetError as error:
            return self._error(error.errno, error.message, row)

    def take_console(self) -> list[bytes]:
        """The packets that go before the reply that handle() has just returned."""
        text, self.session.console = self.session.console, ""
        return console_output(text)

    def stop_reply(self, report: StopReport) -> bytes | None:
        """The packet that tells of a stop; None if nobody waits for one."""
        return stub_run.stop_reply(self.session, report)

    def reject(self, reason: str) -> bytes:
        """The reply to something that could not even be decoded: see rsp.Link.receive."""
        return self._error(EINVAL, reason, None)

    def _error(self, errno: int, message: str, row: Row | None) -> bytes:
        self.session.target.last_error = message
        number = b"E%02x" % (errno & 0xFF)
        if self.session.error_strings:
            return number + b";" + hexlify(message.encode(errors="replace"))
        if b"error-message" in self.session.announced or (row and row.shows_message):
            return b"E." + message.translate(_PLAIN).encode("ascii", "replace")
        return number


# gdb does not unescape text replies, so a message must not contain what would be escaped.
_PLAIN = str.maketrans("#$}*\n", ".... ")


def console_output(text: str) -> list[bytes]:
    """The packets that make a debugger print `text`: only before a reply that is owed."""
    data = text.encode(errors="replace")
    size = MAX_DATA - 1
    return [b"O" + hexlify(data[at : at + size]) for at in range(0, len(data), size)]
