# loops: something to debug.  main calls outer, outer calls inner, inner changes a variable.
#
# Things to try with gdb: `break inner` and `backtrace`; `watch *(long *) &total`; `stepi`;
# `finish`.  Every function keeps a frame pointer, and the .cfi lines tell gdb how to find the
# caller from any instruction, also before the frame is set up.
#
# As C (cloops.c is this, compiled):
#
#     long total;
#     void inner(long n) { total += n; }
#     void outer(long n) { for (long i = 1; i <= n; i++) inner(i); }
#     int main(void)     { for (long i = 1; i <= 5; i++) outer(i); }

        .intel_syntax noprefix
        .code64

        .include "console.inc"

        .equ    ROUNDS, 5               # total = 1 + (1+2) + ... + (1+2+3+4+5) = 35

        .cfi_sections .debug_frame      # for debuggers only: nothing that must be loaded

        .text
        .globl  _start, main, outer, inner, total
        .type   _start, @function
_start:
        .cfi_startproc
        .cfi_undefined rip              # nobody called us: a backtrace ends here
        xor     ebp, ebp
        call    main
        print   "total is "
        mov     rax, [rip + total]
        call    put_hex
        print   "\n"
done:
        hlt
        jmp     done
        .cfi_endproc
        .size   _start, . - _start

# Calls outer with 1, 2, ... ROUNDS.
        .type   main, @function
main:
        .cfi_startproc
        push    rbp
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        mov     rbp, rsp
        .cfi_def_cfa_register rbp
        push    rbx                     # a function that uses rbx gives it back unchanged
        .cfi_offset rbx, -24
        mov     ebx, 1
main_loop:
        mov     rdi, rbx
        call    outer
        inc     rbx
        cmp     rbx, ROUNDS
        jle     main_loop
        pop     rbx
        pop     rbp
        .cfi_def_cfa rsp, 8
        ret
        .cfi_endproc
        .size   main, . - main

# Calls inner with 1, 2, ... rdi.
        .type   outer, @function
outer:
        .cfi_startproc
        push    rbp
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        mov     rbp, rsp
        .cfi_def_cfa_register rbp
        push    rbx
        .cfi_offset rbx, -24
        push    r12
        .cfi_offset r12, -32
        mov     r12, rdi
        mov     ebx, 1
outer_loop:
        mov     rdi, rbx
        call    inner
        inc     rbx
        cmp     rbx, r12
        jle     outer_loop
        pop     r12
        pop     rbx
        pop     rbp
        .cfi_def_cfa rsp, 8
        ret
        .cfi_endproc
        .size   outer, . - outer

# Adds rdi to total.
        .type   inner, @function
inner:
        .cfi_startproc
        push    rbp
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        mov     rbp, rsp
        .cfi_def_cfa_register rbp
inner_add:
        add     [rip + total], rdi
after_add:
        pop     rbp
        .cfi_def_cfa rsp, 8
        ret
        .cfi_endproc
        .size   inner, . - inner

        .data
        .balign 8
        .type   total, @object
        .size   total, 8
total:
        .quad   0

        .cfi_sections .debug_frame      # for debuggers only: nothing that must be loaded
