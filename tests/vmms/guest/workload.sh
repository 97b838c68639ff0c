# What the shell of the guest, and of the host, is asked to do: $1 is busybox, $2 the compiled workload.
set -e
$2
i=0
while [ $i -lt 200 ]; do echo "line $i of the shell"; i=$((i + 1)); done |
    $1 grep -v 7 | $1 sort -r | $1 awk '{ sum += $2 * 3; print $0, sum }' | $1 md5sum
trap 'echo "trap"' USR1
(kill -USR1 $$)
wait
echo $(for word in a b c; do (echo $word | $1 tr a-c x-z); done)
