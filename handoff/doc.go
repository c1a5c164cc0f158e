// Package handoff will move a running instance to another cloudlet: the protocol as a state
// machine over the VM and Peer verbs that it declares. It holds no code yet.
package handoff
