#!/bin/sh
# First process of a container of the stand-in: its own /proc and /dev, then the command, once its network is there.
# Arguments: the container's root, its host name, the command.
set -eu
root=$1
hostname "$2"
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
for device in null zero full random urandom tty; do
	: >"$root/dev/$device"
	mount --bind "/dev/$device" "$root/dev/$device"
done
# The other end is opened when the network is ready.
read -r _ <"$root.go"
exec chroot "$root" "$@"
