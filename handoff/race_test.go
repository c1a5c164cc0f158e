//go:build race

package handoff

const stride = 7
