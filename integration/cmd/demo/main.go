// Command demo does the main job on the test guest with the program under test, measures it
// against its alternatives on the same host, and prints a table.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	d := &demo{}
	flag.StringVar(&d.program, "cloudlet", "build/cloudlet", "the program")
	flag.StringVar(&d.guestDir, "guest", "build/guest", "folder of the test guest")
	flag.StringVar(&d.dir, "dir", "build/demo", "folder to work in; it is emptied")
	flag.StringVar(&d.out, "o", "build/demo.json", "file for the results")
	flag.IntVar(&d.rounds, "rounds", 5, "rounds of measuring, every way once in each")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := d.run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// write keeps the results for programs.
func (d *demo) write(r any) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(d.out), 0o755); err != nil {
		return err
	}
	return os.WriteFile(d.out, append(b, '\n'), 0o644)
}
