#!/bin/busybox sh
# The first process of Linux as a guest: load the drivers and start a shell on the console. With
# root=DEVICE on the kernel's command line that is the shell of the system there: what tests put
# onto a disk is this initramfs without its modules.

/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
[ -d /modules ] && for module in $(cat /modules/order); do
    insmod /modules/$module.ko
done
root=$(sed -n 's/.*root=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ -d /modules ] && [ "$root" ]; then
    mount "$root" /root
    exec switch_root /root /init
fi
echo "a shell on $(sed -n 's/\([^ ]*\) \/ .*/\1/p' /proc/mounts | tail -n 1)"
exec setsid cttyhack sh
