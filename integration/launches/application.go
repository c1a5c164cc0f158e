package launches

import (
	"embed"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"cloudlet/integration/appguest"
	"cloudlet/integration/product"
)

// files are what the guests get besides packages, a folder for each application.
//
//go:embed files
var files embed.FS

// Application is something to install in the base.
type Application struct {
	Name  string // of its folder of files, and of its overlay
	About string // one line for people

	packages []string // of Debian
	steps    func(address string) []appguest.Step
}

// Applications returns all applications.
func Applications() []Application { return []Application{database(), node()} }

// Find returns the applications of these names, or all of them where there are none.
func Find(names []string) ([]Application, error) {
	all := Applications()
	if len(names) == 0 {
		return all, nil
	}
	var found []Application
	for _, name := range names {
		i := slices.IndexFunc(all, func(a Application) bool { return a.Name == name })
		if i < 0 {
			var known []string
			for _, a := range all {
				known = append(known, a.Name)
			}
			return nil, fmt.Errorf("find application %q: there are %s", name, strings.Join(known, ", "))
		}
		found = append(found, all[i])
	}
	return found, nil
}

// folder is where the application's files are in the guest.
func (a Application) folder() string { return "/opt/" + a.Name }

// allSteps are what a user would type, with the host's server at address.
func (a Application) allSteps(address string, now time.Time) []appguest.Step {
	fetch := []string{"cd / && mkdir -p " + a.folder()}
	for _, name := range a.fileNames() {
		fetch = append(fetch, appguest.Fetch(address, name, a.folder()+"/"+name))
	}
	// Also those who serve are to read them.
	fetch = append(fetch, "chmod -R a+rX "+a.folder())
	s := []appguest.Step{
		appguest.SetClock(now),
		appguest.FetchIndex(address),
		appguest.InstallPackages(a.packages),
		{Title: "fetch the application's files", Lines: fetch},
	}
	s = append(s, a.steps(address)...)
	return append(s, appguest.Step{Title: "tidy up", Lines: []string{
		"apt-get clean; sync; fstrim /",
		"systemctl is-system-running --wait",
	}})
}

func (a Application) fileNames() (names []string) {
	list, err := files.ReadDir("files/" + a.Name)
	if err != nil {
		panic(err) // it is embedded
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func (a Application) handler() (http.Handler, error) {
	sub, err := fs.Sub(files, "files/"+a.Name)
	if err != nil {
		return nil, err
	}
	return http.FileServerFS(sub), nil
}

// key names the launch VM that is made of the application on a base: it changes with both,
// with the packages in the file list, and with how it is encoded.
func (a Application) key(base, list, strategy string) (string, error) {
	packages, err := os.ReadFile(list)
	if err != nil {
		return "", fmt.Errorf("read package list: %w", err)
	}
	steps := a.allSteps("", time.Time{})
	return product.Key(files, "files/"+a.Name, fmt.Sprint(base, string(packages), steps, strategy))
}
