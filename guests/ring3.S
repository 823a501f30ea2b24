# ring3: a kernel and a user program, and the ways from one to the other.
#
#   ring 0 -> 3: iretq pops a CS whose lowest two bits say 3
#   ring 3 -> 0: a system call (an int instruction) or a fault.  Both go through the IDT, and the
#                CPU takes the kernel's stack from the TSS, because it must not trust the user's.
#
# The user program may not touch ports, so it asks the kernel to print.  Then it tries hlt, which
# only ring 0 may execute.  The kernel sees the fault and ends the machine.
#
# Which vector a system call uses is up to the kernel.  Linux on x86 began with int 0x80; today's
# kernels use the faster instruction syscall.  Not every KVM host gives a guest either of the two
# (kvm_pvm does not), but int 4 works there as well.  Vector 4 is free: into, the instruction that
# it was made for, does not exist in 64-bit mode.

        .intel_syntax noprefix
        .code64

        .include "console.inc"
        .include "idt.inc"

        .equ    SYSTEM_CALL, 4          # the vector

        .equ    USER_CODE, 0x18 | 3     # selectors: the place in the GDT, and the ring
        .equ    USER_DATA, 0x20 | 3
        .equ    TSS, 0x28
        .equ    RFLAGS_FIXED, 2         # bit 1 always reads 1

        .equ    PAGE_USER, 4            # the bit in a page table entry that lets ring 3 in
        .equ    ADDRESS_BITS, ~0xfff    # an entry without its flags (bits above 51 are 0 here)

        .text
        .globl  _start
_start:
        print   "ring 0: hello\n"
        call    load_tables
        call    open_memory

enter_user:                             # what iretq pops, last first
        push    USER_DATA               # ss
        lea     rax, [rip + user_stack_top]
        push    rax                     # rsp
        push    RFLAGS_FIXED            # rflags: interrupts stay off, no right to do port I/O
        push    USER_CODE               # cs
        lea     rax, [rip + user]
        push    rax                     # rip
        iretq

# A GDT with user segments, the TSS, and the two gates.
load_tables:
        lea     rax, [rip + tss]        # the TSS's address has to be cut into pieces, like a gate's
        mov     [rip + tss_descriptor + 2], ax
        shr     rax, 16
        mov     [rip + tss_descriptor + 4], al
        mov     [rip + tss_descriptor + 7], ah
        lgdt    [rip + gdt_pointer]
        mov     eax, TSS
        ltr     ax
        mov     edi, 13
        lea     rsi, [rip + gp_handler]
        call    set_gate
        mov     edi, SYSTEM_CALL
        lea     rsi, [rip + system_call]
        call    set_gate
        mov     byte ptr [rip + idt + SYSTEM_CALL * 16 + 5], GATE_USER
        lidt    [rip + idt_pointer]
        ret

# Lets ring 3 into the first 2 MiB, where this image is: the bit must be set at each level of the
# page tables.  A real kernel would never do that to a page that it lives in itself.
open_memory:
        mov     rax, cr3
        and     rax, ADDRESS_BITS
        or      qword ptr [rax], PAGE_USER      # entry 0 of the PML4
        mov     rax, [rax]
        and     rax, ADDRESS_BITS
        or      qword ptr [rax], PAGE_USER      # entry 0 of the page directory pointer table
        mov     rax, [rax]
        and     rax, ADDRESS_BITS
        or      qword ptr [rax], PAGE_USER      # entry 0 of the page directory: a 2 MiB page
        mov     rax, cr3
        mov     cr3, rax                # forget the translations that the CPU has cached
        ret

# The one system call: print the string at rsi.  A real kernel would first look whether the user
# may read what rsi points to.
system_call:
        call    puts
        iretq

# The CPU has pushed ss, rsp, rflags, cs, rip and, for #GP, an error code.
gp_handler:
        print   "ring 0: #GP at "
        mov     rax, [rsp + 8]
        call    put_hex
        print   " with CS "
        mov     rax, [rsp + 16]
        call    put_hex
        print   ", the end\n"
done:
        hlt
        jmp     done

# From here on: ring 3.
user:
        lea     rsi, [rip + user_hello]
        int     SYSTEM_CALL
        mov     eax, cs
        and     eax, 3                  # the lowest two bits of CS are the CPL, the ring
        cmp     eax, 3
        jne     user_hlt
        lea     rsi, [rip + user_ring]
        int     SYSTEM_CALL
user_hlt:
        hlt                             # not allowed in ring 3: #GP
        jmp     user_hlt                # never reached

        .section .rodata
user_hello:
        .asciz  "ring 3: hello, by way of a system call\n"
user_ring:
        .asciz  "ring 3: CS says 3, now I try hlt\n"
gdt_pointer:
        .word   gdt_end - gdt - 1
        .quad   gdt

        .data
        .balign 8
gdt:
        .quad   0                       # the null segment
        .quad   0x00af9b000000ffff      # 0x08: 64-bit code, ring 0
        .quad   0x00cf93000000ffff      # 0x10: data, ring 0
        .quad   0x00affb000000ffff      # 0x18: 64-bit code, ring 3
        .quad   0x00cff3000000ffff      # 0x20: data, ring 3
tss_descriptor:                         # 0x28: in 64-bit mode it takes two entries
        .word   tss_end - tss - 1       # the limit
        .word   0                       # base 15:0, filled in by load_tables
        .byte   0                       # base 23:16
        .byte   0x89                    # present, an available 64-bit TSS
        .byte   0
        .byte   0                       # base 31:24
        .quad   0                       # base 63:32: the image is below 4 GiB
gdt_end:

        .balign 8
tss:
        .long   0
        .quad   kernel_stack_top        # RSP0: the stack on the way from ring 3 to ring 0
        .skip   90                      # the other stacks: not used
        .word   tss_end - tss           # the I/O permission map is behind the limit: no ports
tss_end:

        .bss
        .balign 16
        .skip   4096
kernel_stack_top:
        .skip   4096
user_stack_top:
