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
