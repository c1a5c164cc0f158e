// Package vmm starts, stops, captures and resumes virtual machines in QEMU.
//
// A VM lives in a folder of its own: its monitor and console sockets, its serial log, the
// writable top layer of its disk, and what is known about its process. Everything needed
// to find it again is in that folder, so any process may Adopt a VM at any time, and a VM
// outlives the process that started it.
//
// # Launcher
//
// QEMU is the child of a launcher: the program's own binary run again with the folder as
// argument (RunLauncher is the body). The launcher makes madvise(MADV_HUGEPAGE) fail in
// QEMU, since huge-page advice makes the kernel read 4 MiB around every first touch of a
// lazily served memory file. It stays QEMU's parent and records how QEMU ended. Killing the
// launcher does not harm QEMU; then only the exit status is lost.
//
// # Memory
//
// A booted VM has its RAM in a shared file, so that SaveBase only has to save the device
// state. A resumed VM maps the memory file privately: the file never changes and may be
// shared between many VMs; what the guest changes are anonymous pages of the QEMU process,
// and Capture reads exactly those.
//
// # Capture
//
// The order is: stop (QEMU flushes its disk), save the device state, copy the changed
// pages, freeze the disk layer, continue. Changed disk blocks are read from the frozen
// layer only; the map of a layer in use is stale. QEMU writes the device state without the
// firmware's RAM; Capture puts the beginning of the state the VM was resumed from in front
// of it, which gives an ordinary state.
//
// # Identity and signals
//
// A process is known by pid, start time and boot id. Signals go through a pidfd whose
// start time was checked after it was opened, never to a number.
//
// # Concurrency
//
// QEMU, VM and Residue are safe for concurrent use. The monitor serves one client at a
// time: operations connect, work and leave; a second one waits, bounded by its context.
// One Residue of a VM exists at a time; Release ends it.
//
// The package refuses machine configurations it does not know by name: no field of a
// Machine can carry an option into QEMU's command line.
package vmm
