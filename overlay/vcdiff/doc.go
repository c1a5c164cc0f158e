// Package vcdiff decodes VCDIFF (RFC 3284): a target as copies from a source, copies from
// itself, and bytes of its own.
//
// It reads the standard code table with both address caches, windows that copy from the
// source or from the target before them, and what xdelta3 adds to the RFC: the Adler-32 sum
// of a window's target and the application header, whose content is skipped. xdelta3 writes
// such files with "-S none".
//
// Refused by name: secondary compression, code tables of the file's own, other versions,
// unknown flags; copies that leave the source segment or the target so far; numbers that are
// not in their shortest form, instructions that make no byte, bytes left over, wrong sums.
// What a header announces is compared with the caller's cap before anything is allocated,
// and nothing is read that the delta does not hold. Delta bytes from anywhere are fine: there
// is an error, never a panic. The functions keep no state and are safe for concurrent use.
package vcdiff
