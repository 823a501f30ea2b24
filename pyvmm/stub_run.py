"""Packets that run and stop the guest: resuming, breakpoints, threads, stop replies, the end.

A handler that lets the guest run returns None: its reply is the stop reply, which the debug server
sends when the VM has stopped.

What is resolved here, so that the target sees only vCPUs: `vCont` with its default and its actions
for single threads (the leftmost that names a thread decides; a thread that none names stays
parked), and the older `c s C S`, which mean the threads that `Hc` chose. The signal of `C` and `S`
is ignored: a guest has nobody who could take one.
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Callable

from pyvmm.registers import Bank
from pyvmm.session import (
    ALL,
    ANY,
    EBUSY,
    EINVAL,
    PID,
    PacketError,
    Phase,
    Session,
    decode_register,
    parse_hex,
    split_numbers,
)
from pyvmm.target import (
    Action,
    ActionKind,
    BreakpointKind,
    StopKind,
    StopReport,
    TargetError,
)

# ---- Resuming ----


def resume_threads(session: Session, args: bytes) -> bytes | None:
    """vCont;ACTION[:THREAD]..."""
    return _resume(session, [_parse_action(session, text) for text in args.split(b";")])


def _parse_action(session: Session, text: bytes) -> tuple[Action | None, int]:
    """One action of vCont, and the thread it is for; None for `t`, which means: stay parked."""
    text, colon, thread_text = text.partition(b":")
    thread = session.parse_thread(thread_text) if colon else ALL
    letter, argument = text[:1], text[1:]
    if letter == b"r":
        start, end = split_numbers(argument, 2)
        return Action(ActionKind.RANGE_STEP, start=start, end=end), thread
    if letter == b"t" and not argument:
        return None, thread
    if letter in (b"C", b"S"):
        parse_hex(argument)
    elif letter not in (b"c", b"s") or argument:
        raise PacketError("unknown action")
    return Action(_KINDS[letter]), thread


_KINDS = {
    b"c": ActionKind.CONTINUE,
    b"C": ActionKind.CONTINUE,
    b"s": ActionKind.STEP,
    b"S": ActionKind.STEP,
}


def supported_actions(session: Session, args: bytes) -> bytes:
    """vCont?: gdb uses vCont only if C and S are there, and steps over lines with r."""
    return b"vCont;c;C;s;S;t;r"


def resume_plain(letter: bytes, session: Session, args: bytes) -> bytes | None:
    """c [GVA], s [GVA], C SIGNAL[;GVA], S SIGNAL[;GVA]"""
    if letter in (b"C", b"S"):
        signal, _, args = args.partition(b";")
        parse_hex(signal)
    kind, thread = _KINDS[letter], session.control
    if thread == ANY or (thread == ALL and kind is ActionKind.STEP):
        # One thread steps. All continue: without vCont, "any" is how gdb says "all".
        thread = ALL if kind is ActionKind.CONTINUE else session.stopped_vcpu + 1
    if args:
        row = session.layout.registers[session.layout.first[0]]
        vcpu_id = session.selected(thread)
        file = session.target.read_registers(vcpu_id, row.bank)
        data = parse_hex(args).to_bytes(8, "little")[: row.size]
        session.target.write_registers(vcpu_id, decode_register(row, data, file))
    return _resume(session, [(Action(kind), thread)])


def _resume(session: Session, wanted: list[tuple[Action | None, int]]) -> bytes | None:
    """Find each vCPU's action and let them run."""
    actions: dict[int, Action] = {}
    for vcpu_id in session.target.vcpu_ids():
        action = _first(wanted, vcpu_id + 1, session.stopped_vcpu + 1)
        if action:
            actions[vcpu_id] = action
    if not actions:
        if b"no-resumed" in session.announced:
            return b"N"
        raise TargetError(EINVAL, "no thread would run")
    default = _first([entry for entry in wanted if entry[1] == ALL], ALL, ALL)
    newcomers_run = default is not None and default.kind is ActionKind.CONTINUE
    session.target.resume(actions, newcomers_run)
    session.enter(Phase.RUNNING)
    return None


def _first(wanted: list[tuple[Action | None, int]], thread: int, stopped: int) -> Action | None:
    """The leftmost action that names the thread."""
    for action, name in wanted:
        if name in (ALL, thread) or (name == ANY and thread == stopped):
            return action
    return None


def interrupt(session: Session, args: bytes) -> bytes:
    """vCtrlC: like 0x03, but with a reply."""
    if session.phase is Phase.RUNNING:  # else nobody would be told of the stop
        session.target.interrupt()
    return b"OK"


# ---- Stop replies ----


def why_stopped(session: Session, args: bytes) -> bytes:
    """?"""
    return _tell(session, session.target.stop_report())


def stop_reply(session: Session, report: StopReport) -> bytes | None:
    """Tell of a stop, if a reply is owed; else a debugger would take it for the next stop."""
    if session.phase is not Phase.RUNNING:
        return None
    session.enter(Phase.STOPPED)
    return _tell(session, report)


def _tell(session: Session, report: StopReport) -> bytes:
    """The reply that tells of a stop or of the end."""
    if report.kind in (StopKind.EXITED, StopKind.SIGNALLED):
        session.enter(Phase.ENDED)
    process = f";process:{PID:x}".encode() if b"multiprocess" in session.announced else b""
    if report.kind is StopKind.EXITED:
        return b"W%02x" % (report.status & 0xFF) + process
    if report.kind is StopKind.SIGNALLED:
        return b"X%02x" % (report.signal & 0xFF) + process
    # gdb takes the thread of a stop as the one that it has selected, without saying so.
    session.stopped_vcpu, session.general = report.vcpu_id, ANY
    return _stop_of_thread(session, report)


def thread_stop(session: Session, args: bytes) -> bytes:
    """qThreadStopInfo THREAD, for lldb: why this thread stopped; signal 0 if just because another
    one did."""
    vcpu_id = session.selected(session.parse_thread(args))
    report = session.target.stop_report()
    if vcpu_id != report.vcpu_id:
        report = StopReport(vcpu_id, signal=0)
    return _stop_of_thread(session, report)


def _stop_of_thread(session: Session, report: StopReport) -> bytes:
    """T SIGNAL and pairs `name:value;`: thread, reason, the registers that are read first."""
    thread = session.format_thread(report.vcpu_id).encode()
    reply = b"T%02xthread:%b;" % (report.signal & 0xFF, thread)
    word = report.kind.value.encode()
    if report.kind in _WATCH_KINDS:
        reply += b"%b:%x;" % (word, report.gva)
    elif word in session.announced:  # swbreak, hwbreak
        reply += word + b":;"
    if session.list_threads:
        ids = map(session.format_thread, session.target.vcpu_ids())
        reply += b"threads:%b;" % ",".join(ids).encode()
    layout = session.layout
    try:
        file = session.target.read_registers(report.vcpu_id, Bank.GENERAL)
    except TargetError:
        return reply  # the stop must be told in any case; the debugger will ask for registers
    return reply + layout.encode_first(file)


_WATCH_KINDS = (StopKind.WATCH, StopKind.RWATCH, StopKind.AWATCH)


# ---- Breakpoints ----


def insert_breakpoint(session: Session, args: bytes) -> bytes:
    """Z KIND,GVA,LENGTH"""
    return _change_breakpoint(session, args, session.target.insert_breakpoint)


def remove_breakpoint(session: Session, args: bytes) -> bytes:
    """z KIND,GVA,LENGTH"""
    return _change_breakpoint(session, args, session.target.remove_breakpoint)


def _change_breakpoint(
    session: Session, args: bytes, change: Callable[[BreakpointKind, int, int, int], None]
) -> bytes:
    if b";" in args:  # to ignore a condition would stop where nobody asked to
        raise PacketError("breakpoint conditions and commands are not supported")
    kind, gva, length = split_numbers(args, 3)
    if kind not in BreakpointKind.__members__.values():
        return b""  # a kind that did not exist yet: the empty reply says that it is unknown
    if kind in (BreakpointKind.SOFTWARE, BreakpointKind.HARDWARE):
        if length not in (1, 2, 4, 8):
            raise PacketError(f"a breakpoint has 1, 2, 4 or 8 bytes, not {length}")
    elif not length or gva + length > 1 << 64:  # gdb watches objects of any size
        raise PacketError(f"{length} bytes cannot be watched at {gva:#x}")
    change(BreakpointKind(kind), session.selected(), gva, length)
    return b"OK"


# ---- Threads ----


def select_thread(session: Session, args: bytes) -> bytes:
    """H g THREAD for registers and memory, H c THREAD for c and s. Two cursors, never one."""
    thread = session.parse_thread(args[1:])
    if args[:1] == b"g":
        session.general = thread
    elif args[:1] == b"c":
        session.control = thread
    else:
        raise PacketError("H selects for g or for c")
    return b"OK"


def is_alive(session: Session, args: bytes) -> bytes:
    """T THREAD"""
    session.parse_thread(args)
    return b"OK"


def current_thread(session: Session, args: bytes) -> bytes:
    """qC"""
    return b"QC" + session.format_thread(session.selected()).encode()


def first_threads(session: Session, args: bytes) -> bytes:
    """qfThreadInfo: all threads at once."""
    return b"m" + ",".join(map(session.format_thread, session.target.vcpu_ids())).encode()


def more_threads(session: Session, args: bytes) -> bytes:
    """qsThreadInfo: there are no more."""
    return b"l"


def describe_thread(session: Session, args: bytes) -> bytes:
    """qThreadExtraInfo,THREAD: what `info threads` shows, in hex."""
    vcpu_id = session.selected(session.parse_thread(args))
    state = session.target.describe(vcpu_id)
    return hexlify(f"vCPU {vcpu_id}, {state}".encode(errors="replace"))


# ---- The end of a session ----


def detach(session: Session, args: bytes) -> bytes:
    """D, or D;PROCESS"""
    if args:
        _check_process(args)
    if session.phase in (Phase.STOPPED, Phase.RUNNING):
        session.target.detach()
        session.enter(Phase.DETACHED)
    return b"OK"


def kill(session: Session, args: bytes) -> bytes:
    """k: gdb does not look at a reply, lldb waits for one, as if the VM had died of SIGKILL."""
    if session.phase is not Phase.ENDED:
        session.target.kill()
        session.enter(Phase.ENDED)
    return b"X09"


def kill_process(session: Session, args: bytes) -> bytes:
    """vKill;PROCESS"""
    _check_process(args)
    kill(session, b"")
    return b"OK"


def attach(session: Session, args: bytes) -> bytes | None:
    """vAttach;PROCESS: after D in extended mode, or on a session that is attached anyway."""
    _check_process(args)
    if session.phase is Phase.STOPPED:
        return why_stopped(session, b"")
    if session.phase is not Phase.DETACHED:
        raise TargetError(EBUSY, session.phase.value)
    session.target.attach()
    session.enter(Phase.RUNNING)
    return None


def _check_process(text: bytes) -> None:
    if parse_hex(text) != PID:
        raise PacketError(f"there is only process {PID}")
