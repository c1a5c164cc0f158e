// Package table derives the test guest's contents from its token, so that a test on the
// host can compute what a guest must answer and hold without asking it.
//
// The guest draws a random token when its application starts. Its memory table is Windows
// windows of WindowSize bytes, its state file FileWindows such windows, and a file written
// on request depends on the request's seed alone. Each window stands by itself: it is a
// SplitMix64 stream (Steele, Lea, Flood 2014) seeded by SHA-256 of a name such as
// "TOKEN/table/7", chosen because it is incompressible and costs few instructions in an
// emulated CPU. The cargo that a guest holds on request follows from its seed and the number
// of steps of its churn (Cargo), and what a client has appended has a running checksum (Sum).
// Nothing here is secret or fit for cryptography.
//
// All functions are pure and safe for concurrent use.
package table
