# Says what the guest is, and runs the workload between two marks.
b=/bin/busybox
echo; echo "guest: up $($b cut -d' ' -f1 /proc/uptime) s"
echo "guest: cpus $($b nproc)"
echo "guest: begin"
$b sh /workload.sh $b /workload
echo "guest: end $?"
echo "guest: clocksource $($b cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
