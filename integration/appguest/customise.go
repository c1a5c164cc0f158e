package appguest

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"cloudlet/integration/product"
)

// launch is what the guest gets besides packages.
//
//go:embed launch
var launch embed.FS

// LaunchKey names what Customise makes of a base of g: it changes when the guest, the
// application, the packages or the way they are installed change.
func LaunchKey(g Guest) (string, error) {
	packages, err := os.ReadFile(g.Packages)
	if err != nil {
		return "", fmt.Errorf("read package list: %w", err)
	}
	key, err := product.Key(launch, ".", "")
	if err != nil {
		return "", err
	}
	base, err := product.Key(recipe, ".", "")
	if err != nil {
		return "", err
	}
	return hashText(fmt.Sprint(Append, MemoryMiB, base, key, steps("", time.Time{}), KeysHash(), string(packages))), nil
}

// Customise installs and starts the application in a running instance of the base whose
// serial console is the unix socket, and returns when the application is ready for
// requests. It writes what it does, and what the guest prints, to log, which may be nil.
// After an error the instance is of no further use: remove it and start another.
func Customise(ctx context.Context, serialSocket string, g Guest, log io.Writer) (err error) {
	if log == nil {
		log = io.Discard
	}
	address, stop, err := serve(ctx, g)
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
	for _, s := range steps(address, time.Now()) {
		fmt.Fprintf(log, "customise: %5.1f s: %s\n", time.Since(begin).Seconds(), s.title)
		for _, line := range s.lines {
			if err := c.Run(ctx, line, indent{log}); err != nil {
				return fmt.Errorf("customise guest: %s: %w", s.title, err)
			}
		}
	}
	fmt.Fprintf(log, "customise: %5.1f s: the application is ready\n", time.Since(begin).Seconds())
	return nil
}

// indent sets what the guest prints off from what Customise says.
type indent struct{ w io.Writer }

func (i indent) Write(p []byte) (int, error) {
	if _, err := fmt.Fprintf(i.w, "    %s", p); err != nil {
		return 0, err
	}
	return len(p), nil
}

type step struct {
	title string
	lines []string
}

// steps are what a user would type, with the host's repository at address.
func steps(address string, now time.Time) []step {
	url := "http://" + address
	fetch := func(name, to string) string {
		return fmt.Sprintf("/usr/lib/apt/apt-helper -q -o APT::Sandbox::User=root download-file %s/launch/%s %s >/dev/null", url, name, to)
	}
	return []step{
		// A resumed guest's clock stands at the capture of its base.
		{"set the clock", []string{fmt.Sprintf("date -u -s @%d >/dev/null", now.Unix())}},
		{"fetch the package index from the host", []string{
			"echo 'deb [trusted=yes] " + url + "/repo ./' >/etc/apt/sources.list",
			"apt-get -q update",
		}},
		{"install " + strings.Join(launchPackages, ", "), []string{
			"DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 install --no-install-recommends " + strings.Join(launchPackages, " "),
		}},
		{fmt.Sprintf("load redis with %d keys", Keys), []string{
			fetch("items", "/tmp/items"),
			"redis-cli --pipe </tmp/items && redis-cli save",
			// From here on it would write to the disk only because time has passed.
			"redis-cli config set save '' && redis-cli config rewrite",
		}},
		{"start the application behind nginx", []string{
			fetch("app.py", "/opt/app.py"),
			fetch("app.service", "/etc/systemd/system/app.service"),
			fetch("nginx.conf", "/etc/nginx/sites-available/default"),
			"systemctl enable --now app.service",
			"systemctl restart nginx.service",
		}},
		{"tidy up", []string{
			"rm /tmp/items; apt-get clean; sync; fstrim /",
			"systemctl is-system-running --wait",
		}},
	}
}

// serve offers the repository and the launch files over HTTP on a loopback port, until stop
// is called. The address is the one that the guest uses.
func serve(ctx context.Context, g Guest) (address string, stop func() error, err error) {
	if info, err := os.Stat(g.Repo); err != nil || !info.IsDir() {
		return "", nil, errors.Join(fmt.Errorf("find package repository %s: no such folder (remedy: build the guest again)", g.Repo), err)
	}
	files, err := fs.Sub(launch, "launch")
	if err != nil {
		return "", nil, err
	}
	var items bytes.Buffer
	if err := writeItems(&items); err != nil {
		return "", nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /repo/", http.StripPrefix("/repo/", http.FileServer(http.Dir(g.Repo))))
	mux.Handle("GET /launch/", http.StripPrefix("/launch/", http.FileServerFS(files)))
	mux.HandleFunc("GET /launch/items", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "items", time.Time{}, bytes.NewReader(items.Bytes()))
	})
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
