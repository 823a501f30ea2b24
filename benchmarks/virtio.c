/*
 * A guest that keeps a virtio device busy: it reads a disk, or prints at a console.
 *
 * It is a flat binary, entered in 64-bit mode at its first byte with the first 4 GiB mapped one to
 * one; benchmarks/measures/virtio.py compiles it, once for each kind of work:
 *
 *     DEVICE    the device ID: 2, a disk that is read, or 3, a console that is printed at
 *     BYTES     of a request
 *     COUNT     requests in the measured part
 *     DEPTH     requests under way at a time
 *     RANDOM    whether they are all over the disk, or each begins where the one before it ended
 *     SECTORS   of the disk
 *
 * At COM1 '<' says where the measured part begins, and '>' where it ends.
 *
 * The driver looks at the used ring until something has been returned, with interrupts off: what an
 * interrupt costs depends on the guest's handler as much as on the device.  It notifies the device
 * as often as the device asks for.
 *
 * Source: Virtual I/O Device (VIRTIO) Version 1.2: "Split Virtqueues", "Virtio Over MMIO",
 * "Device Initialization", "Block Device", "Console Device".
 */
#include <stdint.h>

enum { BLOCK = 2, CONSOLE = 3 };
enum { QUEUE_SIZE = 64, SECTOR = 512 };
enum { DESCRIPTORS = DEVICE == BLOCK ? 3 : 1 }; /* of a request */
enum { QUEUE = DEVICE == BLOCK ? 0 : 1 };       /* the console's first one is for input */

_Static_assert(DEPTH * DESCRIPTORS <= QUEUE_SIZE, "more requests than the queue has room for");

/* --- the transport ---------------------------------------------------------------------------- */

enum {
    MAGIC_VALUE = 0x00, DEVICE_ID = 0x08, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24,
    QUEUE_SEL = 0x30, QUEUE_NUM = 0x38, QUEUE_READY = 0x44, QUEUE_NOTIFY = 0x50, STATUS = 0x70,
    QUEUE_DESC_LOW = 0x80, QUEUE_DRIVER_LOW = 0x90, QUEUE_DEVICE_LOW = 0xa0,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { F_VERSION_1 = 1 << (32 - 32) }; /* in the second word of features */

/* Where the VMMs that are measured have their devices, each in STRIDE bytes. */
static const uint32_t places[] = {0xd0000000 /* pyvmm */, 0xfeb00000 /* QEMU's microvm */};
enum { STRIDE = 0x200, SLOTS = 32 };

static volatile uint8_t *device;

static uint32_t get(int offset) { return *(volatile uint32_t *)(device + offset); }
static void set(int offset, uint32_t value) { *(volatile uint32_t *)(device + offset) = value; }
static uint32_t gpa(const volatile void *of) { return (uintptr_t)of; }

static int find_device(void)
{
    for (unsigned place = 0; place < sizeof places / sizeof *places; place++)
        for (int slot = 0; slot < SLOTS; slot++) {
            device = (uint8_t *)(uintptr_t)(places[place] + slot * STRIDE);
            if (get(MAGIC_VALUE) != 0x74726976) /* "virt" */
                break;
            if (get(DEVICE_ID) == DEVICE)
                return 1;
        }
    return 0;
}

/* --- the queue -------------------------------------------------------------------------------- */

enum { F_NEXT = 1, F_WRITE = 2 };
enum { AVAIL_F_NO_INTERRUPT = 1, USED_F_NO_NOTIFY = 1 };

static struct {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
} descriptors[QUEUE_SIZE] __attribute__((aligned(16)));
static volatile struct { uint16_t flags, index, ring[QUEUE_SIZE]; } available;
static volatile struct {
    uint16_t flags, index;
    struct { uint32_t head, length; } ring[QUEUE_SIZE];
} used __attribute__((aligned(4)));

static void start_device(void)
{
    set(STATUS, 0);
    set(STATUS, ACKNOWLEDGE | DRIVER);
    set(DRIVER_FEATURES_SEL, 1);
    set(DRIVER_FEATURES, F_VERSION_1);
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    set(QUEUE_SEL, QUEUE);
    set(QUEUE_NUM, QUEUE_SIZE);
    set(QUEUE_DESC_LOW, gpa(descriptors));
    set(QUEUE_DRIVER_LOW, gpa(&available));
    set(QUEUE_DEVICE_LOW, gpa(&used));
    set(QUEUE_READY, 1);
    available.flags = AVAIL_F_NO_INTERRUPT;
    set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

/* --- requests --------------------------------------------------------------------------------- */

static struct { uint32_t type, reserved; uint64_t sector; } headers[DEPTH]; /* type 0: read */
static uint8_t data[DEPTH][BYTES] __attribute__((aligned(4096)));
static volatile uint8_t status[DEPTH];

static void describe(int number, const volatile void *address, uint32_t length, int flags)
{
    descriptors[number].address = gpa(address);
    descriptors[number].length = length;
    descriptors[number].flags = flags;
    descriptors[number].next = number + 1;
}

/* The chain of a request, which stays as it is: only the sector in the header changes. */
static void prepare(int request)
{
    int first = request * DESCRIPTORS;
    if (DEVICE == CONSOLE) {
        describe(first, data[request], BYTES, 0); /* zeros: to the device it is all the same */
        return;
    }
    describe(first, &headers[request], sizeof headers[0], F_NEXT);
    describe(first + 1, data[request], BYTES, F_NEXT | F_WRITE);
    describe(first + 2, &status[request], 1, F_WRITE);
}

static void offer(int request)
{
    enum { STEP = BYTES / SECTOR };
    static uint64_t sector;
    static uint32_t random = 1;
    headers[request].sector = sector;
    status[request] = DEVICE == BLOCK ? 0xff : 0; /* a disk overwrites it */
    available.ring[available.index % QUEUE_SIZE] = request * DESCRIPTORS;
    available.index++; /* x86 keeps writes in order: the entry is there */
    random = random * 1664525 + 1013904223;
    if (RANDOM)
        sector = ((uint64_t)random * (SECTORS / STEP) >> 32) * STEP; /* its low bits are not */
    else
        sector = (sector + STEP) % SECTORS;
}

static void notify(void)
{
    __sync_synchronize(); /* the device sets its flag and then looks at our index */
    if (!(used.flags & USED_F_NO_NOTIFY))
        set(QUEUE_NOTIFY, QUEUE);
}

/* Make `count` requests, at least DEPTH; returns whether all of them succeeded. */
static int run(int count)
{
    static uint16_t seen; /* our index into the used ring */
    int offered = 0, done = 0, good = 1;
    while (offered < DEPTH)
        offer(offered++);
    notify();
    while (done < count) {
        int before = offered;
        for (; seen != used.index; seen++, done++) {
            int request = used.ring[seen % QUEUE_SIZE].head / DESCRIPTORS;
            good = good && !status[request];
            if (offered < count) {
                offer(request);
                offered++;
            }
        }
        if (offered > before)
            notify();
    }
    return good;
}

/* --- what is measured ------------------------------------------------------------------------- */

static void print(char character)
{
    enum { COM1 = 0x3f8, LINE_STATUS = COM1 + 5 };
    uint8_t ignored;
    __asm__ volatile("outb %0, %1" : : "a"(character), "d"((uint16_t)COM1));
    /* An exit, so that the byte does not wait in the kernel for others. */
    __asm__ volatile("inb %1, %0" : "=a"(ignored) : "d"((uint16_t)LINE_STATUS));
}

__attribute__((used)) static void measure(void)
{
    if (!find_device()) {
        print('?');
        return;
    }
    start_device();
    for (int request = 0; request < DEPTH; request++)
        prepare(request);
    int good = run(DEPTH); /* touch the memory, and start what starts with the first request */
    print('<');
    good = run(COUNT) && good;
    print(good ? '>' : '!');
}

__attribute__((naked, section(".text.start"))) void _start(void)
{
    __asm__("mov $0x80000, %esp\n call measure\n 1: cli\n hlt\n jmp 1b");
}
