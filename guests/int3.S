# int3: a breakpoint instruction that the guest handles itself.
#
# int3 raises #BP, vector 3, a *trap*: the RIP that the CPU saves points after the instruction, so
# the two addresses printed here differ by 1.  A debugger puts int3 into a guest, too.  This guest
# shows that a VMM passes on the ones that are the guest's own, with the right RIP.

        .intel_syntax noprefix
        .code64

        .include "console.inc"
        .include "idt.inc"

        .text
        .globl  _start
_start:
        mov     edi, 3                  # #BP
        lea     rsi, [rip + bp_handler]
        call    set_gate
        lidt    [rip + idt_pointer]
the_int3:
        int3
after_int3:
        print   "back from the handler\n"
done:
        hlt
        jmp     done

# The CPU has pushed ss, rsp, rflags, cs and rip; rip was the last one and is at rsp.
bp_handler:
        push    rax
        print   "int3 at "
        lea     rax, [rip + the_int3]
        call    put_hex
        print   ", handler saw "
        mov     rax, [rsp + 8]          # above the rax that this handler has pushed
        call    put_hex
        print   "\n"
        pop     rax
        iretq                           # to the RIP that was saved: the instruction after int3
