#!/usr/bin/env bash
# pod.sh ROOT USER COMMAND...: the command as that user on the image mounted at ROOT, as a pod runs
# it: the root file system read-only, memory at /tmp, /home/ray and /dev/shm, a network of its own.
# In namespaces that end with it: unshare --mount --pid --net --fork pod.sh ...
set -euo pipefail
root=$1 user=$2
shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for folder in tmp home/ray dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$root/$folder"; done
ip link set lo up
exec "$(command -v chroot)" --userspec="$user" "$root" /usr/bin/env --chdir=/opt/ssr "$@"
