// Package appguest makes a real guest for the main job: Debian 12 with systemd on a 2 GiB
// ext4 disk, from Debian packages only, and turns a running instance of it into a launch VM
// the way a user would: by installing an application inside.
//
// Build makes kernel, initial file system and disk once and keeps them, with the list of
// packages and an apt repository of those that are to be installed later. It needs root,
// because Debian is installed into a folder by its own tools, in a mount name space of its
// own. A product appears whole or not at all; packages that were downloaded stay when a
// mirror goes away half way. An existing product is not renewed because Debian has newer
// packages: remove the folder for that.
//
// The guest's machine: x86-64, MemoryMiB of memory, a virtio disk, a virtio network card on
// QEMU's user network (10.0.2.15), the first serial port as console with root logged in,
// Append as the kernel's command line. Once it has booted and is at rest, the console shows
// Ready. Nothing wakes it on its own: no timers, no logs on disk.
//
// Customise works over that console, and serves the packages from this host's loopback
// interface, which the guest sees as 10.0.2.2. It installs python3-flask, redis-server and
// nginx, loads redis with Keys keys and starts the application behind nginx on Port:
//
//	GET /?window=N  token, counter, SHA-256 of window N of a table in the application's memory
//	GET /verify     SHA-256 of the whole table, of all keys in redis, of a file read from disk
//	GET /healthz    "ok"
//
// The token is drawn when the application starts; every answer compares it with redis and
// counts in redis. WindowHash, TableHash, KeysHash and FileHash compute on the host what
// the guest must answer.
//
// Other applications are installed in the same base the same way: BuildMore makes the apt
// repository of what one needs, Install does its steps at the console. The functions are
// safe for concurrent use; a Console is not.
package appguest
