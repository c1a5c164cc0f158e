// Package guest builds the test guest of the end-to-end tests: Debian's cloud kernel, an
// initial file system with busybox and one application, and a small ext4 disk. It boots
// under emulation in seconds and needs neither root nor a mount to be built.
//
// Build takes the kernel and busybox from the Debian packages of the host's apt sources,
// compiles the application (integration/guest/app) with the go command, and keeps the
// result under a key of everything that goes into it apart from the package versions: a
// second call finds it in milliseconds, and an existing product is not renewed because
// Debian has newer packages. Remove the folder for that. Products appear by one rename, so
// an interrupted Build leaves none; concurrent calls, also of several processes, wait for
// each other. The product's files are templates: copy Disk before a machine writes to it.
//
// The guest's machine: x86-64, MemoryMiB of memory, a virtio disk, a virtio network card
// on QEMU's user network (10.0.2.15, application on port 8080), the first serial port as
// console, Append as the kernel's command line. What the application answers is said in
// its own documentation, and computed on the host by package table. When it listens, the
// console shows a line "guest: ready TOKEN". A reset boots again and draws a new token.
package guest
