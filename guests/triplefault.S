# triplefault: resets the machine, on purpose.
#
# ud2 raises #UD.  The IDT is empty, so delivering #UD raises #GP, and since that happens while
# another exception is being delivered, it becomes a double fault, #DF.  That cannot be delivered
# either: the third failure.  A real CPU gives up and shuts down, which makes a PC reset;
# in a VM, the VMM gets a shutdown exit.

        .intel_syntax noprefix
        .code64

        .text
        .globl  _start
_start:
        lidt    [rip + empty_idt]
crash:
        ud2
        hlt                             # never reached
        jmp     _start

        .section .rodata
empty_idt:
        .word   0                       # limit: one byte, too short for any gate
        .quad   0                       # base: does not matter
