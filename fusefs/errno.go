package fusefs

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// Reasons for which a read is given up before its File has answered.
var (
	errKilled  = errors.New("waiting process was killed")
	errAborted = errors.New("reads were aborted")
)

// errno is the one translation from a File's error to what the kernel is told. It never
// returns ENOSYS, which would switch the operation off for the whole mount.
func errno(err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errAborted):
		return syscall.EIO
	case errors.Is(err, errKilled), errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.Is(err, context.DeadlineExceeded):
		return syscall.ETIMEDOUT
	}
	return syscall.EIO
}

// panicError is a panic in a File, as an error.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }
