"""Nonsense, seeded and bounded: nothing that a debugger sends raises, hangs or ends the session."""

from __future__ import annotations

import random
from binascii import hexlify

import pytest

from pyvmm.rsp import PACKET_SIZE, Decoder, Event, Link, encode, escaped_length
from pyvmm.session import Phase
from pyvmm.stub import PACKETS, Stub
from pyvmm.target import SIGINT, ExecFile, StopKind, StopReport
from tests.fake_target import GDB, RAM_SIZE, FakeTarget, packets

SEEDS = range(5)
PATH = hexlify(b"/guest.elf").decode()
WORDS = [
    b"",
    b"\xff\x00",
    b"\x03",
    *packets(f"""
        0 1 2 3 -1 p1.1 p1.2 p1.-1 p-1.1 p2.1 p ff 10 {RAM_SIZE:x} {RAM_SIZE - 1:x}
        7fffffffffffffff ffffffffffffffff 10000000000000000 : ; , = . c C05 s S05 t r0,8 g 6869
        read features threads exec-file memory-map target.xml open pread fstat close setfs {PATH}
        0000000000000000 zz thread multiprocess+ error-message+ QStartNoAckMode
    """),
]
PACKETS_THAT_WORK = [
    GDB,
    b"G" + b"00" * 608,
    *packets(f"""
        g g;thread:2; p10 p8;thread:p1.2; P0=0011223344556677 m0,40 m3fff0,ff mffffffffffffffff,8
        x0,0 x100,200 M10,2:abcd X0,0: X20,3:a:b Qqemu.PhyMemMode:1 Qqemu.PhyMemMode:0
        qMemoryRegionInfo:1000 Z0,1000,1 z0,1000,1 Z2,2000,8 Z1,0,1 Hg1 Hgp1.2 Hc-1 Hc2 Tp1.1
        c s C05 S05;1000 vCont;c vCont;s:p1.1;c:p1.-1 vCont;r0,10:2 vCont;t vCtrlC ? qC
        qfThreadInfo qThreadExtraInfo,2 qThreadStopInfo1 qHostInfo qRcmd,68656c70
        qXfer:features:read:target.xml:0,1000 qXfer:threads:read::0,40 qXfer:exec-file:read:1:0,10
        vFile:open:{PATH},0,0 vFile:pread:0,100,10 vFile:fstat:0 vFile:close:0 vFile:setfs:0
        qSupported:error-message+ QEnableErrorStrings QListThreadsInStopReply D;1 vAttach;1
        vKill;1 k
    """),
]


class Server:
    """The debug server without sockets: bytes in, bytes out, and a VM that stops now and then."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.target = FakeTarget()
        content = chance.randbytes(1000)
        self.target.file = ExecFile(
            "/guest.elf", 64, 1000, lambda at, count: content[at : at + count]
        )
        self.stub, self.link = Stub(self.target), Link()

    def receive(self, data: bytes) -> bytes:
        for event in self.link.receive(data):
            if isinstance(event, bytes):
                self.packet(event)
            elif event is Event.INTERRUPT:
                self.target.interrupt()
            else:
                self.link.send(self.stub.reject(event.value))
            if self.stub.session.phase is Phase.ENDED:
                self.target.stopped = True  # a new session with a new VM
                self.stub = Stub(self.target)
            elif self.chance.random() < 0.5:
                self.stop()
        return self.link.take_output()

    def packet(self, payload: bytes) -> None:
        reply = self.stub.handle(payload)
        self.link.acks = not self.stub.no_ack_mode
        if reply is None:
            assert self.stub.session.phase is Phase.RUNNING
            return
        assert escaped_length(reply) <= PACKET_SIZE
        self.link.send(reply)

    def stop(self) -> None:
        if self.stub.session.phase is not Phase.RUNNING:
            return
        kinds = [kind for kind in StopKind if kind not in (StopKind.EXITED, StopKind.SIGNALLED)]
        report = StopReport(self.chance.randrange(2), SIGINT, self.chance.choice(kinds), 0x1000)
        self.target.stopped, self.target.report = True, report
        reply = self.stub.stop_reply(report)
        assert reply is not None
        self.link.send(reply)

    def assert_alive(self) -> None:
        """However confused the client was: a proper one that connects now is served."""
        self.target.stopped = True
        self.stub, self.link = Stub(self.target), Link()
        output = self.receive(encode(GDB) + b"+" + encode(b"m0,1"))
        assert output.startswith(b"+$PacketSize=20000;")
        assert b"+$%02x#" % self.target.ram[0] in output


def nonsense(chance: random.Random) -> bytes:
    """A packet that works, changed a little or not; or a packet's name and any words."""
    if chance.random() < 0.6:
        packet = chance.choice(PACKETS_THAT_WORK)
        return packet if chance.random() < 0.5 else mutated(chance, packet)
    name = chance.choice(PACKETS).name if chance.random() < 0.95 else chance.randbytes(3)
    separators = (b"", b":", b";", b",")
    words = (chance.choice(separators) + chance.choice(WORDS) for _ in range(chance.randrange(6)))
    return name + b"".join(words)


def mutated(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, removed, doubled or put in."""
    result = bytearray(data)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(result) + 1)
        match chance.randrange(4):
            case 0:
                result[at : at + 1] = chance.randbytes(1)
            case 1:
                del result[at : at + chance.randrange(1, 4)]
            case 2:
                result[at:at] = result[at : at + 8]
            case _:
                result[at:at] = chance.choice((b"$", b"#", b"}", b"*", b"\x03", b"+", b"-"))
    return bytes(result)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", SEEDS)
def test_packets_of_nonsense(seed: int) -> None:
    chance = random.Random(seed)
    server = Server(chance)
    for _ in range(3000):
        server.receive(encode(nonsense(chance)))
    server.assert_alive()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_bytes(seed: int) -> None:
    chance = random.Random(seed)
    server = Server(chance)
    for _ in range(2000):
        server.receive(mutated(chance, encode(nonsense(chance))))
    server.assert_alive()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_bytes(seed: int) -> None:
    chance = random.Random(seed)
    server = Server(chance)
    for _ in range(300):
        server.receive(bytes(chance.choices(b"$#}*+-\x030123gmHcsvZ:;,", k=chance.randrange(200))))
        server.receive(chance.randbytes(chance.randrange(200)))
    server.assert_alive()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_packet_gets_exactly_one_reply(seed: int) -> None:
    """In no-ack mode, so that only replies come back; the VM stops when it has been resumed."""
    chance = random.Random(seed)
    server = Server(chance)
    server.receive(encode(b"QStartNoAckMode"))
    decoder = Decoder()
    for _ in range(2000):
        packet = nonsense(chance)
        if packet[:1] in (b"k", b"D") or packet.startswith((b"vKill", b"vAttach")):
            continue  # the end: no reply, or no more replies
        replies = decoder.receive(server.receive(encode(packet)))
        server.stop()
        replies += decoder.receive(server.link.take_output())
        assert len(replies) == 1 and isinstance(replies[0], bytes), packet
