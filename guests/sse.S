# sse: copies 16 bytes with SSE, the way compilers copy a struct.
#
# Compilers use SSE registers freely in 64-bit code, although nothing in the source asks for it.
# Without CR4.OSFXSR these instructions raise #UD, so a VMM that enters C programs must set it.

        .intel_syntax noprefix
        .code64

        .include "console.inc"

        .text
        .globl  _start
_start:
        movups  xmm0, [rip + source]
        movups  [rip + copy], xmm0

        mov     rax, [rip + copy]
        cmp     rax, [rip + source]
        jne     bad
        mov     rax, [rip + copy + 8]
        cmp     rax, [rip + source + 8]
        jne     bad
        print   "SSE works: OK\n"
        jmp     done
bad:
        print   "SSE works: NO, the copy differs\n"
done:
        hlt
        jmp     done

        .section .rodata
source:
        .ascii  "sixteen bytes..."

        .bss
copy:
        .skip   16                      # not aligned: movups, unlike movaps, does not care
