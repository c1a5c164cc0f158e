// Package fusefs serves one launch image as a flat directory of three files: memory, disk
// and info.json.
//
// # Rules
//
//   - Content never changes. The mount is not read-only, because QEMU opens its memory file
//     for reading and writing: such opens succeed, every change answers EROFS. Pages are kept
//     in the kernel's cache and shared by all who open or map a file.
//   - A failed read of disk is answered at once with an errno; QEMU then pauses its VM. A
//     failed read of memory is never answered by itself, since the answer would be a SIGBUS
//     that kills the guest: it is held, and shown by Stats, until the process that waits for
//     it is killed (EINTR) or an operator calls Abort (EIO). Reads that fail are never
//     repeated here; that is the business of the File.
//   - Only a deadly signal interrupts a read, as with a file on a local disk. The kernel
//     reports every signal, and an answer of EINTR to a page fault can be a SIGBUS, so the
//     server looks whether the waiting thread has a SIGKILL pending before it gives up a
//     read. For a thread it cannot see (another PID namespace) only Abort does.
//   - The kernel may read ahead on behalf of a process. Such a read has nobody to interrupt
//     it: it stays held after that process was killed, until Abort or the unmount.
//   - The serving process never opens, maps or stats files of its own mount.
//
// # Who may look
//
// Permissions are not checked by the kernel: without AllowOther only the mounting user
// reaches the files, with it everybody who reaches the directory. The mode bits say so.
//
// All methods of Server and Control are safe for concurrent use.
package fusefs
