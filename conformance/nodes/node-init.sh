#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Process 1 of a node. Run inside new mount, network, PID, IPC and UTS namespaces; $1 is the node's disk, a directory of
# the host, $2 its name. What a real node keeps over a reboot (/etc, /opt, /var) is on that disk; the rest (/run, bpffs,
# network namespaces) goes with this process, as do all others of the node.
set -eu
disk=$1
read -r pid _ </proc/self/stat

mount -t proc proc /proc

overlay() {
  mkdir -p "$disk/upper$1" "$disk/work$1"
  mount -t overlay -o "lowerdir=$1,upperdir=$disk/upper$1,workdir=$disk/work$1" overlay "$1"
}
for directory in /etc /opt /var/lib /var/log; do overlay "$directory"; done
# containerd's snapshots are overlays themselves, and their upper directories cannot lie on one.
for directory in containerd kubelet; do
  mkdir -p "$disk/$directory" "/var/lib/$directory"
  mount --bind "$disk/$directory" "/var/lib/$directory"
done
mount -t tmpfs -o mode=0755 run /run

# sysfs shows the links of the network namespace it was mounted in. The cgroup hierarchies are mounts on top of it.
mkdir /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount -l /run/cgroup
rmdir /run/cgroup
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
# Mount propagation of pods (HostToContainer, Bidirectional) is refused on what is not shared. Not before the cgroup
# hierarchies have moved: taking them away here would take them away there.
mount --make-rshared /

mkdir -p /etc/cni/net.d /opt/cni/bin /etc/containerd /etc/kubernetes/manifests /run/netns /var/log/pods
# On many hosts a link into /run.
rm -f /etc/resolv.conf
echo 'nameserver 192.0.2.53' >/etc/resolv.conf

# Both kubelets are on one machine, so each has a cgroup of its own for the root of what it makes.
for hierarchy in /sys/fs/cgroup/*; do
  [ -d "$hierarchy" ] || continue
  mkdir -p "$hierarchy/$2"
  for file in cpuset.cpus cpuset.mems; do
    [ ! -e "$hierarchy/$file" ] || cat "$hierarchy/$file" >"$hierarchy/$2/$file"
  done
done

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
