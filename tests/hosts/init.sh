#!/bin/busybox sh
# The first process inside an emulated host: make it a small Linux system, load KVM, run the job,
# send its output and results out over the second serial port.
#
# The first serial port is the kernel's console, so kernel messages cannot get between the results.
# What goes out (session.py reads it): the marker lines below, the command's output between the
# first two, and a base64 tar.gz of /results between the last two.

/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/root TERM=dumb LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /tmp /results
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
exec 3>/dev/ttyS1
stty raw -echo 115200 -F /dev/ttyS1
hostname emulated-host
ip link set lo up

for module in $(cat /modules/order); do
    case $module in
        kvm-amd) grep -qw svm /proc/cpuinfo || continue ;;
        kvm-intel) grep -qw vmx /proc/cpuinfo || continue ;;
    esac
    insmod /modules/$module.ko || echo "@@error insmod $module failed" >&3
done

# Bochs 2.7 takes no interrupt while a VMX guest runs with RFLAGS.IF clear, although kvm_intel asks
# for an exit: such a guest, once it spins, is never left again, and this one processor is gone (see
# docs/hosts.md). It does take NMIs. After the exit for one, the kernel finds the interrupts that
# wait. So the HPET, which the kernel has no use for once it has the local APIC's timer, raises one
# each millisecond. Devices at these addresses: I/O APIC at fec00000, HPET at fed00000.
if grep -qw vmx /proc/cpuinfo; then
    echo 0 >/proc/sys/kernel/printk # of each NMI the kernel says that it does not know it
    devmem 0xfec00000 32 0x14 # the redirection of pin 2, where the HPET's first timer is:
    devmem 0xfec00010 32 0x400 # delivered as NMI, not masked
    devmem 0xfec00000 32 0x15
    devmem 0xfec00010 32 0 # to processor 0
    devmem 0xfed00010 32 0 # stop
    devmem 0xfed000f0 32 0
    devmem 0xfed000f4 32 0
    devmem 0xfed00100 32 0x4c # first timer: periodic, interrupts on, the next write is the period
    devmem 0xfed00108 32 100000 # of 10 ns
    devmem 0xfed0010c 32 0
    devmem 0xfed00010 32 3 # go, with the first timer at pin 2
fi

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RESULTS=/results
cd /checkout
echo "@@begin" >&3
# Through cat: the command must see a pipe, not a terminal. Its status goes round by a file.
{ sh /job </dev/null 2>&1; echo $? >/status; } | cat >&3
echo "@@status $(cat /status)" >&3
tar -C /results -cz . | base64 >&3
echo "@@end" >&3
# Whoever reads the port ends the emulator. Powering off would cut short what is still in the port.
while true; do
    sleep 1000
done
