#!/bin/busybox sh
# First process of the test guest: devices, network, disk, then the application for ever.
# The builder lists the modules in dependency order in /modules/order.
export PATH=/bin
bb=/bin/busybox

$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev

while read -r module; do
	$bb insmod "/modules/$module" || echo "guest: cannot load $module"
done </modules/order

$bb ip link set lo up
$bb ip addr add 10.0.2.15/24 dev eth0
$bb ip link set eth0 up
$bb ip route add default via 10.0.2.2

if ! $bb mount -t ext4 -o noatime /dev/vda /data; then
	echo "guest: cannot mount /dev/vda: the machine needs a virtio-blk disk with ext4 on it"
	$bb poweroff -f
fi

while :; do
	/bin/app
	echo "guest: the application ended with status $?, starting it again"
	$bb sleep 1
done
