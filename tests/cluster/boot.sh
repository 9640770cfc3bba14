#!/bin/bash
# PID 1 of a host of tests/cluster/hosts.py: sees this machine's files read-only, and owns what it may write.
#   boot.sh NAME ADDRESS HOME FOLDER...     FOLDERs that the private mounts would hide are shown again, read-only
set -euo pipefail
name=$1 address=$2 home=$3
shift 3
hostname "$name"
mount --make-rprivate /
mount -t tmpfs -o mode=755 run /run
kept=0
for folder in "$@"; do
    kept=$((kept + 1))
    mkdir -p "/run/keep/$kept"
    mount --bind "$folder" "/run/keep/$kept"
done
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=1777 tmp /var/tmp
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=700 home "$home"
number=0
for folder in "$@"; do
    number=$((number + 1))
    mkdir -p "$folder"
    mount --bind "/run/keep/$number" "$folder"
    umount "/run/keep/$number"
done
# No name server is reachable from here; a host knows its own name, and any other question is answered at once.
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" >/run/hosts
: >/run/resolv.conf
mount --bind /run/hosts /etc/hosts
mount --bind /run/resolv.conf /etc/resolv.conf
while read -r _ _ _ _ point _; do
    case $point in
        /proc* | /dev/pts | /dev/shm | /run | /tmp | /var/tmp | "$home") ;;
        *) mount -o remount,bind,ro "$point" ;;
    esac
done < <(cat /proc/self/mountinfo)
touch /run/booted
# bash takes in the children of processes that die; a zombie would look alive to Ray.
while :; do
    sleep 600 &
    wait $! || true
done
