"""pyvmm: a small virtual machine monitor for Linux KVM, with a debugger at its heart.

    import pyvmm

    with pyvmm.Machine("guests/hello.bin") as machine:
        stop = machine.run(timeout=5)
        print(stop.reason, bytes(machine.output))

Everything else is in the modules; docs/design.md says which is which.
"""

from pyvmm.boot import ImageError, Mode, read_image
from pyvmm.errors import GuestMemoryError
from pyvmm.machine import Machine
from pyvmm.stop import Stop, StopReason
from pyvmm.version import VERSION

__version__ = VERSION

__all__ = [
    "GuestMemoryError",
    "ImageError",
    "Machine",
    "Mode",
    "Stop",
    "StopReason",
    "__version__",
    "read_image",
]
