"""The command line: arguments -> machine -> exit status."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from types import FrameType

from pyvmm.boot import ImageError, Mode, read_image
from pyvmm.console import EscapeKeys, KeptOutput, Output, RawTerminal
from pyvmm.light import TYPE_CHECKING, NoReturn
from pyvmm.machine import DEFAULT_MEMORY, MIN_MEMORY, Machine
from pyvmm.stop import STATUS_FAILED, STATUS_USAGE, Stop, StopReason
from pyvmm.version import VERSION
from pyvmm.waiting import in_background

if TYPE_CHECKING:
    from pyvmm.debug import Address, DebugServer
    from pyvmm.devices.virtio import VirtioDevice
    from pyvmm.devices.virtio_console import VirtioConsole
    from pyvmm.screen import LiveScreen
    from pyvmm.trace import Tracer

EPILOG = """\
exit status:
  0        the guest ended by itself: hlt with interrupts off on all vCPUs, power-off, or with
           --no-reboot a reset
  odd      the guest's own: it wrote V to port 0xf4, the status is (V << 1) | 1
  2        wrong usage, or an image that cannot be used
  4        the host or pyvmm failed (no /dev/kvm, no permission, ...)
  6        the guest crashed (triple fault, an exit that nobody handles)
  124      --timeout ran out
  130/143  ended by SIGINT/SIGTERM

keys, where stdin is a terminal:
  Ctrl-A x                 end the VM and leave, with status 0
  Ctrl-A h                 show these keys; Ctrl-A Ctrl-A sends Ctrl-A to the guest
  Ctrl-C                   the same with status 130; in a Linux guest the guest's own

examples:
  pyvmm guests/hello.bin                    run a flat binary in 64-bit mode
  pyvmm guests/hello16.bin --mode real      run a boot sector
  pyvmm kernel.elf -m 256M --timeout 10     run a static ELF file, ten seconds at most
  pyvmm kernel.elf -c 2 --append "debug"    two vCPUs, and a command line
  pyvmm vmlinuz --initrd initrd -m 512M --append console=ttyS0
                                            boot Linux
  pyvmm guests/hello.bin --trace            show every exit
  pyvmm guests/loops.bin --gdb 1234         debug it: gdb -ex 'target remote :1234'
  pyvmm --probe                             what this host's KVM can do
"""


class _Interrupted(Exception):
    """A signal asked us to end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run pyvmm with these arguments (sys.argv by default); returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _open_standard_descriptors()
    try:
        if arguments.probe:
            if arguments.image is not None:
                parser.error("--probe runs no image")
            return _probe(arguments)
        if arguments.json or arguments.require:
            parser.error("--json and --require go with --probe")
        if (arguments.gdb_nowait or arguments.gdb_catch_int3) and arguments.gdb is None:
            parser.error("--gdb-nowait and --gdb-catch-int3 go with --gdb ADDRESS")
        if arguments.image is None:
            parser.error("name an image to run, or --probe")
        return _run(arguments)
    except (ImageError, ValueError) as error:
        return _fail(STATUS_USAGE, str(error))
    except BrokenPipeError:
        return _fail(STATUS_FAILED, "nobody reads our output any more")
    except OSError as error:
        return _fail(STATUS_FAILED, _advice(error, arguments.device))
    except RuntimeError as error:  # a thread that does not stop
        return _fail(STATUS_FAILED, str(error))
    except KeyboardInterrupt:  # before the guest ran, or after
        return 128 + signal.SIGINT


def _fail(status: int, message: str) -> int:
    _tell(f"pyvmm: {message}")
    return status


def _tell(message: str) -> None:
    """Print on stderr."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it: say nothing more, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _open_standard_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed: else /dev/kvm might land there."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return


def _advice(error: OSError, device: str) -> str:
    """A host's failure as one line that says what to do."""
    if error.filename == device:
        if isinstance(error, FileNotFoundError):
            return (
                f"{device} does not exist: this host offers no KVM. Load kvm_intel or kvm_amd, "
                "enable virtualization in the firmware, or nested virtualization in a VM"
            )
        if isinstance(error, PermissionError):
            return (
                f"{device}: permission denied. Join its group (sudo usermod -aG kvm $USER, then "
                "log in again), or run as root"
            )
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


# --- arguments ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"pyvmm: {message} (pyvmm --help explains)", file=sys.stderr)
        sys.exit(STATUS_USAGE)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Of a fixed width: to ask for the terminal's, argparse imports shutil, at every start."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=96)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyvmm",
        description="Run a guest on Linux KVM.",
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a flat binary, a static ELF file, a multiboot or Linux kernel",
    )
    parser.add_argument(
        "--version", action="version", version=f"pyvmm {VERSION}", help="show the version and exit"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "-c", "--cpus", type=_count, default=1, metavar="N", help="number of vCPUs (default 1)"
    )
    machine.add_argument(
        "-m", "--memory", type=_size, default=DEFAULT_MEMORY, metavar="SIZE",
        help="guest memory, as 64M or 2G (default 64M)",
    )  # fmt: skip
    machine.add_argument(
        "--mode", choices=[mode.value for mode in Mode],
        help="how a flat binary is entered (default long)",
    )  # fmt: skip
    machine.add_argument(
        "--load", type=_address, metavar="GPA",
        help="where a flat binary goes (default 0x100000; 0x7c00 in real mode)",
    )  # fmt: skip
    machine.add_argument(
        "--entry",
        type=_address,
        metavar="GPA",
        help="where it starts (default: where it was loaded)",
    )
    machine.add_argument(
        "--irqchip", choices=["auto", "on", "off"], default="auto",
        help="interrupt controllers, timer, and other vCPUs that wait for INIT and SIPI (default: "
        "for several vCPUs, for virtio devices, and for images that expect a PC)",
    )  # fmt: skip
    machine.add_argument("--append", default="", metavar="TEXT", help="the guest's command line")
    machine.add_argument(
        "--module", action="append", default=[], metavar="'FILE args'",
        help="a file for a multiboot kernel; several times for several",
    )  # fmt: skip
    machine.add_argument(
        "--initrd", metavar="FILE", help="the root file system that a Linux kernel begins with"
    )
    machine.add_argument(
        "--disk", action="append", default=[], metavar="FILE[,ro]",
        help="a virtio disk: a file of raw sectors; several times for several",
    )  # fmt: skip
    machine.add_argument(
        "--console", choices=["serial", "virtio"], default="serial",
        help="where keystrokes go: to COM1, or to a virtio console (Linux: console=hvc0)",
    )  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument(
        "--no-reboot",
        action="store_true",
        help="end, with status 0, when the guest asks for a reset",
    )
    running.add_argument(
        "--screen", action="store_true",
        help="show the text screen and type on its keyboard: live on a terminal, else at the end",
    )  # fmt: skip
    running.add_argument(
        "--timeout", type=_seconds, metavar="SECONDS", help="end with status 124 after so long"
    )
    running.add_argument("--trace", action="store_true", help="print each exit on stderr")
    debugger = parser.add_argument_group("debugger")
    debugger.add_argument(
        "--gdb", type=_gdb_address, metavar="ADDRESS",
        help="wait for gdb or lldb before the first instruction, at PORT (of 127.0.0.1; 0: a free "
        "one), HOST:PORT, unix:PATH, or stdio",
    )  # fmt: skip
    debugger.add_argument(
        "--gdb-nowait", action="store_true", help="let the guest run; a debugger attaches any time"
    )
    debugger.add_argument(
        "--gdb-catch-int3", action="store_true", help="stop at the guest's own int3, too"
    )
    host = parser.add_argument_group("host")
    host.add_argument(
        "--device", default="/dev/kvm", metavar="PATH", help="KVM's device (/dev/kvm)"
    )
    host.add_argument(
        "--probe", action="store_true", help="show what this host's KVM can do, and run nothing"
    )
    host.add_argument("--json", action="store_true", help="with --probe: print JSON")
    host.add_argument(
        "--require", metavar="NAME,...", help="with --probe: fail (status 4) if one is missing"
    )
    return parser


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(text: str) -> int:
    """A size in bytes: 64M, 2G, 4096K; a bare number is in bytes, as on dd's command line."""
    upper = text.upper().removesuffix("IB").removesuffix("B")
    unit = upper[-1:] if upper[-1:] in _UNITS else ""
    try:
        size = int(upper.removesuffix(unit) if unit else upper, 0) * _UNITS[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 64M or 2G") from None
    if size < MIN_MEMORY:
        raise argparse.ArgumentTypeError(f"{text!r} is too little: at least 1M (say 64M)")
    return size


def _address(text: str) -> int:
    try:
        address = int(text, 0)
    except ValueError:
        address = -1
    if not 0 <= address < 1 << 52:
        raise argparse.ArgumentTypeError(f"{text!r} is no guest-physical address: write 0x100000")
    return address


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of vCPUs")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")
    return seconds


def _gdb_address(text: str) -> Address:
    from pyvmm.debug import parse_address

    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# --- what it does ------------------------------------------------------------------------------


def _probe(arguments: argparse.Namespace) -> int:
    from pyvmm import probereport

    required = [name for name in (arguments.require or "").split(",") if name]
    return probereport.main(arguments.device, required, as_json=arguments.json)


def _run(arguments: argparse.Namespace) -> int:
    mode = Mode(arguments.mode) if arguments.mode else None
    image = read_image(
        arguments.image,
        mode=mode,
        load=arguments.load,
        entry=arguments.entry,
        append=arguments.append,
        modules=arguments.module,
        initrd=arguments.initrd,
    )
    # With the debugger on stdin and stdout, the guest's output goes to stderr.
    stdio = str(arguments.gdb) == "stdio"
    output = Output(2 if stdio else 1)
    live = arguments.screen and not stdio and _is_screen(1)
    kept = KeptOutput(output)
    print_output = kept if live else output
    console = (
        _virtio_console(print_output, lambda: machine.wake())
        if arguments.console == "virtio"
        else None
    )
    try:
        with Machine(
            image,
            cpus=arguments.cpus,
            memory=arguments.memory,
            output=print_output,
            device=arguments.device,
            coalesce=not arguments.trace,  # a trace shows each byte
            irqchip={"auto": None, "on": True, "off": False}[arguments.irqchip],
            reboot=not arguments.no_reboot,
            virtio=_virtio_devices(
                arguments.disk, console, entropy=bool(arguments.disk or arguments.initrd)
            ),
        ) as machine:
            machine.on_hurry(output.stop)
            tracer = _trace(machine) if arguments.trace else None
            server = _debug_server(machine, arguments) if arguments.gdb else None
            escape = EscapeKeys(machine.interrupt, print_output) if os.isatty(0) else None
            try:
                with _live_screen(machine) if live else nullcontext():
                    stop, signal_number = _run_until_signal(
                        machine, arguments.timeout, not stdio, arguments.screen, console, escape
                    )
                kept.print()
                if arguments.screen:
                    output(("\n".join(machine.screen().text()).rstrip("\n") + "\n").encode())
                status = _report(machine, stop, signal_number, tracer)
                if server is not None:
                    server.finish(status)
                return status
            finally:
                if server is not None:
                    server.close()
    finally:
        output.close()


def _virtio_console(
    transmit: Callable[[bytes], None], on_room: Callable[[], None]
) -> VirtioConsole:
    from pyvmm.devices.virtio_console import VirtioConsole

    size = os.get_terminal_size(1) if os.isatty(1) else os.terminal_size((80, 25))
    return VirtioConsole(transmit, on_room, size.columns or 80, size.lines or 25)


def _virtio_devices(
    disks: Sequence[str], console: VirtioConsole | None, *, entropy: bool
) -> list[VirtioDevice]:
    """Those that the user asked for, and a source of `entropy` for who has drivers for them."""
    devices: list[VirtioDevice] = []
    try:
        for argument in disks:
            from pyvmm import disk
            from pyvmm.devices.virtio_blk import VirtioBlk

            devices.append(VirtioBlk(disk.parse(argument)))
    except (OSError, ValueError) as error:
        for device in devices:
            device.close()
        if isinstance(error, OSError):  # as with an image: a wrong argument, not a failed host
            raise ValueError(f"{error.filename}: {error.strerror}") from None
        raise
    if console is not None:
        devices.append(console)
    if entropy:
        from pyvmm.devices.virtio_rng import VirtioRng

        devices.append(VirtioRng())
    return devices


def _is_screen(fd: int) -> bool:
    """Whether `fd` is a terminal that can show a live screen."""
    return os.isatty(fd) and os.environ.get("TERM", "dumb") != "dumb" and not in_background(fd)


def _live_screen(machine: Machine) -> LiveScreen:
    from pyvmm.screen import LiveScreen

    return LiveScreen(machine.screen(), 1, machine.fail)


def _debug_server(machine: Machine, arguments: argparse.Namespace) -> DebugServer:
    from pyvmm.debug import DebugServer
    from pyvmm.symbols import find_elf

    server = DebugServer(
        machine,
        arguments.gdb,
        wait=not arguments.gdb_nowait,
        symbols=find_elf(arguments.image),
        catch_int3=arguments.gdb_catch_int3,
    )
    print(f"gdb: listening on {server.address}", file=sys.stderr, flush=True)
    return server


def _trace(machine: Machine) -> Tracer:
    from pyvmm.trace import Tracer

    tracer = Tracer()
    machine.handlers = tracer.wrap(machine.handlers)
    return tracer


def _run_until_signal(
    machine: Machine,
    timeout: float | None,
    input_is_ours: bool,
    to_keyboard: bool,
    console: VirtioConsole | None,
    escape: EscapeKeys | None,
) -> tuple[Stop, int | None]:
    """Run with keystrokes going to the guest; the signal that ended it, if one did."""
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        machine.interrupt()

    # A signal that is ignored (nohup) stays ignored.
    wanted = [n for n in _ENDING_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {n: signal.signal(n, on_signal) for n in wanted}
    previous_fd = signal.set_wakeup_fd(machine.wakeup_fd, warn_on_full_buffer=False)
    try:
        # Linux has a terminal driver of its own, and a shell there wants ^C and its like.
        raw = escape is not None and machine.image.is_linux
        with RawTerminal(0 if input_is_ours else -1, raw=raw):
            if console is not None and os.isatty(1):
                machine.on_look(_WindowSize(console))
            if input_is_ours and sys.stdin is not None:
                machine.connect_input(0, keyboard=to_keyboard, console=console, escape=escape)
            stop = machine.run(timeout)
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return stop, received[0] if received else None


class _WindowSize:
    """Tells the guest when the terminal has another size.  Without a handler for SIGWINCH."""

    def __init__(self, console: VirtioConsole) -> None:
        self._console, self._size = console, os.get_terminal_size(1)

    def __call__(self) -> None:
        with suppress(OSError):  # the terminal may have gone
            size = os.get_terminal_size(1)
            if size != self._size:
                self._size = size
                self._console.resize(size.columns, size.lines)


_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _report(machine: Machine, stop: Stop, signal_number: int | None, tracer: Tracer | None) -> int:
    """Tell on stderr what a silent end would hide; returns the exit status."""
    if tracer is not None:
        _tell(tracer.summary())
    if stop.reason is StopReason.INTERRUPTED and signal_number is not None:
        return 128 + signal_number
    if stop.reason is StopReason.TIMEOUT:
        _tell(f"pyvmm: {stop.message}\n{machine.describe_vcpus()}")
    elif stop.reason in (StopReason.CRASHED, StopReason.FAILED):
        _tell("\n".join(filter(None, (f"pyvmm: {stop.message}", stop.report))))
    return stop.status
