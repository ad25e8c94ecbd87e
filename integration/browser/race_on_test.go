//go:build race

package browser_test

// raceEnabled has the gateway process built with the race detector, like the tests.
const raceEnabled = true
