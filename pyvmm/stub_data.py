"""Packets that read and write: registers and memory.

Each handler takes the session and the packet without its name, and returns the reply.
"""

from __future__ import annotations

from binascii import hexlify

from pyvmm.registers import Register
from pyvmm.session import (
    EINVAL,
    MAX_DATA,
    PacketError,
    Session,
    decode_register,
    parse_hex,
    split_numbers,
    split_thread_suffix,
    unhex,
)
from pyvmm.target import TargetError


def read_all_registers(session: Session, args: bytes) -> bytes:
    """g: every register, in the order of the target description."""
    rest, vcpu_id = split_thread_suffix(session, args)
    if rest:
        raise PacketError("g takes no argument")
    return session.layout.encode(session.target.read_registers(vcpu_id, session.layout.banks))


def write_all_registers(session: Session, args: bytes) -> bytes:
    """G HEX: every register; only those that change are written."""
    text, vcpu_id = split_thread_suffix(session, args)
    file = session.target.read_registers(vcpu_id, session.layout.banks)
    try:
        updates = session.layout.decode(unhex(text), file)
    except ValueError as error:
        raise PacketError(str(error)) from None
    if updates:
        session.target.write_registers(vcpu_id, updates)
    return b"OK"


def read_register(session: Session, args: bytes) -> bytes:
    """p NUMBER: one register."""
    text, vcpu_id = split_thread_suffix(session, args)
    row = _register(session, text)
    return row.encode(session.target.read_registers(vcpu_id, row.bank))


def write_register(session: Session, args: bytes) -> bytes:
    """P NUMBER=HEX: one register, with exactly its width."""
    text, vcpu_id = split_thread_suffix(session, args)
    number, _, value = text.partition(b"=")
    row = _register(session, number)
    data = unhex(value)
    if len(data) != row.size:
        raise PacketError(f"{row.name} has {row.size} bytes, not {len(data)}")
    file = session.target.read_registers(vcpu_id, row.bank)
    session.target.write_registers(vcpu_id, decode_register(row, data, file))
    return b"OK"


def _register(session: Session, text: bytes) -> Register:
    number = parse_hex(text)
    if number >= len(session.layout.registers):
        raise PacketError(f"there is no register {number}")
    return session.layout.registers[number]


def read_memory_hex(session: Session, args: bytes) -> bytes:
    """m ADDRESS,LENGTH: memory in hex; shorter if not all of it can be read."""
    return hexlify(_read_memory(session, *split_numbers(args, 2)))


def read_memory_binary(session: Session, args: bytes) -> bytes:
    """x ADDRESS,LENGTH: `b` and memory in binary. No bytes at all may be asked for: a probe.

    The `b` takes a byte of the packet, too.
    """
    address, length = split_numbers(args, 2)
    length = min(length, MAX_DATA - 1)
    return b"b" + (_read_memory(session, address, length) if length else b"")


def write_memory_hex(session: Session, args: bytes) -> bytes:
    """M ADDRESS,LENGTH:HEX"""
    header, _, text = args.partition(b":")
    return _write_memory(session, header, unhex(text))


def write_memory_binary(session: Session, args: bytes) -> bytes:
    """X ADDRESS,LENGTH:BINARY. No bytes at all may be written: a probe."""
    header, _, data = args.partition(b":")
    return _write_memory(session, header, data)


def _read_memory(session: Session, address: int, length: int) -> bytes:
    """Guest memory by GVA, or by GPA if the debugger has asked for that."""
    length = min(length, MAX_DATA, (1 << 64) - address)
    if not length:
        raise PacketError("no bytes are asked for")
    if session.physical:
        return session.target.read_physical(address, length)
    return session.target.read_memory(session.selected(), address, length)


def _write_memory(session: Session, header: bytes, data: bytes) -> bytes:
    address, length = split_numbers(header, 2)
    if length != len(data):
        raise PacketError(f"{length} bytes announced, {len(data)} sent")
    if address + length > 1 << 64:
        raise TargetError(EINVAL, "the range goes beyond the last address")
    if not data:
        return b"OK"
    if session.physical:
        session.target.write_physical(address, data)
    else:
        session.target.write_memory(session.selected(), address, data)
    return b"OK"


def set_physical_mode(session: Session, args: bytes) -> bytes:
    """Qqemu.PhyMemMode:1: from now on addresses in memory packets are guest physical."""
    if args not in (b"0", b"1"):
        raise PacketError("the mode is 0 or 1")
    session.physical = args == b"1"
    return b"OK"


def physical_mode(session: Session, args: bytes) -> bytes:
    """qqemu.PhyMemMode"""
    return b"1" if session.physical else b"0"


def memory_region(session: Session, args: bytes) -> bytes:
    """qMemoryRegionInfo:GVA, for lldb: where the region around it begins, how long it is, and
    what is allowed there. A region without permissions is not mapped."""
    region = session.target.memory_region(session.selected(), parse_hex(args))
    permissions = f"permissions:{region.permissions};" if region.permissions else ""
    return f"start:{region.start:x};size:{region.length:x};{permissions}".encode()
