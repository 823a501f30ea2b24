# paging: builds its own page tables and sees one byte of memory under two addresses.
#
# In 64-bit mode an address (a GVA) is four indices of 9 bits, one for each level of tables, and an
# offset of 12 bits (Intel SDM vol. 3A, "4-Level Paging").  A table is a page of 512 entries.  An
# entry holds the address (a GPA) of the next table or, at the last level, of the page itself.
#
#   PML4[0]   -> PDPT_low[0]  -> PD_low[0], [1]       GVA = GPA for 4 MiB: code, stack, tables
#   PML4[256] -> PDPT_high[0] -> PD_high[0] -> PT[0]  HIGH_4K -> small_page, 4 KiB
#                                PD_high[1]           HIGH_2M -> LOW_2M, 2 MiB

        .intel_syntax noprefix
        .code64

        .include "console.inc"

        .equ    PRESENT_WRITE, 0x3
        .equ    LARGE, 0x80             # in a PD entry: it maps 2 MiB itself, there is no PT
        .equ    LOW_2M, 0x200000        # a GPA; RAM that nothing else uses
        .equ    HIGH_4K, 0xffff800000000000     # the lowest address of the upper half: PML4[256]
        .equ    HIGH_2M, 0xffff800000200000

        .text
        .globl  _start
_start:
        call    build_tables
        lea     rax, [rip + pml4]
load_cr3:
        mov     cr3, rax                # from here on, this guest's tables count
new_tables:

        print   "4 KiB page: "
        mov     rdi, HIGH_4K + 0x10
        lea     rsi, [rip + small_page + 0x10]
        mov     rax, 0x1234
        call    show_alias

        print   "2 MiB page: "
        mov     rdi, HIGH_2M + 0x12340
        mov     esi, LOW_2M + 0x12340
        mov     rax, 0xabcdef
        call    show_alias
done:
        hlt
        jmp     done

# Stores rax at the GVA rdi and prints what is then at the GVA rsi.
show_alias:
        mov     [rdi], rax
        print   "stored "
        call    put_hex
        print   " at "
        mov     rax, rdi
        call    put_hex
        print   ", found "
        mov     rax, [rsi]
        call    put_hex
        print   " at "
        mov     rax, rsi
        call    put_hex
        print   "\n"
        ret

# The tables are in .bss, so every entry that is not written here is 0: not present.
build_tables:
        lea     rax, [rip + pdpt_low + PRESENT_WRITE]
        mov     [rip + pml4], rax
        lea     rax, [rip + pd_low + PRESENT_WRITE]
        mov     [rip + pdpt_low], rax
        mov     qword ptr [rip + pd_low], 0 + PRESENT_WRITE + LARGE
        mov     qword ptr [rip + pd_low + 8], LOW_2M + PRESENT_WRITE + LARGE

        lea     rax, [rip + pdpt_high + PRESENT_WRITE]
        mov     [rip + pml4 + 256 * 8], rax
        lea     rax, [rip + pd_high + PRESENT_WRITE]
        mov     [rip + pdpt_high], rax
        lea     rax, [rip + pt + PRESENT_WRITE]
        mov     [rip + pd_high], rax
        lea     rax, [rip + small_page + PRESENT_WRITE]
        mov     [rip + pt], rax
        mov     qword ptr [rip + pd_high + 8], LOW_2M + PRESENT_WRITE + LARGE
        ret

        .bss
        .balign 4096                    # the lowest 12 bits of an entry are flags, not address
pml4:
        .skip   4096
pdpt_low:
        .skip   4096
pd_low:
        .skip   4096
pdpt_high:
        .skip   4096
pd_high:
        .skip   4096
pt:
        .skip   4096
small_page:
        .skip   4096
