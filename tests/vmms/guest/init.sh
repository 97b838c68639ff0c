#!/bin/busybox sh
# The first process of the guest. `end` comes from the kernel's command line.
b=/bin/busybox
$b mount -t devtmpfs dev /dev; $b mount -t proc proc /proc; $b mount -t sysfs sys /sys
$b dmesg -n 1 # or what the kernel says would stand in between
for module in /modules/*.ko; do [ -e "$module" ] && $b insmod $module; done
$b sh /report.sh
[ "$end" = reboot ] && $b reboot -f
$b poweroff -f
