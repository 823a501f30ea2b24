/*
 * multiboot: a small kernel in C.  It sets up paging, interrupts, timer, serial port and keyboard,
 * prints what the boot loader tells it, and answers commands.  With the word "test" on its command
 * line it waits for three ticks of the timer instead, and powers the machine off.
 *
 *     qemu-system-x86_64 -kernel guests/multiboot.elf -append test -serial stdio -display none
 *
 * A boot loader starts it in 32-bit mode; it goes to 64-bit mode at once, because every KVM can run
 * that: on the one called kvm_pvm in docs/hosts.md, 32-bit code has no paging.
 *
 * Start with kernel_main, at the end.  Sources: Multiboot Specification 0.6.96, "Boot information
 * format"; Intel SDM vol. 3A, "4-Level Paging" and "64-Bit Mode IDT"; the data sheets of 8259A
 * (PIC), 8254 (PIT) and 8042 (keyboard controller).
 */

#include "serial.h"

/* The multiboot header, the GDT, page tables for the first 2 MiB, and the way to start64, below. */
__asm__(".intel_syntax noprefix; .include \"boot64.inc\"; .att_syntax prefix");

enum {
    PIC2 = 0xa0,
    PIT_COUNTER = 0x40,
    PIT_COMMAND = 0x43,
    PIT_DIVISOR = 1193182 / 100, /* 100 ticks a second */
    KEYBOARD_DATA = 0x60,
    KEYBOARD_COMMAND = 0x64,
    KEYBOARD_CONFIGURE = 0x60, /* commands */
    KEYBOARD_RESET_CPU = 0xfe,
    ACPI_CONTROL = 0x604, /* where QEMU has ACPI's PM1a control register */
    ACPI_OFF = 0x2000,
    DEBUG_EXIT = 0xf4, /* the exit status is what is written, * 2 + 1 */
};

/* --- Paging ----------------------------------------------------------------------------------- */

enum { PRESENT = 1, WRITABLE = 2, LARGE = 0x80, LARGE_PAGE = 2 << 20 };
extern volatile u64 page_directory[512]; /* in boot64.inc */

/* Maps the rest of the first GiB to itself, where all that the loader has loaded should be. */
static void init_paging(void)
{
    for (u64 n = 1; n < 512; n++)
        page_directory[n] = n * LARGE_PAGE | PRESENT | WRITABLE | LARGE;
}

/* --- Exceptions and interrupts ---------------------------------------------------------------- */

static void halt(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void panic(const char *fault, const struct frame *frame)
{
    u64 cr2;
    __asm__ volatile("mov %%cr2, %0" : "=r"(cr2));
    print("panic: %s at RIP 0x%x, CR2 0x%x\n", fault, frame->rip, cr2);
    flush();
    out8(DEBUG_EXIT, 1);
    halt();
}

HANDLER undefined_opcode(struct frame *frame) { panic("undefined opcode", frame); }
HANDLER protection(struct frame *frame, u64 error) { panic("general protection", frame); }
HANDLER page_fault(struct frame *frame, u64 error) { panic("page fault", frame); }

static volatile u32 ticks;

HANDLER timer_irq(struct frame *frame)
{
    ticks++;
    out8(PIC1, END_OF_INTERRUPT);
}

/* A scancode of set 1 is the number of a key, plus 0x80 when the key comes up. */
HANDLER keyboard_irq(struct frame *frame)
{
    static const char keys[] = "\0\0331234567890-=\b\tqwertyuiop[]\n\0asdfghjkl;'`"
                               "\0\\zxcvbnm,./\0*\0 ";
    u8 code = in8(KEYBOARD_DATA);
    if (code < sizeof keys && keys[code])
        put(&input, keys[code]);
    out8(PIC1, END_OF_INTERRUPT);
}

HANDLER spurious_irq(struct frame *frame) {} /* the PIC says IRQ 7 if a line fell too early */

enum { FIRST_IRQ = 0x20 };              /* the vector: those before are for exceptions */
enum { CODE64 = 0x08, GATE = 0x8e00 }; /* a selector; present, interrupt gate, for CPL 0 */

static struct gate { u16 offset_low, selector, type, offset_middle; u32 offset_high, zero; }
    idt[FIRST_IRQ + 8];
static struct { u16 limit; struct gate *base; } __attribute__((packed))
    idt_pointer = {sizeof idt - 1, idt};

static void set_gate(int vector, void *handler)
{
    u64 offset = (u64)handler;
    idt[vector] = (struct gate){(u16)offset, CODE64, GATE, (u16)(offset >> 16), offset >> 32, 0};
}

static void init_interrupts(void)
{
    set_gate(6, undefined_opcode);
    set_gate(13, protection);
    set_gate(14, page_fault);
    set_gate(FIRST_IRQ + 0, timer_irq);
    set_gate(FIRST_IRQ + 1, keyboard_irq);
    set_gate(FIRST_IRQ + 4, serial_irq);
    set_gate(FIRST_IRQ + 7, spurious_irq);
    __asm__ volatile("lidt %0" : : "m"(idt_pointer));

    /* The PICs: begin; the first vector; how they are connected; 8086 mode; 0 in the mask: on. */
    out8(PIC1, 0x11);
    out8(PIC1 + 1, FIRST_IRQ);
    out8(PIC1 + 1, 1 << 2);
    out8(PIC1 + 1, 1);
    out8(PIC1 + 1, 0xff & ~(1 << 0 | 1 << 1 | 1 << 4));
    out8(PIC2, 0x11);
    out8(PIC2 + 1, FIRST_IRQ + 8);
    out8(PIC2 + 1, 2);
    out8(PIC2 + 1, 1);
    out8(PIC2 + 1, 0xff);
}

static void init_timer(void)
{
    out8(PIT_COMMAND, 0x34); /* counter 0, low byte and high byte, mode 2: over and over again */
    out8(PIT_COUNTER, PIT_DIVISOR & 0xff);
    out8(PIT_COUNTER, PIT_DIVISOR >> 8);
}

/* A real controller takes its time, and wants to be asked before each byte whether it is ready. */
static void init_keyboard(void)
{
    out8(KEYBOARD_COMMAND, KEYBOARD_CONFIGURE);
    out8(KEYBOARD_DATA, 0x45); /* IRQ 1; the keyboard's codes are translated to set 1 */
    in8(KEYBOARD_DATA);        /* a code that nobody has read would keep others from coming */
}

/* --- What the boot loader tells --------------------------------------------------------------- */

enum { LOADED = 0x2badb002 }; /* the magic number */
enum { HAS_MEMORY = 1, HAS_CMDLINE = 4, HAS_MODULES = 8, HAS_MAP = 0x40, HAS_LOADER = 0x200 };

static const struct info { /* every address in it has 32 bits */
    u32 flags, lower, upper, boot_device, cmdline, module_count, modules;
    u32 symbols[4], map_length, map, drives_length, drives, configuration, loader;
} *info;
struct module { u32 start, end, string, reserved; };
struct range { u32 size; u64 start, length; u32 type; } __attribute__((packed));

static const void *at(u32 address) { return (const void *)(u64)address; }

static void print_info(void)
{
    if (info->flags & HAS_LOADER)
        print("boot loader: %s\n", at(info->loader));
    if (info->flags & HAS_CMDLINE)
        print("command line: %s\n", at(info->cmdline));
    if (info->flags & HAS_MEMORY)
        print("memory: %u KiB from 0, %u KiB from 1 MiB\n", info->lower, info->upper);
    for (u32 next = info->map; info->flags & HAS_MAP && next < info->map + info->map_length;) {
        const struct range *range = at(next);
        print("  0x%x: 0x%x bytes%s\n", range->start, range->length,
              range->type == 1 ? "" : ", reserved");
        next += range->size + 4; /* size does not count itself */
    }
    for (u32 n = 0; info->flags & HAS_MODULES && n < info->module_count; n++) {
        const struct module *module = (const struct module *)at(info->modules) + n;
        print("module: 0x%x to 0x%x, %s\n", (u64)module->start, (u64)module->end,
              at(module->string));
    }
}

/* --- The program ------------------------------------------------------------------------------ */

/* Whether `text` begins with `word`, as a whole word. */
static int is(const char *text, const char *word)
{
    while (*word && *text == *word)
        text++, word++;
    return !*word && (!*text || *text == ' ');
}

static u8 number_in(const char *text)
{
    u8 number = 0;
    for (; *text; text++)
        if (*text >= '0' && *text <= '9')
            number = (u8)(number * 10 + *text - '0');
    return number;
}

static void run(const char *line)
{
    if (is(line, "help")) {
        print("help, mem, ticks, crash, reboot, off, exit N\n");
    } else if (is(line, "mem")) {
        print_info();
    } else if (is(line, "ticks")) {
        print("%u ticks of 10 ms\n", ticks);
    } else if (is(line, "crash")) {
        *(volatile u32 *)0xdead0000 = 1; /* not mapped */
    } else if (is(line, "reboot")) {
        flush();
        out8(KEYBOARD_COMMAND, KEYBOARD_RESET_CPU);
        halt(); /* it may take a moment */
    } else if (is(line, "off")) {
        flush();
        __asm__ volatile("outw %0, %1" : : "a"((u16)ACPI_OFF), "d"((u16)ACPI_CONTROL));
        halt();
    } else if (is(line, "exit")) {
        flush();
        out8(DEBUG_EXIT, number_in(line)); /* comes back if there is no such device */
    } else if (*line) {
        print("no such command; try help\n");
    }
}

/* Reads a line from the serial port or the keyboard, and echoes it. */
static void read_line(char *line, u32 size)
{
    u32 length = 0;
    for (char c = get_char(); c != '\r' && c != '\n'; c = get_char()) {
        if ((c == '\b' || c == 0x7f) && length > 0) {
            length--;
            print("\b \b");
        } else if (c >= ' ' && c < 0x7f && length < size - 1) {
            line[length++] = c;
            put_char(c);
        }
    }
    line[length] = 0;
    put_char('\n');
}

/* Returns when the timer has ticked three times. */
static void self_test(void)
{
    interrupts_off();
    while (ticks < 3)
        sleep();
    interrupts_on();
    print("test: ok\n");
}

__attribute__((used)) static void kernel_main(u32 magic, const struct info *given)
{
    static const struct info nothing;
    info = magic == LOADED ? given : &nothing;
    init_paging();
    init_interrupts();
    init_timer();
    init_serial();
    init_keyboard();
    interrupts_on();

    print("multiboot: hello\n");
    print_info();
    const char *cmdline = info->flags & HAS_CMDLINE ? at(info->cmdline) : "";
    for (const char *word = cmdline; *word; word++)
        if ((word == cmdline || word[-1] == ' ') && is(word, "test")) {
            self_test();
            run("off");
        }
    for (char line[80];;) {
        print("> ");
        read_line(line, sizeof line);
        run(line);
    }
}

char stack[16384] __attribute__((aligned(16)));

/* boot64.inc goes on here, with the arguments of kernel_main in the registers for them. */
__attribute__((naked)) void start64(void)
{
    __asm__ volatile(".cfi_undefined rip\n\t" /* nobody called us: a backtrace ends here */
                     "mov $stack + 16384, %esp\n\t"
                     "xor %ebp, %ebp\n\t"
                     "call kernel_main");
}
