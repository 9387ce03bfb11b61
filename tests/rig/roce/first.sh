#!/bin/busybox sh
# The first program of a lab machine: from Debian's kernel to the outer machine's root, read-only, with a layer of memory
# above it. So everything of the outer machine is there and may be written, and nothing written reaches it.
B=/bin/busybox
give_up() {
    echo "lab: $1"
    $B sync
    $B poweroff -f
}
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs devtmpfs /dev
while read -r module; do
    $B insmod "/modules/$module" || give_up "the kernel refuses the module $module"
done </modules/order
options=ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose
$B mount -t 9p -o $options root /host || give_up "the outer machine's root cannot be mounted"
$B mount -t tmpfs -o size=75%,mode=755 upper /upper || give_up "no memory for the writable layer"
$B mkdir /upper/files /upper/work
$B mount -t overlay -o lowerdir=/host,upperdir=/upper/files,workdir=/upper/work,xino=off root /root || give_up "no writable root"
# What belongs to the outer machine's life stays there.
for place in proc sys dev run tmp var/tmp; do
    $B mkdir -p "/root/$place"
done
for place in run tmp var/tmp; do
    $B mount -t tmpfs -o mode=1777 "lab-${place#var/}" "/root/$place" || give_up "no fresh /$place"
done
$B chmod 755 /root/run
$B mount --move /proc /root/proc
$B mount --move /sys /root/sys
$B mount --move /dev /root/dev
# The outer machine's files as they are, read-only: also those that the fresh folders hide.
$B mkdir -p /root/run/lab/outer
$B mount --move /host /root/run/lab/outer
$B cp /second /root/run/lab/second
exec $B switch_root /root /run/lab/second
