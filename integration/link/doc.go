// Package link is a slow network between this host and a server of the same process: a
// bottleneck with a rate, a delay and losses, for kernels without sch_netem.
//
// Up makes a TUN device here and another one in a network namespace of its own, where the
// link's listener is. What one kernel end sends, this process reads packet by packet, holds
// back, and writes to the other:
//
//	client ── TCP ── TUN ──▶ queue, transmitter, propagation ──▶ TUN ── TCP ── server
//	                         (one for each direction)
//
// Join makes such a link between two network namespaces that exist, and has no listener.
//
// Modelled: one transmitter for each direction that all connections share, at Rate bits a
// second of IP packets; a first-in-first-out queue of Queue bytes before it, which drops
// what does not fit; a constant one-way Delay behind it; packets lost on the way with
// probability Loss, independently, in both directions. All else (slow start, congestion
// control, retransmission, acknowledgement, flow control) is the kernel's own TCP, so losses
// and queues do to connections what they do outside. The algorithm of the server's end is
// Congestion.
//
// Not modelled: jitter, reordering, duplication, bursts of losses, fair queueing, other
// traffic, layers below IP, IPv6. From 500 Mbit/s up packets of up to 64 KiB cross the link
// in one piece, as they do network cards with segmentation offload, so that the host has
// time for other work; there the unit of Loss is such a packet.
//
// The times of a direction depend on when packets come and on Seed alone, and are computed
// by a pure function of both; on a busy host a packet comes out late, never early, and the
// transmitter does not wait for it.
//
// It needs root and /dev/net/tun; Probe says whether they are there. Addresses are from
// 198.18.0.0/15, which is reserved for such tests. Devices and namespace vanish with the
// process, however it ends. All methods are safe for concurrent use.
package link
