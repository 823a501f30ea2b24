/*
 * serial.h: ports, and a serial port driven by interrupts: what multiboot.c reads and prints with.
 *
 * Included, not linked, so that the guest stays one object file.  A character that is printed waits
 * in a ring until the UART interrupts because it can take more; one that arrives interrupts, and
 * waits in the other ring until the program wants it.  Source: the data sheet of the PC16550D.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum {
    PIC1 = 0x20,
    END_OF_INTERRUPT = 0x20,
    COM1 = 0x3f8, /* a byte written here is sent, a byte that came is read here */
    IER = COM1 + 1, /* which interrupts are enabled */
    IER_RECEIVED = 1,
    IER_EMPTY = 2,
    IIR = COM1 + 2, /* read: which interrupt it is */
    IIR_NOTHING = 1,
    FCR = COM1 + 2, /* written: the FIFOs */
    FIFO_SIZE = 16,
    LCR = COM1 + 3, /* the format of a character; bit 7: COM1 and IER are the baud rate now */
    MCR = COM1 + 4, /* the modem; in a PC, its OUT2 connects the interrupt line */
    LSR = COM1 + 5, /* the state */
    LSR_RECEIVED = 1,
    LSR_EMPTY = 0x20, /* the transmitter can take FIFO_SIZE bytes */
};

static void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void interrupts_off(void) { __asm__ volatile("cli" : : : "memory"); }
static void interrupts_on(void) { __asm__ volatile("sti" : : : "memory"); }

/*
 * Call it with interrupts off, when there is nothing to do.  An interrupt that comes just before
 * is not missed: sti takes effect one instruction late, so it ends the hlt.
 */
static void sleep(void) { __asm__ volatile("sti; hlt; cli" : : : "memory"); }

/* One side moves head, the other one tail.  A u8 wraps by itself: behind 255 comes 0. */
static struct ring {
    volatile u8 head, tail;
    volatile char data[256];
} input, output;

static int is_empty(const struct ring *ring) { return ring->head == ring->tail; }
static char take(struct ring *ring) { return ring->data[ring->tail++]; }

/* False if the ring is full. */
static int put(struct ring *ring, char c)
{
    if ((u8)(ring->head + 1) == ring->tail)
        return 0;
    ring->data[ring->head] = c;
    ring->head++; /* only now, because the other side looks at head */
    return 1;
}

static void init_serial(void)
{
    out8(LCR, 0x80);
    out8(COM1, 1); /* the divisor: 115200 baud */
    out8(IER, 0);
    out8(LCR, 3);   /* 8 bits, no parity, 1 stop bit */
    out8(FCR, 7);   /* use the FIFOs, and empty them */
    out8(MCR, 0xb); /* DTR, RTS, OUT2 */
    out8(IER, IER_RECEIVED);
}

/* What the CPU has pushed.  The compiler has handlers save all registers and end with iretq. */
struct frame {
    u64 rip, cs, rflags, rsp, ss;
};
#define HANDLER static __attribute__((interrupt)) void

/* The PIC notices only that the line rises, so this goes on until the UART has let it fall. */
HANDLER serial_irq(struct frame *frame)
{
    while (!(in8(IIR) & IIR_NOTHING)) {
        while (in8(LSR) & LSR_RECEIVED)
            put(&input, (char)in8(COM1)); /* lost if nobody has read 255 characters */
        if (in8(LSR) & LSR_EMPTY)
            for (int n = 0; n < FIFO_SIZE && !is_empty(&output); n++)
                out8(COM1, (u8)take(&output));
        if (is_empty(&output))
            out8(IER, IER_RECEIVED);
    }
    out8(PIC1, END_OF_INTERRUPT);
}

/* Not for interrupt handlers: it waits, and turns interrupts on. */
static void put_char(char c)
{
    interrupts_off();
    while (!put(&output, c))
        sleep();
    out8(IER, IER_RECEIVED | IER_EMPTY); /* interrupts at once if the transmitter is empty */
    interrupts_on();
}

static char get_char(void)
{
    interrupts_off();
    while (is_empty(&input))
        sleep();
    char c = take(&input);
    interrupts_on();
    return c;
}

/* Sends the rest without interrupts.  They stay off, because this is the end. */
static void flush(void)
{
    interrupts_off();
    while (!is_empty(&output)) {
        while (!(in8(LSR) & LSR_EMPTY))
            ;
        out8(COM1, (u8)take(&output));
    }
}

static void put_number(u64 value, u64 base)
{
    if (value >= base)
        put_number(value / base, base);
    put_char("0123456789abcdef"[value % base]);
}

/* A small printf: %s, %u (32 bits) and %x (64 bits). */
static void print(const char *format, ...)
{
    __builtin_va_list values;
    __builtin_va_start(values, format);
    for (; *format; format++)
        if (*format != '%')
            put_char(*format);
        else if (*++format == 's')
            for (const char *s = __builtin_va_arg(values, const char *); *s; s++)
                put_char(*s);
        else if (*format == 'u')
            put_number(__builtin_va_arg(values, u32), 10);
        else
            put_number(__builtin_va_arg(values, u64), 16);
    __builtin_va_end(values);
}
