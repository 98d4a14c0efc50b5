#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Process 1 of a throwaway node. Run inside new mount, network, PID, IPC and UTS namespaces; $1 is an empty directory
# of the host, $2 the node's name. Lays out the paths that runtime and plugins use on a real node, all of them in
# memory, and says its PID as the host sees it. When it is killed the kernel ends every process of the PID namespace,
# and with the last of them go mounts, links and pins.
set -eu
dir=$1
# /proc is still the host's here, so this is the PID that nsenter needs. Bash itself opens the file.
read -r pid _ </proc/self/stat

mount -t proc proc /proc
mount -t tmpfs -o mode=0755 node "$dir"

overlay() {
  mkdir -p "$dir/upper$1" "$dir/work$1"
  mount -t overlay -o "lowerdir=$1,upperdir=$dir/upper$1,workdir=$dir/work$1" overlay "$1"
}
overlay /etc
overlay /opt
overlay /var/lib
# containerd's snapshots are overlays themselves, and their upper directories cannot lie on one.
mkdir -p "$dir/containerd" /var/lib/containerd
mount --bind "$dir/containerd" /var/lib/containerd
mount -t tmpfs -o mode=0755 run /run

# sysfs shows the links of the network namespace it was mounted in. The cgroup hierarchies are mounts on top of it.
mkdir "$dir/cgroup"
mount --rbind /sys/fs/cgroup "$dir/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$dir/cgroup" /sys/fs/cgroup
umount -R "$dir/cgroup"
mount -t bpf -o mode=0700 bpf /sys/fs/bpf

mkdir -p /etc/cni/net.d /opt/cni/bin /etc/containerd /run/netns
# On many hosts a link into /run.
rm -f /etc/resolv.conf
echo 'nameserver 192.0.2.53' >/etc/resolv.conf

hostname "$2"
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
# Else the node's own IPv6 addresses answer nobody for one to two seconds after a bridge or veth is made.
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad

echo "$pid"
# Bash reaps whatever a dead parent left to process 1 (shims of containerd do that on purpose).
sleep infinity &
wait
