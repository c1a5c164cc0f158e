// Package product makes what is expensive to make once: a folder of files under a key of
// everything that goes into it. A second call finds it in milliseconds. A product appears
// by one rename, so an interrupted call leaves none; concurrent calls, also of several
// processes, wait for each other.
package product
