#!/bin/sh
# First process of a host: gives it a /proc, /sys, cgroup2 tree, bpffs, /etc, /run and /var/lib of its own, then reaps.
# Arguments: the host's directory, its name.
set -eu
dir=$1
mount --make-rprivate /
mount -t proc proc /proc
# The machine's own cgroup and bpf mounts go, not only out of sight: programs look for them in mountinfo.
umount -R -l /sys
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# A leaf of its own, because a cgroup with processes may not hand controllers to its children.
mkdir -p /sys/fs/cgroup/system.slice
echo $$ >/sys/fs/cgroup/system.slice/cgroup.procs
mount -t bpf bpf /sys/fs/bpf
hostname "$2"
mount --bind "$dir/etc" /etc
mount --bind "$dir/var-lib" /var/lib
mount --bind "$dir/run" /run
: >/run/lab.ready
while :; do
	sleep infinity &
	wait $!
done
