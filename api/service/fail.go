package service

import (
	"context"
	"errors"
	"io/fs"

	"cloudlet/api"
	"cloudlet/fusefs"
	"cloudlet/overlay"
	"cloudlet/overlay/source"
	"cloudlet/vmm"

	"golang.org/x/sys/unix"
)

const remedySpace = "free some disk space, or choose another state folder with --state"

// fail turns any error into an *api.Error, by what is in its chain. It is the one place
// where errors of the parts get a code and, where they bring none, a remedy.
func fail(err error) error {
	var known *api.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	out := func(code api.Code, remedy string) error {
		return &api.Error{Code: code, Detail: err.Error(), Remedy: remedy, Err: err}
	}
	var page *overlay.BasePageError
	var space *overlay.BaseSpaceError
	var mismatch *vmm.MismatchError
	var read *source.Error
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return out(api.TimedOut, "")
	case errors.Is(err, context.Canceled):
		return out(api.Cancelled, "")
	case errors.Is(err, overlay.ErrFormat), errors.As(err, &page):
		return out(api.Damaged, "")
	case errors.Is(err, overlay.ErrParent):
		return out(api.Conflict, "")
	case source.Temporary(err):
		return out(api.Unavailable, "see that the server can be reached, then try again")
	case errors.Is(err, fusefs.ErrMounted), errors.Is(err, fusefs.ErrBusy):
		return out(api.Conflict, "")
	case errors.Is(err, fusefs.ErrUnavailable), errors.Is(err, vmm.ErrNoQEMU), errors.Is(err, vmm.ErrNoLibvirt), errors.Is(err, overlay.ErrNoProgram),
		errors.As(err, &mismatch), errors.As(err, &space):
		return out(api.Unavailable, "")
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return out(api.Unavailable, remedySpace)
	case errors.Is(err, fs.ErrPermission):
		return out(api.Unavailable, "run as a user who may, or as root")
	case errors.Is(err, errLocked):
		return out(api.Conflict, "wait until it has finished, then try again")
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
		return out(api.NotFound, "")
	case errors.As(err, &read):
		return out(api.Unavailable, "")
	case errors.Is(err, vmm.ErrEnded), errors.Is(err, vmm.ErrNameTaken):
		return out(api.Conflict, "")
	}
	return out(api.Internal, "")
}

// failAs is fail, with a code for the errors that have none of their own.
func failAs(code api.Code, err error) error {
	err = fail(err)
	var e *api.Error
	if errors.As(err, &e) && e.Code == api.Internal {
		e.Code = code
	}
	return err
}

// spaceError says of an error that the store's file system is full, where it is: a QEMU whose
// files cannot grow dies of it without a word. Ask before anything is removed.
func (s *Service) spaceError(err error) error {
	var st unix.Statfs_t
	if err == nil || api.CodeOf(err) == api.Unavailable || errors.Is(err, context.Canceled) || errors.Is(err, unix.ENOSPC) || unix.Statfs(s.cfg.Dir, &st) != nil {
		return err
	}
	if int64(st.Bavail)*st.Bsize >= 1<<20 {
		return err
	}
	return api.Errorf(api.Unavailable, "%w; no space is left in %s", err, s.cfg.Dir).Fix(remedySpace)
}
