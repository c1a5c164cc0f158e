package main

import (
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// notifier tells the service manager how the daemon is: systemd's sd_notify(3).
type notifier struct {
	socket string // "" tells nobody
	log    *slog.Logger
}

func (n *notifier) tell(state string) {
	if n.socket == "" {
		return
	}
	name := n.socket
	if strings.HasPrefix(name, "@") {
		name = "\x00" + name[1:] // an abstract socket
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err == nil {
		_, err = c.Write([]byte(state))
		c.Close() // nothing is buffered
	}
	if err != nil {
		n.log.Warn("tell the service manager", "problem", err)
	}
}

// beat tells the service manager's watchdog twice in each of its periods that the handler
// answers, until the function that it returns is called.
func (n *notifier) beat(usec, pid string, h http.Handler) (stop func()) {
	period, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || period <= 0 || n.socket == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return func() {}
	}
	done := make(chan struct{})
	var beating sync.WaitGroup
	beating.Go(func() {
		tick := time.NewTicker(time.Duration(period) * time.Microsecond / 2)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if answers(h) {
					n.tell("WATCHDOG=1")
				}
			case <-done:
				return
			}
		}
	})
	return sync.OnceFunc(func() { close(done); beating.Wait() })
}

// answers asks the handler whether it is well.
func answers(h http.Handler) bool {
	r, err := http.NewRequest(http.MethodGet, "http://this.process/healthz", nil)
	if err != nil {
		return false
	}
	w := &statusWriter{header: http.Header{}}
	h.ServeHTTP(w, r)
	return w.status == http.StatusOK
}

// statusWriter keeps the status of an answer.
type statusWriter struct {
	header http.Header
	status int
}

func (w *statusWriter) Header() http.Header { return w.header }

func (w *statusWriter) WriteHeader(status int) { w.status = status }

func (w *statusWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return len(p), nil
}
