"""What the code that a guest executes is called, from the best source that there is.

In this order: a file that the user named, the image's own ELF file, and the symbol table that a
Linux kernel has in guest memory.  That one is kept until the guest is reset.
"""

from __future__ import annotations

import os
import stat

from pyvmm.hypervisor import VM
from pyvmm.kvm import kvm_sregs
from pyvmm.light import TYPE_CHECKING
from pyvmm.symbols import Symbols, elf_bits, where

if TYPE_CHECKING:
    from pyvmm.linux.kernel import Kernel

KALLSYMS = "the kernel's own symbol table (kallsyms)"
_ONE_FUNCTION = "start_kernel"  # which every kernel has once


class Names:
    """The names of one VM's code, to be asked for while no vCPU runs."""

    def __init__(self, vm: VM, image: str | None, *, is_linux: bool) -> None:
        """`image` is the path of the ELF file that the guest was loaded from, if it was.

        In a guest that is not Linux no kernel's table is looked for unless kernel() is called.
        """
        self._vm, self._image, self._is_linux = vm, image, is_linux
        self._from_file: Symbols | None = None
        self._path = ""  # of that file
        self._kernel: Kernel | None = None
        self._from_kernel: Symbols | None = None

    def load(self, path: str) -> None:
        """Take the names from an ELF file or a System.map.  Raises OSError and ValueError."""
        if not stat.S_ISREG(os.stat(path).st_mode):  # some others can be read for ever
            raise ValueError(f"{path}: not a regular file")
        self._from_file = Symbols.from_elf(path) if elf_bits(path) else Symbols.from_map(path)
        self._path = path

    def forget_kernel(self) -> None:
        """The guest's memory has been cleared."""
        self._kernel = self._from_kernel = None

    def kernel(self) -> Kernel:
        """The Linux kernel in guest memory.  Raises LinuxError if there is none."""
        from pyvmm.linux.kernel import find

        if self._kernel is None:
            self._kernel = find(self._vm.memory, self._sregs())
        return self._kernel

    def moved_base(self) -> int | None:
        """Where a Linux kernel begins that has moved itself; None if that is not found at once."""
        from pyvmm.linux.kernel import find_moved_base

        return find_moved_base(self._vm.memory, self._sregs()) if self._is_linux else None

    def where(self) -> list[str]:
        """Where each vCPU is, as lines, and whose names these are.

        Raises OSError and ValueError where the image's ELF file cannot be read any more.
        """
        symbols, source = self._symbols()
        lines = [
            f"vCPU {n}: {where(self._vm.cpu(n), self._vm.run_state(n), symbols)}"
            for n in self._vm.vcpu_ids()
        ]
        return [*lines, f"names: {source}"]

    def _symbols(self) -> tuple[Symbols, str]:
        if self._from_file is None and self._image is not None:
            self.load(self._image)
        if self._from_file:
            return self._as_it_runs(self._from_file), self._path
        if self._from_kernel is None and (self._is_linux or self._kernel):
            self._from_kernel = self._kernel_symbols()
        if self._from_kernel is not None:
            return self._from_kernel, KALLSYMS
        return Symbols(()), "none (`monitor symbols FILE` takes them from a file)"

    def _as_it_runs(self, symbols: Symbols) -> Symbols:
        """A file's names where they are in a Linux kernel that has moved itself."""
        from pyvmm.linux.kernel import LinuxError

        linked = symbols.gva(_ONE_FUNCTION)
        if not self._is_linux or linked is None:
            return symbols
        try:
            return symbols.moved(self.kernel().gva(_ONE_FUNCTION) - linked)
        except LinuxError:
            return symbols

    def _kernel_symbols(self) -> Symbols | None:
        from pyvmm.linux.kernel import LinuxError

        try:
            return self.kernel().code()
        except LinuxError:
            return None

    def _sregs(self) -> kvm_sregs:
        return self._vm.state(self._vm.vcpu_ids()[0]).get(kvm_sregs)
