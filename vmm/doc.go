// Package vmm starts, stops, captures and resumes virtual machines in QEMU, which it starts
// itself or lets libvirt start.
//
// A VM lives in a folder of its own: its monitor and console sockets, its serial log, the
// writable top layer of its disk, and what is known about its process. Everything needed
// to find it again is in that folder, so any process may Adopt a VM at any time, and a VM
// outlives the process that started it.
//
// # Launcher
//
// QEMU is the child of a launcher: the program's own binary run again with the folder as
// argument (RunLauncher is the body). The launcher installs a
// filter by which some of QEMU's system calls do nothing (filterQEMU): advice that would make
// the kernel read much of a lazily served memory file, and holes in that file. It stays QEMU's parent and records how QEMU ended. Killing the
// launcher does not harm QEMU; then only the exit status is lost.
//
// # Libvirt
//
// A VM of Libvirt is a transient domain; what has started a VM stands in its folder, and whoever
// adopts it drives it by that. Captures, rounds and disk layers are the same code for both: what
// differs is small (driver). The guest sees the same machine, to the addresses of its devices,
// so bases and states go both ways.
//
// A resume is a restore of a save image that is assembled here: the domain's XML, then the
// device state without the traces of x-ignore-shared, of which libvirt's QEMU is not told. The
// stream holds no page of the guest's memory; that is our file, by an option for QEMU itself.
// The restored domain is paused: only when /proc/PID/maps shows our file does it run.
//
// The emulator is this program by another name (RunEmulator): it installs the launcher's filter
// and becomes QEMU in the same process. The monitor is libvirt's, which passes our commands on,
// one client at a time by a lock in the VM's folder, and follows QEMU's events: it knows of
// pauses and ends. Layers come and go in QEMU only, under the one that libvirt knows, so its
// list of disks and its return after a restart stay right. Libvirt's own verbs start and end
// VMs. How one ended is read from its log, since no parent of ours is there to see it.
//
// Where QEMU is another user, files of the VM are given to it, and folders on the way to them
// let its group pass, as far as they are below Libvirt.Dir. Libvirt is told to change no owners.
// A process of that user looks before the start whether everything can be opened.
//
// Libvirt's calls cannot be interrupted: when a context ends its caller goes on, and the call
// by itself; QEMU.Close waits for it, but not for ever.
//
// # Memory
//
// A booted VM has its RAM in a shared file, so that SaveBase only has to save the device
// state. A resumed VM maps the memory file privately: the file never changes and may be
// shared between many VMs; what the guest changes are anonymous pages of the QEMU process,
// and exactly those are captured.
//
// What a guest does not use any more is changed memory like any other: after an installation
// much of it, and hardly compressible. DropFree finds it by the guest's balloon. QEMU forgets
// each page that the guest gives up; the page is the image's again, and as good as new to the
// guest when it gets it back.
//
// # Capture and rounds
//
// A Residue is what a VM has changed: of memory, of its disk and, where the VM stood still,
// its device state. Capture takes one of everything since the VM was resumed. Rounds takes
// several, while the VM runs, and a last one of the paused VM. Laid in order over the images
// that the VM was resumed from, they are the paused VM's memory and disk, byte for byte; a
// single one is no moment of the VM: pages may be torn, and disk and memory differ in time.
//
// Memory. What the guest has changed are anonymous pages of QEMU. Which of them have changed
// since the round before is found by one of two trackers. Where the kernel keeps soft-dirty
// bits, the VM is stopped while the bits are read and cleared, for some milliseconds, and
// the pages are copied while it runs. Elsewhere all anonymous pages are copied and those
// kept whose sum differs from that of the bytes copied last; that needs no stop. Both take
// up again a page that was copied before and is no longer anonymous: its changes were
// discarded. A page that was copied while the guest wrote to it is found by a later round,
// since its bit is set after the clearing, or its sum is that of the torn bytes.
//
// Disk. Each round puts a new layer on top of the one the VM writes to, which is thereby
// frozen, and reads the frozen one: exactly what was written since the round before. The map
// of a layer in use is stale and is never read. Once a residue is released, its layer is
// committed into the VM's top layer and removed, oldest first; so while each residue is
// released before the next is taken there are two layers, or three with the one prepared
// for the next round. Only a layer with many discards waits for Close, whose merge keeps
// them as such.
//
// The last round: save the device state, then copy the pages that differ while the disk
// layer is frozen and read. Capture: stop (QEMU flushes its disk), the same, continue. QEMU
// writes the device state without the firmware's RAM; the beginning of the state that the VM
// was resumed from is put in front of it, which gives an ordinary state.
//
// Failures. A round that fails, or whose context ends, commits back what it has frozen and
// leaves the tracker as it was: the next round takes all of it. A VM that was stopped by the
// package is continued, one that was paused by the caller never is. After a killed process
// the layers are merged by the next Capture, Rounds or Merge of any process, and a VM that it
// had stopped runs again once it is adopted.
//
// # Identity and signals
//
// A process is known by pid, start time and boot id. Signals go through a pidfd whose
// start time was checked after it was opened, never to a number.
//
// # Concurrency
//
// QEMU, Libvirt, VM, Rounds and Residue are safe for concurrent use. The monitor serves one client at
// a time: operations connect, work and leave; a second one waits, bounded by its context.
// One Residue of Capture or one Rounds of a VM exists at a time, in all processes together;
// Release or Close ends it. Rounds of a VM run one after the other, and Release waits for
// one under way.
//
// The package refuses machine configurations it does not know by name: no field of a
// Machine can carry an option into QEMU's command line.
package vmm
