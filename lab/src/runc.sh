#!/bin/sh
# An OCI runtime that names a container's cgroup docker-<id>.scope, as the systemd driver of ECS hosts does.
previous=
bundle=
for argument in "$@"; do
	[ "$previous" = --bundle ] && bundle=$argument
	previous=$argument
done
if [ -n "$bundle" ] && [ -f "$bundle/config.json" ]; then
	sed -i -E 's#("cgroupsPath":"[^"]*/)([0-9a-f]{64})"#\1docker-\2.scope"#' "$bundle/config.json"
fi
exec runc "$@"
