#!/bin/sh
# Installs what building and testing need beyond Go, git and make: as root with apt-get,
# else it prints the line to run. Arguments are programs that are needed besides, each of the
# Debian package of its name.
set -eu

missing=
need() { # need PROGRAM PACKAGE
	command -v "$1" >/dev/null 2>&1 || PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
need gcc gcc
need qemu-system-x86_64 qemu-system-x86
need qemu-img qemu-utils
need fusermount3 fuse3
need mke2fs e2fsprogs
need cpio cpio
need unzip unzip
need mmdebstrap mmdebstrap
need xz xz-utils
need zstd zstd
need xdelta3 xdelta3
need ip iproute2
need curl curl
need jq jq
need openstack python3-openstackclient
need libvirtd libvirt-daemon
need virsh libvirt-clients
[ -e /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so ] || missing="$missing libvirt-daemon-driver-qemu"
for program; do need "$program" "$program"; done
[ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"

# What libvirt-daemon-system would make, whose services the tests do without.
user() {
	id libvirt-qemu >/dev/null 2>&1 && return
	if [ "$(id -u)" != 0 ]; then
		echo "run: sudo useradd --system --no-create-home libvirt-qemu"
		exit 1
	fi
	useradd --system --no-create-home libvirt-qemu
}

if [ -z "$missing" ]; then
	user
	exit 0
fi
echo "missing packages:$missing"
if [ "$(id -u)" != 0 ]; then
	echo "run: sudo apt-get update && sudo apt-get install -y --no-install-recommends$missing"
	exit 1
fi
echo "installing them with apt-get"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing
user
