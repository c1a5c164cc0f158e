# The first login says when the machine has booted and is at rest.
if [ "$(tty)" = /dev/ttyS0 ] && mkdir /run/guest-ready 2>/dev/null; then
	systemctl is-system-running --wait
	sync
	echo "guest: ready"
fi
