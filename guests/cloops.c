/*
 * cloops: loops.S as a C program, for what only a compiler's debug information has: types, so that
 * gdb can `watch total` and `print total`, arguments and local variables.
 *
 * It ends with a status rather than a message: with -O0 and no library there is no short way to
 * print, and the debug-exit port is one instruction.  A sum other than 35 gives another status.
 */

long total;

static void debug_exit(unsigned char value)
{
    __asm__ volatile("outb %0, $0xf4" : : "a"(value));
}

void inner(long n)
{
    total += n;
}

void outer(long n)
{
    for (long i = 1; i <= n; i++)
        inner(i);
}

int main(void)
{
    for (long round = 1; round <= 5; round++)
        outer(round);
    return (int)total;
}

/*
 * The machine enters here with a stack pointer that is a multiple of 16.  A compiler expects what
 * a call leaves behind: a multiple of 16, minus 8 for the return address.  The call below does it,
 * so this function must not have a frame of its own, which `naked` promises.
 * The linker puts .text.start first, since a flat image is entered at its first byte.
 */
__attribute__((naked, section(".text.start"))) void _start(void)
{
    __asm__ volatile(".cfi_undefined rip\n\t" /* nobody called us: a backtrace ends here */
                     "xor %ebp, %ebp\n\t"
                     "call start_c");
}

__attribute__((used)) static void start_c(void)
{
    debug_exit((unsigned char)main());
    for (;;)
        __asm__ volatile("hlt");
}
