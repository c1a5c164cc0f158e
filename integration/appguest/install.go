package appguest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// Installation is what Install does in a guest.
type Installation struct {
	Repo  string       // folder that is an apt repository; the guest finds it below /repo/
	Files http.Handler // of what else the guest fetches, below /launch/
	// Steps are done one after another. The host's server is at address, as the guest sees it.
	Steps func(address string, now time.Time) []Step
}

// Step is a part of an installation: lines of shell that are typed at the console.
type Step struct {
	Title string
	Lines []string
}

// Install does the steps of an installation in a running instance of the base whose serial
// console is the unix socket, and writes what it does, and what the guest prints, to log,
// which may be nil. After an error the instance is of no further use.
func Install(ctx context.Context, serialSocket string, in Installation, log io.Writer) (err error) {
	if log == nil {
		log = io.Discard
	}
	address, stop, err := in.serve(ctx)
	if err != nil {
		return fmt.Errorf("customise guest: %w", err)
	}
	defer func() { err = errors.Join(err, stop()) }()
	c, err := OpenConsole(ctx, serialSocket)
	if err != nil {
		return fmt.Errorf("customise guest: %w", err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	begin := time.Now()
	for _, s := range in.Steps(address, time.Now()) {
		fmt.Fprintf(log, "customise: %5.1f s: %s\n", time.Since(begin).Seconds(), s.Title)
		for _, line := range s.Lines {
			if err := c.Run(ctx, line, indent{log}); err != nil {
				return fmt.Errorf("customise guest: %s: %w", s.Title, err)
			}
		}
	}
	fmt.Fprintf(log, "customise: %5.1f s: the application is ready\n", time.Since(begin).Seconds())
	return nil
}

// indent sets what the guest prints off from what Install says.
type indent struct{ w io.Writer }

func (i indent) Write(p []byte) (int, error) {
	if _, err := fmt.Fprintf(i.w, "    %s", p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// serve offers the repository and the files over HTTP on a loopback port, until stop is
// called. The address is the one that the guest uses.
func (in Installation) serve(ctx context.Context) (address string, stop func() error, err error) {
	if info, err := os.Stat(in.Repo); err != nil || !info.IsDir() {
		return "", nil, errors.Join(fmt.Errorf("find package repository %s: no such folder (remedy: build the guest again)", in.Repo), err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /repo/", http.StripPrefix("/repo/", http.FileServer(http.Dir(in.Repo))))
	mux.Handle("GET /launch/", http.StripPrefix("/launch", in.Files))
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, fmt.Errorf("serve packages: %w", err)
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	stop = func() error {
		err := server.Close()
		if serr := <-done; !errors.Is(serr, http.ErrServerClosed) {
			err = errors.Join(err, serr)
		}
		return err
	}
	return fmt.Sprintf("10.0.2.2:%d", l.Addr().(*net.TCPAddr).Port), stop, nil
}

// SetClock is the first step: a resumed guest's clock stands at the capture of its base.
func SetClock(now time.Time) Step {
	return Step{"set the clock", []string{fmt.Sprintf("date -u -s @%d >/dev/null", now.Unix())}}
}

// FetchIndex makes the host's repository the guest's only source of packages.
func FetchIndex(address string) Step {
	return Step{"fetch the package index from the host", []string{
		"echo 'deb [trusted=yes] http://" + address + "/repo ./' >/etc/apt/sources.list",
		"apt-get -q update",
	}}
}

// InstallPackages installs Debian packages of the host's repository.
func InstallPackages(packages []string) Step {
	return Step{"install " + strings.Join(packages, ", "), []string{
		"DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends " + strings.Join(packages, " "),
	}}
}

// Fetch is a line that copies one of the installation's files to a path in the guest.
func Fetch(address, name, to string) string {
	return fmt.Sprintf("/usr/lib/apt/apt-helper -q -o APT::Sandbox::User=root download-file http://%s/launch/%s %s >/dev/null", address, name, to)
}
