"""A Linux kernel in guest memory: its symbol table is found, and where it runs."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from pyvmm.kvm import kvm_sregs
from pyvmm.linux import kallsyms
from pyvmm.linux.kernel import Kernel, LinuxError, find, find_moved_base
from pyvmm.paging import CR0_PG, CR4_PAE, EFER_LME
from tests.linux_memory import (
    BANNER,
    BOOT_PARAMS,
    DIRECT_MAP,
    KERNEL_GPA,
    LINK_BASE,
    PAGE_TABLES,
    SYMBOLS,
    TABLES,
    TOKENS,
    Ram,
    pack_tables,
)

ORDERS = ("old", "old with seqs", "new")
PERCPU = ((0, "__per_cpu_start"), (0x1_F000, "runqueues"))


def many(count: int) -> list[tuple[int, str, str]]:
    return [(16 * n, "t", f"function_{n}") for n in range(count)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("percpu", [PERCPU, (), None])
@pytest.mark.parametrize("count", [1, 2, 256, 257, 600])
@pytest.mark.parametrize("base", [LINK_BASE, LINK_BASE + 0x34C0_0000])
def test_the_table_is_found_in_every_order(
    order: str, percpu: tuple[tuple[int, str], ...] | None, count: int, base: int
) -> None:
    symbols = many(count)
    tables = pack_tables(symbols, base=base, order=order, percpu=percpu)
    found = kallsyms.find(b"\xff\xff\xff\xff" * 100 + tables + b"\xff\xff\xff\xff" * 100)
    assert found is not None and found.base == base
    absolute = [(gva, "A", name) for gva, name in percpu or ()]
    assert found.symbols == absolute + [(base + offset, k, name) for offset, k, name in symbols]


def test_a_long_name_has_a_length_of_two_bytes() -> None:
    name = "x" * 300
    found = kallsyms.find(pack_tables([(0, "T", name), (1, "T", "next")]))
    assert found is not None and [symbol.name for symbol in found.symbols] == [name, "next"]


def test_names_are_made_of_tokens() -> None:
    assert len(pack_tables([(0, "T", "_" * 20)])) < len(pack_tables([(0, "T", "-" * 20)]))
    name = "".join(TOKENS.values())
    found = kallsyms.find(pack_tables([(0, "T", name)]))
    assert found is not None and found.symbols[0].name == name


def test_the_first_table_that_is_whole_counts() -> None:
    digits = b"".join(b"%d\0" % digit for digit in range(10))
    remains = pack_tables([(0, "T", "stale")])[:-8]
    sound, behind = pack_tables([(0, "T", "sound")]), pack_tables([(0, "T", "behind")])
    found = kallsyms.find(digits + bytes(92) + remains + bytes(16) + sound + bytes(64) + behind)
    assert found is not None and found.symbols[0].name == "sound"


@pytest.mark.parametrize("pages", [b"", b"0\0", bytes(10000), b"0\x001\x002\x003\x004\0" * 9])
def test_where_there_is_none_nothing_is_found(pages: bytes) -> None:
    assert kallsyms.find(pages) is None


@pytest.mark.parametrize("order", ORDERS)
def test_damaged_tables_are_found_or_not_and_never_an_exception(order: str) -> None:
    sound = pack_tables(many(40), order=order)
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        kallsyms.find(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]))


class Counted(bytes):
    """Memory that counts how often it is searched."""

    searches = 0

    def find(self, *arguments: Any) -> int:
        type(self).searches += 1
        return super().find(*arguments)

    def rfind(self, *arguments: Any) -> int:
        type(self).searches += 1
        return super().rfind(*arguments)


BASES = struct.pack("<QQ", LINK_BASE, 1) * 200_000  # each with what may be a count behind it
TABLE = pack_tables([], order="new", percpu=None)[8:-8]  # tokens and their index


@pytest.mark.parametrize(
    "pages",
    [
        TABLE + BASES,
        BASES + TABLE,
        b"\xff" * (4 << 20) + TABLE + b"\xff" * (4 << 20),
        TABLE * 2000,
        b"".join(b"%d\0" % digit for digit in range(10)) * 100_000,
    ],
    ids=["bases behind", "bases before", "ends of bases", "token tables", "digits"],
)
def test_memory_full_of_what_looks_like_tables_is_given_up_soon(
    pages: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = {"_token_table": 0, "_names": 0}

    def count(name: str) -> None:
        look = getattr(kallsyms, name)

        def counting(*arguments: Any) -> Any:
            looks[name] += 1
            return look(*arguments)

        monkeypatch.setattr(kallsyms, name, counting)

    for name in looks:
        count(name)
    monkeypatch.setattr(Counted, "searches", 0)
    assert kallsyms.find(Counted(pages)) is None
    assert Counted.searches < 10_000
    assert looks["_names"] < 200 and looks["_token_table"] < 5000


@pytest.mark.parametrize("token", [b"x" * 60_000, b"x" * 30_000])
def test_names_of_gigabytes_are_not_made(token: bytes) -> None:
    tokens = [""] * 255 + [token.decode()]
    assert kallsyms._names(b"\x01\xff" * 1_000_000, tokens, 1_000_000) is None
    assert kallsyms._names(b"\xff\x7f" + b"\xff" * 16384, tokens, 1) is None


# --- the kernel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 0x3460_0000])
def test_where_the_kernel_is_and_was_linked_for(offset: int) -> None:
    kernel = find(Ram(offset=offset).memory, kvm_sregs())
    assert (kernel.base, kernel.gpa) == (LINK_BASE + offset, KERNEL_GPA)
    assert kernel.link_base == LINK_BASE
    assert kernel.gva("start_kernel") == LINK_BASE + offset + 0x1000


def test_a_kernel_linked_for_another_address_says_so_in_its_boot_parameters() -> None:
    ram = Ram()
    ram.write(BOOT_PARAMS + 0x258, (2 << 20).to_bytes(8, "little"))
    assert find(ram.memory, kvm_sregs()).link_base == 0xFFFF_FFFF_8020_0000
    ram.write(BOOT_PARAMS + 0x258, bytes(8))  # PVH: nobody has filled them in
    assert find(ram.memory, kvm_sregs()).link_base == LINK_BASE


def test_functions_have_names_and_variables_have_not() -> None:
    code = find(Ram(percpu=PERCPU).memory, kvm_sregs()).code()
    named = [code.name(LINK_BASE + offset) for offset in (-1, 0, 0x1001, 0x1110, 0x1200, BANNER)]
    assert named == [None, "_text", "start_kernel+0x1", "do_idle+0x10", "weak_alias", None]
    assert code.name(0x1_F010) is None, "an offset in a processor's own data is no function"


def test_of_several_names_of_an_address_the_first_one_counts() -> None:
    symbols = ((0x1000, "T", "good"), (0x1000, "T", "__good"), (0x1000, "W", "sys_good"))
    ram = Ram(symbols=(*symbols, *SYMBOLS))
    assert find(ram.memory, kvm_sregs()).code().name(LINK_BASE + 0x1000) == "good"


def test_kernel_memory_is_read_by_the_kernels_own_page_tables() -> None:
    ram = Ram(offset=0x40_0000)
    kernel = find(ram.memory, kvm_sregs())
    assert kernel.read(kernel.gva("linux_banner"), 13) == b"Linux version"
    assert kernel.read(DIRECT_MAP + KERNEL_GPA + BANNER, 13) == b"Linux version"
    across = kernel.read(kernel.base + (2 << 20) - 4, 8)  # two pages
    assert across == ram.pages[KERNEL_GPA + (2 << 20) - 4 :][:8]
    assert kernel.number(kernel.gva("boot_params") + 0x258) == 16 << 20


@pytest.mark.parametrize("gva", [0x1000, 0xFFFF_C900_0000_0000, DIRECT_MAP + (100 << 20)])
def test_what_is_not_mapped_or_not_ram_is_one_line(gva: int) -> None:
    with pytest.raises(LinuxError) as caught:
        find(Ram().memory, kvm_sregs()).read(gva, 8)
    assert "\n" not in str(caught.value)


def without(name: str) -> Kernel:
    return find(
        Ram(symbols=[symbol for symbol in SYMBOLS if symbol[2] != name]).memory, kvm_sregs()
    )


def test_what_the_kernel_does_not_name_is_one_line() -> None:
    with pytest.raises(LinuxError, match="no symbol boot_params"):
        _ = without("boot_params").link_base
    with pytest.raises(LinuxError, match="no symbol linux_banner"):
        _ = without("linux_banner").gpa
    with pytest.raises(LinuxError, match="no symbol init_top_pgt"):
        without("init_top_pgt").read(LINK_BASE, 1)


def test_without_a_kernel_or_its_banner_there_is_one_line() -> None:
    ram = Ram()
    ram.write(BANNER, bytes(64))
    with pytest.raises(LinuxError, match="banner"):
        _ = find(ram.memory, kvm_sregs()).gpa
    ram.write(TABLES, bytes(PAGE_TABLES - TABLES))
    with pytest.raises(LinuxError, match="no symbol table"):
        find(ram.memory, kvm_sregs())


def paging_of(ram: Ram) -> kvm_sregs:
    """A vCPU's registers, with the kernel's own page tables."""
    sregs = kvm_sregs()
    sregs.cr0, sregs.cr4, sregs.efer = CR0_PG, CR4_PAE, EFER_LME
    sregs.cr3 = KERNEL_GPA + PAGE_TABLES
    return sregs


def test_where_it_has_moved_itself_is_found_by_a_vcpus_page_tables() -> None:
    ram = Ram(offset=0x40_0000)
    assert find_moved_base(ram.memory, paging_of(ram)) == LINK_BASE + 0x40_0000
    assert find_moved_base(ram.memory, kvm_sregs()) is None, "paging is off"
    assert find(ram.memory, paging_of(ram)).base == LINK_BASE + 0x40_0000
    unmoved = Ram()
    assert find_moved_base(unmoved.memory, paging_of(unmoved)) is None


def test_the_kernel_that_is_mapped_is_found_before_another_copy() -> None:
    ram = Ram(offset=0x40_0000)
    copy = pack_tables([(0, "T", "copy")])
    ram.pages[0x1000 : 0x1000 + len(copy)] = copy
    assert find(ram.memory, kvm_sregs()).symbols[0].name == "copy"
    assert find(ram.memory, paging_of(ram)).symbols[0].name == "_text"
