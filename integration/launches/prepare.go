package launches

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cloudlet/api"
	"cloudlet/integration/appguest"
	"cloudlet/integration/demoguest"
	"cloudlet/overlay"
)

// port is where the applications answer.
const port = 80

// Prepared is what is kept of an application's launch VM: what the demo keeps of its own,
// and what the application said before it was captured.
type Prepared struct {
	demoguest.Prepared
	Counter int    `json:"counter"`
	Data    string `json:"data"` // hash
}

// preparedFile appears once all is made and verified.
const preparedFile = "prepared.json"

// Prepare makes the overlay of an application on the lab's base, or finds it made, verifies
// an instance of it that was made now, and keeps in dir what it has made: prepared.json, the
// application's packages, and state, a link to the lab's store. After an error nothing but
// the packages is kept.
func Prepare(ctx context.Context, l *demoguest.Lab, a Application, dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("prepare %s in %s: %w", a.Name, dir, err)
		}
	}()
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	if err := l.Cloudlet(ctx, nil, "base", "show", l.Made.Base); err != nil {
		return err
	}
	l.Say("%s: %s", a.Name, a.About)
	more := appguest.More{Title: a.Name + " packages", Dir: dir, Packages: a.packages}
	repo, list, err := appguest.BuildMore(ctx, l.Guest, more, os.Stdout)
	if err != nil {
		return err
	}
	strategy, err := overlay.ParseStrategy("")
	if err != nil {
		return err
	}
	key, err := a.key(l.Made.Base, list, fmt.Sprintf("%+v", strategy))
	if err != nil {
		return err
	}
	p, err := found(ctx, l, dir, key)
	if err != nil {
		return err
	}
	if p.Overlay != "" {
		l.Say("%s: %.12s, made before", a.Name, p.Overlay)
		return nil
	}
	if err := forget(ctx, l, a, dir); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, forget(context.WithoutCancel(ctx), l, a, dir))
		}
	}()
	p = Prepared{Prepared: demoguest.Prepared{Launch: key, Base: l.Made.Base}}
	if err := makeLaunch(ctx, l, a, repo, &p); err != nil {
		return err
	}
	if err := verify(ctx, l, a, p); err != nil {
		return err
	}
	return save(l, dir, p)
}

// found returns what an earlier call has kept, if it is of the key and its overlay is still
// in the store.
func found(ctx context.Context, l *demoguest.Lab, dir, key string) (Prepared, error) {
	p, err := read(dir)
	if err != nil || p.Launch != key || p.Overlay == "" {
		return Prepared{}, err
	}
	o, err := overlays(ctx, l)
	if err != nil || !slices.ContainsFunc(o, func(o api.Overlay) bool { return o.ID == p.Overlay && o.Problem == "" }) {
		return Prepared{}, err
	}
	return p, nil
}

// read returns what is kept in dir; nothing where there is nothing that can be read.
func read(dir string) (p Prepared, err error) {
	b, err := os.ReadFile(filepath.Join(dir, preparedFile))
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	if json.Unmarshal(b, &p) != nil {
		return Prepared{}, nil
	}
	return p, nil
}

func overlays(ctx context.Context, l *demoguest.Lab) ([]api.Overlay, error) {
	var list []api.Overlay
	err := l.Cloudlet(ctx, &list, "overlay", "list")
	return list, err
}

// forget removes what earlier calls have made of the application, whole or not.
func forget(ctx context.Context, l *demoguest.Lab, a Application, dir string) error {
	for _, name := range []string{preparedFile, "state"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	list, err := overlays(ctx, l)
	for _, o := range list {
		if o.Name == a.Name {
			err = errors.Join(err, l.Cloudlet(ctx, nil, "overlay", "rm", o.ID))
		}
	}
	return err
}

func makeLaunch(ctx context.Context, l *demoguest.Lab, a Application, repo string, p *Prepared) error {
	l.Say("%s: resume the base, install the application in it", a.Name)
	files, err := a.handler()
	if err != nil {
		return err
	}
	made, err := l.MakeOverlay(ctx, demoguest.Launch{
		Name: a.Name, Port: port,
		Customise: func(ctx context.Context, serialSocket string) error {
			return appguest.Install(ctx, serialSocket, appguest.Installation{Repo: repo, Files: files, Steps: a.allSteps}, os.Stdout)
		},
		Check: func(ctx context.Context, address string) error {
			_, v, err := ask(ctx, address)
			if err != nil {
				return err
			}
			return p.keep(v)
		},
	})
	if err != nil {
		return err
	}
	p.Overlay = made.ID
	profiled, err := l.Profile(ctx, made.ID, fmt.Sprintf("%d/", port))
	if err != nil {
		return err
	}
	p.Profiled, p.Size = true, profiled.Size
	var stats overlay.Stats
	if err := json.Unmarshal(profiled.Stats, &stats); err != nil {
		return err
	}
	l.Say("%s: %d pages of memory and %d of disk differ from the base", a.Name, stats.Memory.Modified, stats.Disk.Modified)
	return nil
}

// ask waits for the first answer and asks for the hash of all data.
func ask(ctx context.Context, address string) (a Answer, v Verification, err error) {
	if err := demoguest.Await(ctx, address, "/", &a); err != nil {
		return a, v, err
	}
	return a, v, demoguest.Ask(ctx, address, "/verify", &v)
}

// verify synthesises an instance and compares what it says with what was kept.
func verify(ctx context.Context, l *demoguest.Lab, a Application, p Prepared) (err error) {
	l.Say("%s: verify an instance that is synthesised from the overlay", a.Name)
	begin := time.Now()
	var in api.Instance
	if err := l.Cloudlet(ctx, &in, "run", p.Overlay, "--probe", fmt.Sprintf("%d/", port)); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.Cloudlet(context.WithoutCancel(ctx), nil, "rm", "--force", in.ID))
	}()
	first := time.Since(begin)
	answer, v, err := ask(ctx, in.Endpoints[0].Address)
	if err != nil {
		return err
	}
	if err := p.check(answer, v); err != nil {
		return err
	}
	l.Say("%s: the first answer after %.2f s; all data as at the capture", a.Name, first.Seconds())
	return nil
}

// save makes the link to the store, and at last the file that says that all is there.
func save(l *demoguest.Lab, dir string, p Prepared) error {
	store, err := filepath.Rel(dir, l.Path("state"))
	if err != nil {
		return err
	}
	if err := os.Symlink(store, filepath.Join(dir, "state")); err != nil {
		return err
	}
	b, err := json.MarshalIndent(p, "", " ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, preparedFile+".new")
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, preparedFile))
}
