package main

import (
	"context"
	"io"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/spf13/cobra"
)

func newDoctor(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Check whether this host can run instances, and say what to do", Args: args(0),
		Long: `Checks what instances need on this host, by doing it: mounts a page and reads it, and runs a
VM that has only its firmware. Ends with 6 if anything is missing.`,
		RunE: env.withStore(func(ctx context.Context, s *service.Service, _ []string) error {
			list := s.Doctor(ctx)
			if err := ctx.Err(); err != nil {
				return err
			}
			bad := 0
			err := env.print(list, func(w io.Writer) {
				rows := [][]string{}
				for _, c := range list {
					mark := "ok"
					if !c.OK {
						mark = "MISSING"
					}
					rows = append(rows, []string{mark, c.Name, c.Detail})
					if c.Remedy != "" {
						rows = append(rows, []string{"", "", "remedy: " + c.Remedy})
					}
				}
				table(w, rows)
			})
			for _, c := range list {
				if !c.OK {
					bad++
				}
			}
			if err == nil && bad > 0 {
				err = api.Errorf(api.Unavailable, "this host lacks %d of %d things", bad, len(list)).Fix("see above")
			}
			return err
		}),
	}
}
