// Package integration holds the end-to-end tests of VM synthesis and what they need: test
// guests (integration/guest), the demo drivers, several cloudlets on one host
// (integration/cloudlets), and a client that notices what a handoff loses
// (integration/appclient). It may import any other package of the
// module; none of them may import it, apart from cmd/overlaybench, which measures as the
// commands here do (integration/figures), and the tests of all, for integration/need.
//
// The tests run real QEMU, real FUSE mounts and a real guest kernel. A test whose needs a
// machine cannot meet is skipped with the probed reason; with CLOUDLET_NO_SKIP=1 in the
// environment, as in make test, it fails instead: integration/need is how, here
// and in the tests of all other packages.
package integration
