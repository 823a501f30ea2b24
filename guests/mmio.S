# mmio: loads and stores of each width where there is no memory.
#
# A device's registers can live at memory addresses, too: memory-mapped I/O.  There is no RAM and no
# device at 0xf0000000, so each access leaves the guest with an MMIO exit that says address, width
# and data.  The VMM answers a load like an empty bus does: with all bits set.

        .intel_syntax noprefix
        .code64

        .include "console.inc"

        .text
        .globl  _start
_start:
        mov     edi, 0xf0000000
        mov     rax, 0x8877665544332211

stores:                                 # x86 is little-endian: the lowest bytes of rax go first
        mov     [rdi], al
        mov     [rdi], ax
        mov     [rdi], eax
        mov     [rdi], rax

        print   "loads:"
load1:
        movzx   eax, byte ptr [rdi]
        call    show
load2:
        movzx   eax, word ptr [rdi]
        call    show
load4:
        mov     eax, [rdi]              # a write to eax clears the upper half of rax
        call    show
load8:
        mov     rax, [rdi]
        call    show
        print   "\n"
done:
        hlt
        jmp     done

# Prints a space and rax.
show:
        print   " "
        call    put_hex
        ret
