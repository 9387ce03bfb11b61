#!/bin/sh
# The first program of a lab machine on its real root: makes it a host with soft-RoCE, KVM and netem, starts the agent that
# takes commands from outside, and collects orphans. @NAMES@ are filled in when the lab is made.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
for word in $(cat /proc/cmdline); do
    case $word in lab.*) eval "lab_${word#lab.}" ;; esac
done
export LIMOSA_LAB="$lab_host"

problem() {
    echo "lab: $1"
    echo "$1" >>/run/lab/problems
}
try() {
    "$@" || problem "failed: $*"
}

mkdir -p /dev/pts /dev/shm /run/netns /run/lock
try mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
try mount -t tmpfs -o mode=1777 shm /dev/shm
try mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mkdir -p /lib/modules
ln -sfn /run/lab/outer/@KERNEL_ROOT@/lib/modules/@RELEASE@ /lib/modules/@RELEASE@

# A workspace below one of the fresh folders would be hidden.
for folder in @FOLDERS@; do
    [ -e "$folder" ] || { mkdir -p "$folder" && try mount --bind "/run/lab/outer$folder" "$folder"; }
done

hostname "$lab_host"
cat >/etc/hosts <<HOSTS
127.0.0.1 localhost
::1 localhost
10.77.0.1 alpha
10.77.0.2 beta
fd77::1 alpha
fd77::2 beta
HOSTS
ulimit -n 65536
ulimit -l unlimited
echo 1 >/proc/sys/kernel/sysrq

# crc32_generic before rdma_rxe, which asks for it by another name and fails without it.
for module in virtio_net crc32_generic rdma_rxe rdma_ucm ib_uverbs; do
    try modprobe "$module"
done
for card in /sys/class/net/*; do
    case $(cat "$card/address") in
        "$lab_mac") ip link set "${card##*/}" name v0 ;;
        "$lab_control_mac") ip link set "${card##*/}" name control0 ;;
        "$lab_guest_mac") ip link set "${card##*/}" name g0 ;;
    esac
done
try ip link set lo up
try ip link set v0 mtu 9000
try ip addr add "$lab_ip/24" dev v0
try ip addr add "$lab_ip6/64" dev v0 nodad
try ip link set v0 up
try rdma link add rxe0 type rxe netdev v0
for module in kvm_amd tun veth bridge sch_netem af_packet; do
    try modprobe "$module"
done
# Guests have an Ethernet of their own. This machine has no address there.
try ip link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
try ip link set g0 master br0
try ip link set g0 up
try ip link set br0 up

cp /run/lab/outer/@AGENT@ /run/lab/agent || problem "the agent cannot be copied"
echo "lab: ready"
/run/lab/agent inside "$lab_control" &
agent=$!
# Orphans come to process 1. It takes them all, until the agent itself ends: then so does the machine.
while kill -0 "$agent" 2>/dev/null; do
    wait
done
echo "lab: the agent ended"
echo o >/proc/sysrq-trigger
sleep 60
