/*
 * The floor: what the kernel alone costs.
 *
 * The same guests that pyvmm is measured with, under the shortest C program that can run them: a
 * thread for each vCPU, KVM_RUN in a loop, and nothing done with an exit but looking at it.
 * benchmarks/floor.py compiles and runs this; each mode prints numbers that it reads.  It defines
 * what guests.py knows, too: MARK_PORT, where "the measured part begins, or ends, here" is written
 * to, and COUNTER, the address where spin() counts.
 *
 *     floor exits GUEST VCPUS   seconds and CPU seconds from the first mark to the last
 *     floor coalesced GUEST PORT  the same, one vCPU, with writes to PORT collected by the kernel
 *     floor kick GUEST COUNT    microseconds from a kick to the vCPU's answer, one a line
 *     floor cycles GUEST COUNT  seconds for so many suspend and resume cycles
 *     floor steps GUEST COUNT   seconds and CPU seconds for so many single-steps
 *     floor sequential FILE COUNT  seconds and CPU seconds for so many reads of a disk's file,
 *     floor random FILE COUNT      of SEQUENTIAL and of RANDOM bytes
 *     floor start GUEST         the guest's COM1 and debug console output, then the end
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    MEMORY = 64 << 20,
    PAGE_TABLES = 0x1000,
    ENTRY = 0x100000,
    MAX_VCPUS = 64,
    COM1_DATA = 0x3f8,
    COM1_LSR = 0x3fd,
};

struct vcpu {
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    int marks;
    double wall[2], cpu[2]; /* at the marks, seconds */
};

static struct vcpu vcpus[MAX_VCPUS];
static int nr_vcpus, kvm, vm, printing;
static volatile uint32_t *counter;
static struct kvm_coalesced_mmio_ring *ring; /* NULL unless the kernel collects writes */

static void check(long result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

/* The guest is not one for this mode: a mistake in the benchmark, and nothing about the host. */
static void misused(const char *what)
{
    fprintf(stderr, "floor: %s\n", what);
    exit(2);
}

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/* --- a machine like pyvmm's: 64-bit mode, the first 4 GiB mapped one to one ------------------- */

static void make_memory(const char *guest)
{
    char *ram = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ram == MAP_FAILED)
        check(-1, "mmap");
    uint64_t *pml4 = (uint64_t *)(ram + PAGE_TABLES), *pdpt = pml4 + 512, *pd = pdpt + 512;
    pml4[0] = (PAGE_TABLES + 0x1000) | 3;
    for (uint64_t n = 0; n < 4; n++)
        pdpt[n] = (PAGE_TABLES + 0x2000 + 0x1000 * n) | 3;
    for (uint64_t n = 0; n < 4 * 512; n++)
        pd[n] = n << 21 | 0x83; /* present, writable, 2 MiB */
    counter = (uint32_t *)(ram + COUNTER);
    int fd = open(guest, O_RDONLY);
    check(fd, guest);
    check(read(fd, ram + ENTRY, MEMORY - ENTRY), guest);
    close(fd);
    struct kvm_userspace_memory_region region = {
        .memory_size = MEMORY, .userspace_addr = (uintptr_t)ram};
    check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
}

static void make_vcpu(struct vcpu *v, int id, struct kvm_cpuid2 *cpuid)
{
    v->fd = ioctl(vm, KVM_CREATE_VCPU, id);
    check(v->fd, "KVM_CREATE_VCPU");
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    v->run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    if (v->run == MAP_FAILED)
        check(-1, "mmap of the vCPU");
    check(ioctl(v->fd, KVM_SET_CPUID2, cpuid), "KVM_SET_CPUID2");
    struct kvm_sregs sregs;
    check(ioctl(v->fd, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment data = {
        .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    struct kvm_segment code = data;
    code.selector = 0x08, code.type = 11, code.db = 0, code.l = 1;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= 1 << 5;      /* PAE */
    sregs.cr0 = 0x80000033;   /* PG, NE, ET, MP, PE */
    sregs.efer |= 0x500;      /* LME, LMA */
    check(ioctl(v->fd, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = ENTRY, .rflags = 2, .rsp = 0x80000 - 0x1000 * id};
    check(ioctl(v->fd, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void make_machine(const char *guest, int count)
{
    static struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = {.header.nent = 256};
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    check(kvm, "/dev/kvm");
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    check(vm, "KVM_CREATE_VM");
    check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    make_memory(guest);
    for (nr_vcpus = 0; nr_vcpus < count; nr_vcpus++)
        make_vcpu(&vcpus[nr_vcpus], nr_vcpus, &cpuid.header);
}

/* --- exits ----------------------------------------------------------------------------------- */

static void port_exit(struct vcpu *v)
{
    struct kvm_run *run = v->run;
    char *data = (char *)run + run->io.data_offset;
    if (run->io.direction == KVM_EXIT_IO_IN)
        *data = run->io.port == COM1_LSR ? 0x60 : 0;
    else if (run->io.port == MARK_PORT && v->marks < 2) {
        v->wall[v->marks] = now(CLOCK_MONOTONIC);
        v->cpu[v->marks++] = now(CLOCK_THREAD_CPUTIME_ID);
    } else if (printing && run->io.port == COM1_DATA)
        check(write(1, data, 1), "write");
}

static void *run_until_hlt(void *argument)
{
    struct vcpu *v = argument;
    for (;;) {
        check(ioctl(v->fd, KVM_RUN, 0), "KVM_RUN");
        if (ring)
            ring->first = ring->last;
        switch (v->run->exit_reason) {
        case KVM_EXIT_IO:
            port_exit(v);
            break;
        case KVM_EXIT_MMIO:
            break;
        case KVM_EXIT_HLT:
            return NULL;
        default:
            fprintf(stderr, "floor: exit %u\n", v->run->exit_reason);
            exit(1);
        }
    }
}

static void run_all(void)
{
    for (int n = 0; n < nr_vcpus; n++)
        pthread_create(&vcpus[n].thread, NULL, run_until_hlt, &vcpus[n]);
    for (int n = 0; n < nr_vcpus; n++)
        pthread_join(vcpus[n].thread, NULL);
}

static void coalesce(int port)
{
    struct kvm_coalesced_mmio_zone zone = {.addr = port, .size = 1, .pio = 1};
    check(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone), "KVM_REGISTER_COALESCED_MMIO");
    int page = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO);
    ring = (void *)((char *)vcpus[0].run + page * sysconf(_SC_PAGESIZE));
}

static void measure_exits(void)
{
    run_all();
    double first = vcpus[0].wall[0], last = vcpus[0].wall[1], cpu = 0;
    for (int n = 0; n < nr_vcpus; n++) {
        if (vcpus[n].marks != 2)
            misused("the guest ended without having written to MARK_PORT twice");
        first = vcpus[n].wall[0] < first ? vcpus[n].wall[0] : first;
        last = vcpus[n].wall[1] > last ? vcpus[n].wall[1] : last;
        cpu += vcpus[n].cpu[1] - vcpus[n].cpu[0];
    }
    printf("%.9f %.9f\n", last - first, cpu);
}

/* --- steps ----------------------------------------------------------------------------------- */

static void measure_steps(int count)
{
    struct vcpu *v = &vcpus[0];
    struct kvm_guest_debug debug = {
        .control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ};
    double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
    for (int n = 0; n < count; n++) {
        check(ioctl(v->fd, KVM_SET_GUEST_DEBUG, &debug), "KVM_SET_GUEST_DEBUG");
        check(ioctl(v->fd, KVM_RUN, 0), "KVM_RUN");
        if (v->run->exit_reason != KVM_EXIT_DEBUG)
            misused("a step ended otherwise than with a debug exit");
    }
    printf("%.9f %.9f\n", now(CLOCK_MONOTONIC) - wall, now(CLOCK_THREAD_CPUTIME_ID) - cpu);
}

/* --- kicks: the debugged set in its smallest form --------------------------------------------- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int suspended, parked, ended; /* guarded by lock */

static void *run_until_suspended(void *argument)
{
    struct vcpu *v = argument;
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, SIGUSR1);
    for (;;) {
        struct timespec zero = {0};
        if (ioctl(v->fd, KVM_RUN, 0) < 0 && errno != EINTR)
            check(-1, "KVM_RUN");
        while (sigtimedwait(&kick, NULL, &zero) > 0)
            ;
        pthread_mutex_lock(&lock);
        while (suspended && !ended) {
            parked = 1; /* each time: it may be suspended again before it has woken */
            pthread_cond_broadcast(&changed);
            pthread_cond_wait(&changed, &lock);
        }
        pthread_mutex_unlock(&lock);
        if (ended)
            return NULL;
    }
}

static void suspend_and_wait(struct vcpu *v)
{
    pthread_mutex_lock(&lock);
    suspended = 1;
    pthread_kill(v->thread, SIGUSR1);
    while (!parked)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void resume(void)
{
    pthread_mutex_lock(&lock);
    suspended = parked = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void measure_kicks(int count, int one_by_one)
{
    struct {
        struct kvm_signal_mask header;
        uint64_t set;
    } __attribute__((packed)) mask = {.header.len = 8};
    sigset_t kick;
    sigemptyset(&kick);
    sigaddset(&kick, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &kick, NULL); /* the thread inherits it; KVM_RUN unblocks it */
    check(ioctl(vcpus[0].fd, KVM_SET_SIGNAL_MASK, &mask), "KVM_SET_SIGNAL_MASK");
    pthread_create(&vcpus[0].thread, NULL, run_until_suspended, &vcpus[0]);
    usleep(20000);
    double begin = now(CLOCK_MONOTONIC);
    for (int n = 0; n < count; n++) {
        double start = now(CLOCK_MONOTONIC);
        suspend_and_wait(&vcpus[0]);
        double microseconds = (now(CLOCK_MONOTONIC) - start) * 1e6;
        uint32_t before = *counter;
        resume();
        while (*counter == before)
            usleep(0); /* until it executes again, and not in its way: sched_yield() would be */
        if (one_by_one) {
            printf("%.3f\n", microseconds);
            usleep(500);
        }
    }
    if (!one_by_one)
        printf("%.9f\n", now(CLOCK_MONOTONIC) - begin);
    pthread_mutex_lock(&lock);
    ended = suspended = 1;
    pthread_kill(vcpus[0].thread, SIGUSR1);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    pthread_join(vcpus[0].thread, NULL);
}

/* --- a disk: what a virtio device does with its file ------------------------------------------ */

static void measure_reads(const char *file, int count, size_t bytes, int at_random)
{
    static char data[16][SEQUENTIAL] __attribute__((aligned(4096))); /* as many as virtio.c has */
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    check(fd, file);
    off_t size = lseek(fd, 0, SEEK_END), at = 0;
    uint32_t random = 1;
    double wall = now(CLOCK_MONOTONIC), cpu = now(CLOCK_THREAD_CPUTIME_ID);
    for (int n = 0; n < count; n++) {
        check(pread(fd, data[n % 16], bytes, at), file);
        random = random * 1664525 + 1013904223;
        at = at_random ? (off_t)((random * (size / bytes)) >> 32) * bytes : (at + bytes) % size;
    }
    printf("%.9f %.9f\n", now(CLOCK_MONOTONIC) - wall, now(CLOCK_THREAD_CPUTIME_ID) - cpu);
}

int main(int argc, char **argv)
{
    const char *mode = argc > 2 ? argv[1] : "";
    int number = argc > 3 ? atoi(argv[3]) : 1;
    if (!strcmp(mode, "exits") && number >= 1 && number <= MAX_VCPUS) {
        make_machine(argv[2], number);
        measure_exits();
    } else if (!strcmp(mode, "coalesced")) {
        make_machine(argv[2], 1);
        coalesce(number);
        measure_exits();
    } else if (!strcmp(mode, "kick") || !strcmp(mode, "cycles")) {
        make_machine(argv[2], 1);
        measure_kicks(number, mode[0] == 'k');
    } else if (!strcmp(mode, "steps")) {
        make_machine(argv[2], 1);
        measure_steps(number);
    } else if (!strcmp(mode, "sequential")) {
        measure_reads(argv[2], number, SEQUENTIAL, 0);
    } else if (!strcmp(mode, "random")) {
        measure_reads(argv[2], number, RANDOM, 1);
    } else if (!strcmp(mode, "start")) {
        printing = 1;
        make_machine(argv[2], 1);
        run_all();
    } else {
        fprintf(stderr, "usage: floor exits|coalesced|kick|cycles|steps|start GUEST [NUMBER]\n"
                        "       floor sequential|random FILE COUNT\n");
        return 2;
    }
    return 0;
}
