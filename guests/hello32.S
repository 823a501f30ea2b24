# hello32: hello in 32-bit protected mode with flat segments and no paging.
#
# What is different from hello.S: addresses have 32 bits, and there is no rip-relative addressing,
# so the address of the message is a constant that the linker writes into the code.  The image
# therefore runs only where it was linked to run.

        .intel_syntax noprefix
        .code32

        .equ    COM1_DATA, 0x3f8        # a byte written here is sent
        .equ    COM1_LSR, 0x3fd         # the line status register
        .equ    LSR_READY, 0x20         # bit 5: the UART can take another byte

        .text
        .globl  _start
_start:
        mov     esi, offset message
next_char:
        lodsb                           # al = the byte at esi, and esi moves on
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
        .asciz  "Hello from protected mode!\n"
