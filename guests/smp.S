# smp: starts the other processors, lets all count under a spinlock, and sends each an IPI.
#
# A PC starts one processor: the bootstrap processor, BSP.  The others are application processors,
# APs, and wait.  Each processor has a local APIC, which takes interrupts, also from the other
# processors: interprocessor interrupts, IPIs.  Two IPIs have a meaning of their own: INIT resets an
# AP, and SIPI makes it run, in real mode, at a page below 1 MiB that the IPI names (Intel SDM
# vol. 3A, "Multiple-Processor Management").  How many APs there are is found by starting all.
#
#   BSP: boot loader, boot64.inc, start64 --+                  +--> bsp: does all, in order
#                                           +--> any_processor |
#   AP:  SIPI, trampoline ------------------+                  +--> ap: waits for IPIs
#
# Runs under everything that knows multiboot: pyvmm -c 3, or qemu-system-x86_64 -smp 3 -kernel.
# Ends by powering the machine off, exit status 0; if something is wrong, by debug-exit, status 3.

        .intel_syntax noprefix
        .code64

        .equ    VECTORS, 0x30           # for idt.inc: the exceptions, and ours behind them
        .equ    TIMER_VECTOR, 0x20
        .equ    COUNT_VECTOR, 0x21
        .equ    ANSWER_VECTOR, 0x22
        .equ    SPURIOUS_VECTOR, 0x2f

        .include "boot64.inc"
        .include "console.inc"
        .include "idt.inc"

        .equ    LAPIC, 0xfee00000       # where every processor sees its own local APIC
        .equ    LAPIC_INDEX, LAPIC >> 21 & 511  # of its entry in a page directory
        .equ    LAPIC_ID, 0x20          # offsets of registers; the ID is in bits 31:24
        .equ    LAPIC_EOI, 0xb0         # end of interrupt: a write lets the next one in
        .equ    LAPIC_SPURIOUS, 0xf0
        .equ    LAPIC_ENABLE, 0x100     # in the spurious-interrupt vector register
        .equ    LAPIC_ICR_LOW, 0x300    # a write to this half of the command register sends an IPI
        .equ    LAPIC_ICR_HIGH, 0x310   # bits 31:24: to whom
        .equ    ICR_INIT, 0x4500
        .equ    ICR_SIPI, 0x4600        # bits 7:0: the page to start at
        .equ    ICR_FIXED, 0x4000       # an ordinary interrupt; bits 7:0: the vector
        .equ    ICR_OTHERS, 0xc0000     # to all but oneself, whatever ICR_HIGH says
        .equ    LAPIC_TIMER, 0x320      # the timer's vector and mode
        .equ    TIMER_MASKED, 0x10000
        .equ    TIMER_PERIODIC, 0x20000
        .equ    LAPIC_TIMER_START, 0x380        # counts down from here
        .equ    LAPIC_TIMER_NOW, 0x390
        .equ    LAPIC_TIMER_DIVIDE, 0x3e0
        .equ    DIVIDE_BY_16, 3

        .equ    APIC_BASE, 0x1b         # a model-specific register
        .equ    APIC_BASE_BSP, 0x100    # 1 on the BSP only
        .equ    UNCACHED, 0x10          # in an entry of a page table

        .equ    PIC1_MASK, 0x21
        .equ    PIC2_MASK, 0xa1
        .equ    PIT_COUNTER, 0x40
        .equ    PIT_COMMAND, 0x43
        .equ    PIT_ONE_SHOT, 0x30      # counter 0, low byte then high byte, mode 0
        .equ    PIT_STATUS, 0xe2        # latch the status of counter 0 ...
        .equ    PIT_OUT, 0x80           # ... in which this says that the count is over
        .equ    PIT_10_MS, 11932        # the PIT counts 1193182 times a second
        .equ    PIT_200_US, 239
        .equ    POWER, 0x604            # ACPI's PM1a control register, where QEMU has it
        .equ    POWER_OFF, 0x2000
        .equ    DEBUG_EXIT, 0xf4        # the exit status is (value << 1) | 1

        .equ    TRAMPOLINE, 0x8000      # a page below 1 MiB that nobody uses
        .equ    STACK, 1024             # bytes; one stack for each of the 255 APIC ids there can be
        .equ    ROUNDS, 0x1000          # how often each processor counts
        .equ    CLOSED, 0x80000000      # in `arrived`: negative from now on
        .equ    PATIENCE, 1000          # ticks of 10 ms to wait for what must happen

        .macro  gate vector, handler
        mov     edi, \vector
        lea     rsi, [rip + \handler]
        call    set_gate
        .endm

# The BSP starts here.  It maps the local APIC to itself, in the fourth GiB.
        .text
start64:
        mov     dword ptr [pdpt + 3 * 8], offset lapic_directory + PRESENT_WRITE
        mov     eax, LAPIC + PRESENT_WRITE + LARGE + UNCACHED
        mov     [lapic_directory + LAPIC_INDEX * 8], eax
        jmp     any_processor

# An AP starts here, in real mode, or rather in the copy at TRAMPOLINE, with CS = TRAMPOLINE >> 4.
        .code16
trampoline:
        data32 lgdt cs:[trampoline_gdt - trampoline]    # data32: with a 32-bit address in it
        enter_long_mode
        data32 jmp CODE64:any_processor
trampoline_gdt:
        .word   gdt_end - gdt - 1
        .long   gdt
trampoline_end:

# Each processor comes here: the BSP first, and later all APs at the same time.  So none may touch
# what another one uses, above all not its stack.
        .code64
any_processor:
        mov     ebx, LAPIC              # stays there, on every processor, also for its handlers
        mov     edi, [rbx + LAPIC_ID]
        shr     edi, 24
        imul    eax, edi, STACK
        lea     rsp, [rax + stacks + STACK]
        lidt    [rip + idt_pointer]
        mov     dword ptr [rbx + LAPIC_SPURIOUS], LAPIC_ENABLE | SPURIOUS_VECTOR
        mov     ecx, APIC_BASE
        rdmsr
        test    eax, APIC_BASE_BSP
        jnz     bsp

ap:
        lock inc dword ptr [rip + arrived]
        js      ap_late                 # CLOSED: the BSP no longer counts on this one
        mov     byte ptr [rdi + present], 1
        sti
ap_idle:
        hlt
        jmp     ap_idle
ap_late:
        hlt                             # for ever: interrupts are off
        jmp     ap_late

bsp:
        print   "smp: starting the other processors\n"
        call    init_interrupts
        call    start_timer
        sti
        call    start_aps

        lea     rdi, [rip + arrived]
        mov     esi, 254                # as many as there can be ...
        mov     edx, 20                 # ... but normally 200 ms, in which no more than these come
        call    wait_for
        mov     ebp, CLOSED
        xchg    ebp, [rip + arrived]    # ebp = number of APs
        print   "processors: "
        lea     eax, [rbp + 1]
        call    put_hex

        print   "\neach adds "
        mov     eax, ROUNDS
        call    put_hex
        print   " to the counter: "
        mov     dword ptr [rbx + LAPIC_ICR_LOW], ICR_OTHERS | ICR_FIXED | COUNT_VECTOR
        call    count                   # the BSP counts as well
        lea     rdi, [rip + finished]
        mov     esi, ebp
        mov     edx, PATIENCE
        call    wait_for
        jne     failed
        mov     eax, [rip + counter]
        call    put_hex
        lea     ecx, [rbp + 1]
        imul    ecx, ecx, ROUNDS
        cmp     eax, ecx
        jne     failed
        print   ", none is lost\n"

        call    call_aps
        jne     failed

        print   "timer: "
        mov     eax, [rip + ticks]
        call    put_hex
        print   " ticks of 10 ms\nsmp: ok\n"
        mov     dx, POWER
        mov     ax, POWER_OFF
        out     dx, ax
        jmp     done
failed:
        print   "\nsmp: FAILED\n"
        mov     al, 1
        out     DEBUG_EXIT, al
done:
        cli
        hlt
        jmp     done

init_interrupts:
        gate    TIMER_VECTOR, timer_handler
        gate    COUNT_VECTOR, count_handler
        gate    ANSWER_VECTOR, answer_handler
        gate    SPURIOUS_VECTOR, spurious_handler
        mov     al, 0xff                # nothing from the old interrupt controllers, the PICs
        out     PIC1_MASK, al
        out     PIC2_MASK, al
        ret

# How fast the APIC's timer counts is different everywhere, so it is measured against the PIT, whose
# frequency is fixed.
start_timer:
        mov     dword ptr [rbx + LAPIC_TIMER_DIVIDE], DIVIDE_BY_16
        mov     dword ptr [rbx + LAPIC_TIMER], TIMER_MASKED
        mov     dword ptr [rbx + LAPIC_TIMER_START], -1
        mov     eax, PIT_10_MS
        call    pit_wait
        mov     eax, -1
        sub     eax, [rbx + LAPIC_TIMER_NOW]
        mov     dword ptr [rbx + LAPIC_TIMER], TIMER_PERIODIC | TIMER_VECTOR
        mov     [rbx + LAPIC_TIMER_START], eax
        ret

# Waits for eax (at most 65535) counts of the PIT, without interrupts.
pit_wait:
        push    rax
        mov     al, PIT_ONE_SHOT
        out     PIT_COMMAND, al
        pop     rax
        out     PIT_COUNTER, al
        mov     al, ah
        out     PIT_COUNTER, al
pit_next:
        mov     al, PIT_STATUS
        out     PIT_COMMAND, al
        in      al, PIT_COUNTER
        test    al, PIT_OUT
        jz      pit_next
        ret

# INIT, SIPI, SIPI, with Intel's delays.  The second SIPI is for an AP that has missed the first;
# the others ignore it.
start_aps:
        lea     rsi, [rip + trampoline]
        mov     edi, TRAMPOLINE
        mov     ecx, offset trampoline_end - trampoline
        rep movsb
        mov     dword ptr [rbx + LAPIC_ICR_LOW], ICR_OTHERS | ICR_INIT
        mov     eax, PIT_10_MS
        call    pit_wait
        mov     dword ptr [rbx + LAPIC_ICR_LOW], ICR_OTHERS | ICR_SIPI | (TRAMPOLINE >> 12)
        mov     eax, PIT_200_US
        call    pit_wait
        mov     dword ptr [rbx + LAPIC_ICR_LOW], ICR_OTHERS | ICR_SIPI | (TRAMPOLINE >> 12)
        ret

# Sends each AP an IPI and waits for its answer before the next.  ZF: all have answered.
call_aps:
        xor     ecx, ecx                # the APIC id
        xor     esi, esi                # answers to expect
call_next:
        cmp     byte ptr [rcx + present], 0
        je      call_skip
        inc     esi
        mov     eax, ecx
        shl     eax, 24
        mov     [rbx + LAPIC_ICR_HIGH], eax
        mov     dword ptr [rbx + LAPIC_ICR_LOW], ICR_FIXED | ANSWER_VECTOR
        lea     rdi, [rip + answers]
        mov     edx, PATIENCE
        call    wait_for
        jne     call_over
call_skip:
        inc     ecx
        cmp     ecx, 255
        jne     call_next
call_over:
        ret

# Sleeps until the dword at rdi is esi, but for edx ticks at most.  ZF: it is.
wait_for:
        add     edx, [rip + ticks]
wait_next:
        cmp     [rdi], esi
        je      wait_over
        hlt                             # until an interrupt: at the latest the timer's
        cmp     [rip + ticks], edx
        jb      wait_next
        cmp     [rdi], esi
wait_over:
        ret

# Adds 1 to the counter, ROUNDS times.  The addition is not atomic: without the lock, two processors
# could read the same value, and one of the two increments would be lost.
count:
        mov     ecx, ROUNDS
count_next:
        mov     eax, 1
        xchg    eax, [rip + lock_word]  # atomic, as xchg with memory always is
        test    eax, eax
        jz      count_locked            # it was 0, so now the lock is ours
        pause
        jmp     count_next
count_locked:
        mov     eax, [rip + counter]
        inc     eax
        mov     [rip + counter], eax
        mov     dword ptr [rip + lock_word], 0  # unlocked: x86 keeps the order of stores
        dec     ecx
        jnz     count_next
        ret

# The handlers.  The first runs on the BSP.  The next two run on APs, which have nothing in their
# registers that must be kept, but for rbx.
timer_handler:
        inc     dword ptr [rip + ticks]
        mov     dword ptr [rbx + LAPIC_EOI], 0
        iretq

count_handler:
        call    count
        lock inc dword ptr [rip + finished]
        mov     dword ptr [rbx + LAPIC_EOI], 0
        iretq

# Only one AP at a time is called by this, so the lines do not mix.
answer_handler:
        print   "APIC id "
        mov     eax, [rbx + LAPIC_ID]
        shr     eax, 24
        call    put_hex
        print   " has got the IPI\n"
        inc     dword ptr [rip + answers]
        mov     dword ptr [rbx + LAPIC_EOI], 0
        iretq

spurious_handler:                       # an interrupt that was withdrawn; it wants no EOI
        iretq

        .bss
        .balign 4096
lapic_directory:
        .skip   4096
stacks:
        .skip   255 * STACK
present:                                # by APIC id: 1 for the APs
        .skip   256
arrived:                                # how many APs have come so far
        .skip   4
finished:                               # how many APs have counted
        .skip   4
answers:
        .skip   4
ticks:                                  # of the BSP's timer
        .skip   4
lock_word:                              # 1: somebody is between lock and unlock
        .skip   4
counter:
        .skip   4
