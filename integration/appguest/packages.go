package appguest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"cloudlet/integration/product"
)

const suite = "bookworm" // Debian 12

// basePackages are what the base holds, with what they depend on: Debian's essential
// system, systemd, the kernel, and apt to install the rest with.
var basePackages = []string{
	"?essential", "apt", "usr-is-merged", "systemd", "systemd-sysv", "udev", "kmod", "iproute2", "linux-image-cloud-amd64",
}

// launchPackages are what a user installs in a running guest.
var launchPackages = []string{"python3-flask", "python3-redis", "redis-server", "nginx"}

const mirrorRemedy = "check that the Debian mirror is reachable, then run the same command again: " +
	"what is downloaded is kept and the download goes on where it stopped"

// apt runs apt-get as if for an empty machine, with folders of its own below dir and
// nothing but Debian 12 as source.
type apt struct{ dir string }

// newAPT writes apt's configuration; sources are the lines of its sources.list.
func newAPT(dir, archives, sources string) (apt, error) {
	a := apt{dir: dir}
	for _, d := range []string{"lists/partial", "state", "cache"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return a, err
		}
	}
	if err := os.MkdirAll(filepath.Join(archives, "partial"), 0o755); err != nil {
		return a, err
	}
	// A file, not options: the host's own configuration (proxies) stays valid, and lists in
	// it are replaced.
	config := fmt.Sprintf(`APT::Architecture "amd64"; APT::Architectures { "amd64"; }; APT::Install-Recommends "false";
APT::Sandbox::User "root"; Acquire::Languages "none"; Acquire::Retries "2"; Acquire::http::Timeout "30";
Dir::Etc::sourcelist "%[1]s/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
Dir::State "%[1]s/state"; Dir::State::status "%[1]s/state/status"; Dir::State::lists "%[1]s/lists";
Dir::Cache "%[1]s/cache"; Dir::Cache::archives "%[2]s"; Debug::NoLocking "true";
`, dir, archives)
	return a, errors.Join(
		os.WriteFile(filepath.Join(dir, "state", "status"), nil, 0o644),
		os.WriteFile(filepath.Join(dir, "sources.list"), []byte(sources), 0o644),
		os.WriteFile(filepath.Join(dir, "apt.conf"), []byte(config), 0o644))
}

// hostSources returns the lines of a sources.list for Debian 12: the mirrors that the host
// uses for it, else Debian's own.
func hostSources(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages")
	out, err := product.Run(ctx, cmd, "the builder needs a host with apt: Debian 12")
	if err != nil {
		return "", err
	}
	return sourcesFrom(out), nil
}

// sourcesFrom makes sources of lines "ORIGIN CODENAME URI".
func sourcesFrom(targets string) string {
	uris := map[string]string{
		suite:               "http://deb.debian.org/debian/",
		suite + "-updates":  "http://deb.debian.org/debian/",
		suite + "-security": "http://deb.debian.org/debian-security/",
	}
	for line := range strings.Lines(targets) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "Debian" && uris[f[1]] != "" {
			uris[f[1]] = f[2]
		}
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(uris)) {
		fmt.Fprintf(&b, "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", uris[name], name)
	}
	return b.String()
}

func (a apt) get(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q", "-y"}, args...)...)
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "DEBIAN_FRONTEND=noninteractive")
	return product.Run(ctx, cmd, mirrorRemedy)
}

// update fetches the lists of packages.
func (a apt) update(ctx context.Context) error {
	if _, err := a.get(ctx, "update", "--error-on=any"); err != nil {
		return fmt.Errorf("fetch package lists: %w", err)
	}
	return nil
}

// download fetches what an installation of the packages takes; files that are there already
// and whole are not fetched again, others are continued.
func (a apt) download(ctx context.Context, packages []string) error {
	_, err := a.get(ctx, append([]string{"--download-only", "install"}, packages...)...)
	if err != nil {
		return fmt.Errorf("download packages: %w", err)
	}
	return nil
}

// debian is one package file that apt wants for an installation.
type debian struct {
	file string // name in the folder of archives
	size int64
}

// resolve returns what an installation of the packages on an empty machine would take.
func (a apt) resolve(ctx context.Context, packages []string) ([]debian, error) {
	// An archive that is there already is not printed: resolve with an empty folder.
	empty := filepath.Join(a.dir, "none")
	if err := os.MkdirAll(filepath.Join(empty, "partial"), 0o755); err != nil {
		return nil, err
	}
	args := append([]string{"-o", "Dir::Cache::archives=" + empty, "--print-uris", "install"}, packages...)
	out, err := a.get(ctx, args...)
	if err != nil {
		return nil, err
	}
	list := parseURIs(out)
	if len(list) == 0 {
		return nil, fmt.Errorf("resolve packages %v: apt-get names none", packages)
	}
	return list, nil
}

// parseURIs reads lines 'URI' FILE SIZE HASH.
func parseURIs(out string) []debian {
	var list []debian
	for line := range strings.Lines(out) {
		if !strings.HasPrefix(line, "'") {
			continue
		}
		var uri, hash string
		var p debian
		if n, _ := fmt.Sscan(line, &uri, &p.file, &p.size, &hash); n >= 3 && p.file == filepath.Base(p.file) {
			list = append(list, p)
		}
	}
	return list
}
