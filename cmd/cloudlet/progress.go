package main

import (
	"cloudlet/api"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progress draws a bar for each phase of a long call, on a terminal only. The caller calls
// done when the call has returned, before it prints anything.
func (env *environment) progress() (report api.Progress, done func()) {
	if !env.terminal || env.json {
		return nil, func() {}
	}
	bars := mpb.New(mpb.WithOutput(env.stderr), mpb.WithWidth(40))
	var bar *mpb.Bar
	var phase string
	var known bool // how much there is to do
	finish := func() {
		if bar != nil {
			bar.Abort(true) // also one that is not full: else Wait would wait for the rest
			bar = nil
		}
	}
	report = func(name string, n, total int64) {
		if bar == nil || name != phase || known != (total > 0) {
			finish()
			phase, known = name, total > 0
			title := mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR))
			if known {
				bar = bars.AddBar(0, title, mpb.BarRemoveOnComplete(), // with a total it could not grow
					mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f", decor.WCSyncSpace)))
			} else {
				bar = bars.New(0, mpb.SpinnerStyle(), title, mpb.BarRemoveOnComplete(),
					mpb.AppendDecorators(decor.Elapsed(decor.ET_STYLE_GO, decor.WCSyncSpace)))
			}
		}
		bar.SetTotal(total, false)
		bar.SetCurrent(n)
	}
	return report, func() {
		finish()
		bars.Wait()
	}
}
