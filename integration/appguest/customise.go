package appguest

import (
	"bytes"
	"context"
	"embed"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
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
func Customise(ctx context.Context, serialSocket string, g Guest, log io.Writer) error {
	files, err := launchFiles()
	if err != nil {
		return fmt.Errorf("customise guest: %w", err)
	}
	return Install(ctx, serialSocket, Installation{Repo: g.Repo, Files: files, Steps: steps}, log)
}

// steps are what a user would type, with the host's server at address.
func steps(address string, now time.Time) []Step {
	return []Step{
		SetClock(now),
		FetchIndex(address),
		InstallPackages(launchPackages),
		{fmt.Sprintf("load redis with %d keys", Keys), []string{
			Fetch(address, "items", "/tmp/items"),
			"redis-cli --pipe </tmp/items && redis-cli save",
			// From here on it would write to the disk only because time has passed.
			"redis-cli config set save '' && redis-cli config rewrite",
		}},
		{"start the application behind nginx", []string{
			Fetch(address, "app.py", "/opt/app.py"),
			Fetch(address, "app.service", "/etc/systemd/system/app.service"),
			Fetch(address, "nginx.conf", "/etc/nginx/sites-available/default"),
			"systemctl enable --now app.service",
			"systemctl restart nginx.service",
		}},
		{"tidy up", []string{
			"rm /tmp/items; apt-get clean; sync; fstrim /",
			"systemctl is-system-running --wait",
		}},
	}
}

// launchFiles serves the files of launch, and redis's keys.
func launchFiles() (http.Handler, error) {
	files, err := fs.Sub(launch, "launch")
	if err != nil {
		return nil, err
	}
	var items bytes.Buffer
	if err := writeItems(&items); err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServerFS(files))
	mux.HandleFunc("GET /items", func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "items", time.Time{}, bytes.NewReader(items.Bytes()))
	})
	return mux, nil
}
