# hello16: hello in real mode, the mode every x86 CPU starts in.
#
# A PC's firmware loads the first sector of a disk to 0000:7c00 and jumps there; this guest expects
# the same.  An address is a 16-bit offset plus 16 times a segment register, so this code reaches
# 64 KiB and no more until it changes one.

        .intel_syntax noprefix
        .code16

        .equ    COM1_DATA, 0x3f8        # a byte written here is sent
        .equ    COM1_LSR, 0x3fd         # the line status register
        .equ    LSR_READY, 0x20         # bit 5: the UART can take another byte

        .text
        .globl  _start
_start:
        mov     si, offset message      # ds:si; the VMM starts us with all segments 0
next_char:
        lodsb                           # al = the byte at ds:si, and si moves on
        test    al, al
        jz      done
        call    putc
        jmp     next_char

done:
        hlt                             # interrupts are off: this ends the guest
        jmp     done

# Prints the character in al.
putc:
        mov     ah, al                  # `in` is about to overwrite al
        mov     dx, COM1_LSR
putc_wait:
        in      al, dx
        test    al, LSR_READY
        jz      putc_wait
        mov     al, ah
        mov     dx, COM1_DATA
        out     dx, al
        ret

        .section .rodata
message:
        .asciz  "Hello from real mode!\n"
