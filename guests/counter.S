# counter: counts in memory for ever, without a single exit.
#
# Nothing here ever leaves the guest by itself, so only a kick from outside can stop it: a signal to
# the vCPU's thread.  While the vCPU is suspended, `counter` must not change.

        .intel_syntax noprefix
        .code64

        .text
        .globl  _start
_start:
        inc     qword ptr [rip + counter]
        jmp     _start

        .data
        .balign 8                       # in one piece, so that a reader never sees half of it
        .globl  counter
        .type   counter, @object
        .size   counter, 8
counter:
        .quad   0
