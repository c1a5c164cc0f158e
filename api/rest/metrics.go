package rest

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"time"

	"cloudlet/api/service"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// collectTime bounds the reading of the service's numbers for one scrape.
const collectTime = 10 * time.Second

// measure makes the server's own registry.
func (s *server) measure() {
	s.registry = prometheus.NewRegistry()
	s.duration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "cloudlet_http_request_duration_seconds",
		Help:    "Time from the first line of a request until its answer was written, by method, route and status. Long polls and event streams have routes of their own.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
	}, []string{"method", "route", "status"})
	underWay := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "cloudlet_http_requests_under_way",
		Help: "Requests being answered now, event streams included.",
	}, func() float64 { return float64(len(s.slots) + len(s.fetches)) })
	s.registry.MustRegister(s.duration, underWay,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

// logger hands what promhttp has to say to the log.
type logger struct{ log *slog.Logger }

// Println reports one failed scrape.
func (l logger) Println(v ...any) { l.log.Error("metrics incomplete", "problem", fmt.Sprint(v...)) }

// exposeMetrics answers a scrape: the server's own numbers, and the service's as they are now.
func (s *server) exposeMetrics(w *response, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), collectTime)
	defer cancel()
	now := &numbers{readable: 1}
	var err error
	if now.m, err = s.service.Collect(ctx); err != nil {
		s.log.Error("metrics incomplete", "problem", err)
		now = &numbers{}
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(now)
	promhttp.HandlerFor(prometheus.Gatherers{s.registry, reg}, promhttp.HandlerOpts{
		ErrorLog: logger{s.log}, ErrorHandling: promhttp.ContinueOnError,
	}).ServeHTTP(w, r)
	return nil
}

// observe counts and logs a request.
func (s *server) observe(r *http.Request, w *response, who identity, label string, took time.Duration, aborted bool) {
	status := strconv.Itoa(w.status)
	if aborted {
		status = "aborted"
	}
	method := r.Method
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete:
	default:
		method = "other"
	}
	s.duration.WithLabelValues(method, label, status).Observe(took.Seconds())
	log := s.log.Debug
	if method != http.MethodGet && method != http.MethodHead {
		log = s.log.Info
	}
	log("request", "method", r.Method, "path", r.URL.Path, "status", status, "seconds", took.Seconds(), "caller", who.name, "remote", r.RemoteAddr)
}

// metric describes one metric of the service and takes its value.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	of   func(*service.Metrics) float64
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("cloudlet_"+name, help, labels, nil)
}

func gauge(name, help string, of func(*service.Metrics) float64) metric {
	return metric{describe(name, help), prometheus.GaugeValue, of}
}

func counter(name, help string, of func(*service.MountCount) int64) metric {
	return metric{describe(name, help), prometheus.CounterValue, func(m *service.Metrics) float64 { return float64(of(&m.Mount)) }}
}

var (
	readableDesc   = describe("store_readable", "Whether the store's numbers could be read for this scrape.")
	instancesDesc  = describe("instances", "Instances by state, those included that have ended and were not removed.", "state")
	operationsDesc = describe("operations", "Operations begun, by kind and by the state that they are in.", "kind", "state")
	readsDesc      = describe("image_reads_total", "Reads of launch images that the host's page cache did not answer.", "image")
	servedDesc     = describe("image_read_bytes_total", "Bytes of launch images read by instances, without those that the host's page cache had.", "image")
	responseDesc   = describe("first_response_seconds", "Time from the request for an instance until its application's first right answer.")
	waitDesc       = describe("demand_wait_seconds", "Time that reads of launch images waited for their bytes.")
)

// metrics are the numbers without labels.
func metrics() []metric {
	return []metric{
		gauge("bases", "Bases in the store.", func(m *service.Metrics) float64 { return float64(m.Bases) }),
		gauge("overlays", "Overlays in the store.", func(m *service.Metrics) float64 { return float64(m.Overlays) }),
		gauge("uploads", "Overlays being uploaded.", func(m *service.Metrics) float64 { return float64(m.Uploads) }),
		gauge("store_bytes", "Disk space that bases and overlays take, without holes.", func(m *service.Metrics) float64 { return float64(m.StoreBytes) }),
		gauge("store_free_bytes", "Free space of the store's file system.", func(m *service.Metrics) float64 { return float64(m.FreeBytes) }),
		gauge("guest_memory_bytes", "Memory that the living guests were promised.", func(m *service.Metrics) float64 { return float64(m.Guests) }),
		gauge("mounts", "Launch images in use.", func(m *service.Metrics) float64 { return float64(m.Mounts) }),
		gauge("held_reads", "Reads of launch images that wait for a source which does not answer.", func(m *service.Metrics) float64 { return float64(m.Mount.Held) }),
		gauge("counters_since_seconds", "Unix time from which the counters count.", func(m *service.Metrics) float64 { return float64(m.Since.UnixMilli()) / 1000 }),
		counter("fetched_bytes_total", "Bytes read from the sources of overlays.", func(m *service.MountCount) int64 { return m.Fetched }),
		gauge("saved_bytes", "Bytes of mounted overlays, of ended mounts too, that were not read. It shrinks while a mount reads on.", func(m *service.Metrics) float64 { return float64(m.Mount.Saved) }),
		counter("frames_decoded_total", "Frames decoded.", func(m *service.MountCount) int64 { return m.FramesDecoded }),
		counter("frames_verified_total", "Frames whose hash was right.", func(m *service.MountCount) int64 { return m.FramesVerified }),
		counter("frames_refused_total", "Frames whose hash was wrong.", func(m *service.MountCount) int64 { return m.FramesRefused }),
		counter("frame_cache_hits_total", "Reads answered from the cache of decoded frames.", func(m *service.MountCount) int64 { return m.CacheHits }),
	}
}

// numbers are the service's metrics at one time.
type numbers struct {
	m        service.Metrics
	readable float64 // 0: there are no others
}

// Describe lists the metrics.
func (n *numbers) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range metrics() {
		ch <- m.desc
	}
	for _, d := range []*prometheus.Desc{readableDesc, instancesDesc, operationsDesc, readsDesc, servedDesc, responseDesc, waitDesc} {
		ch <- d
	}
}

// Collect gives the metrics.
func (n *numbers) Collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(readableDesc, prometheus.GaugeValue, n.readable)
	if n.readable == 0 {
		return
	}
	m := n.m
	for _, one := range metrics() {
		ch <- prometheus.MustNewConstMetric(one.desc, one.kind, one.of(&m))
	}
	for state, count := range m.Instances {
		ch <- prometheus.MustNewConstMetric(instancesDesc, prometheus.GaugeValue, float64(count), string(state))
	}
	for _, o := range append(slices.Clone(m.Operations), m.Active...) {
		ch <- prometheus.MustNewConstMetric(operationsDesc, prometheus.GaugeValue, float64(o.Count), string(o.Kind), string(o.State))
	}
	for _, image := range []struct {
		name         string
		reads, bytes int64
	}{{"memory", m.Mount.MemoryReads, m.Mount.MemoryBytes}, {"disk", m.Mount.DiskReads, m.Mount.DiskBytes}} {
		ch <- prometheus.MustNewConstMetric(readsDesc, prometheus.CounterValue, float64(image.reads), image.name)
		ch <- prometheus.MustNewConstMetric(servedDesc, prometheus.CounterValue, float64(image.bytes), image.name)
	}
	for desc, h := range map[*prometheus.Desc]service.Histogram{responseDesc: m.FirstResponse, waitDesc: m.DemandWait} {
		buckets := map[float64]uint64{}
		for _, b := range h.Buckets {
			buckets[b.Upper] = b.Count
		}
		ch <- prometheus.MustNewConstHistogram(desc, h.Count, h.Sum, buckets)
	}
}
