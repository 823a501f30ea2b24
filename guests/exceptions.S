# exceptions: causes four exceptions, shows what the CPU says about each, and carries on.
#
# All four are *faults*: the saved RIP points at the instruction that failed, and returning would
# run it again, for ever.  So the handler looks the RIP up in a table that says where to
# go on instead.  Linux does the same for the few kernel instructions that are allowed to fail.

        .intel_syntax noprefix
        .code64

        .include "console.inc"
        .include "idt.inc"

        .text
        .globl  _start
_start:
        mov     edi, 0
        lea     rsi, [rip + de_handler]
        call    set_gate
        mov     edi, 6
        lea     rsi, [rip + ud_handler]
        call    set_gate
        mov     edi, 13
        lea     rsi, [rip + gp_handler]
        call    set_gate
        mov     edi, 14
        lea     rsi, [rip + pf_handler]
        call    set_gate
        lidt    [rip + idt_pointer]

        print   "#DE, divide by zero: "
        xor     edx, edx
        mov     eax, 1
        xor     ecx, ecx
cause_de:
        div     ecx
after_de:
        print   "#UD, undefined instruction: "
cause_ud:
        ud2                             # an instruction that is promised to stay undefined
after_ud:
        print   "#GP, a selector outside the GDT: "
        mov     eax, 0xfff8
cause_gp:
        mov     fs, eax                 # the error code is the selector
after_gp:
        print   "#PF, a store to 4 GiB, where nothing is mapped: "
        mov     rax, 0x100000000
cause_pf:
        mov     byte ptr [rax], 1       # error code 2: a write, to a page that is not present
after_pf:
        print   "all handled\n"
done:
        hlt
        jmp     done

# Only some exceptions push an error code; for the others 0 takes its place, so that the
# stack looks the same to `handle`.
de_handler:
        push    0                       # instead of an error code
        push    0                       # vector
        jmp     handle
ud_handler:
        push    0
        push    6
        jmp     handle
gp_handler:
        push    13
        jmp     handle
pf_handler:
        push    14

        .equ    VECTOR, 16              # offsets from rsp, once rax and rsi are pushed
        .equ    ERROR_CODE, 24
        .equ    SAVED_RIP, 32
handle:
        push    rax
        push    rsi
        print   "vector "
        mov     rax, [rsp + VECTOR]
        call    put_hex
        print   " error code "
        mov     rax, [rsp + ERROR_CODE]
        call    put_hex
        print   " RIP "
        mov     rax, [rsp + SAVED_RIP]
        call    put_hex
        cmp     qword ptr [rsp + VECTOR], 14
        jne     find_fixup
        print   " CR2 "                 # the address that was not mapped
        mov     rax, cr2
        call    put_hex

find_fixup:
        print   "\n"
        mov     rax, [rsp + SAVED_RIP]
        lea     rsi, [rip + fixups]
next_fixup:
        cmp     qword ptr [rsi], 0
        je      no_fixup
        cmp     rax, [rsi]
        je      use_fixup
        add     rsi, 16
        jmp     next_fixup
use_fixup:
        mov     rax, [rsi + 8]
        mov     [rsp + SAVED_RIP], rax
        pop     rsi
        pop     rax
        add     rsp, 16                 # vector and error code: iretq wants RIP at the top
        iretq

no_fixup:
        print   "not expected: giving up\n"
        jmp     done

        .section .rodata
        .balign 8
fixups:                                 # the instruction that may fail, and where to go then
        .quad   cause_de, after_de
        .quad   cause_ud, after_ud
        .quad   cause_gp, after_gp
        .quad   cause_pf, after_pf
        .quad   0
