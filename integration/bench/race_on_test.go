//go:build race

package main

// raceEnabled has the gateway built with the race detector, like the tests.
const raceEnabled = true
