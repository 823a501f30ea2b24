# hello: the smallest 64-bit guest that says something.
#
# There is no operating system below this code, so printing means talking to hardware: the first
# serial port, COM1, a 16550 UART at eight I/O ports from 0x3f8.  Each `in` and `out` below leaves
# the guest with an exit; the VMM plays the UART and enters the guest again.

        .intel_syntax noprefix
        .code64

        .equ    COM1_DATA, 0x3f8        # a byte written here is sent
        .equ    COM1_LSR, 0x3fd         # the line status register
        .equ    LSR_READY, 0x20         # bit 5: the UART can take another byte

        .text
        .globl  _start
_start:
        lea     rsi, [rip + message]
next_char:
        lodsb                           # al = the byte at rsi, and rsi moves on
        test    al, al
        jz      done
        call    putc
        jmp     next_char

# With interrupts off nothing can wake a halted CPU: the VMM takes this as the end of the guest.
done:
        hlt
        jmp     done

# Prints the character in al.  A real UART needs its time for each byte, so wait until it is ready.
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
        .asciz  "Hello from long mode!\n"
