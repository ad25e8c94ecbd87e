//go:build !unix

package integration_test

func (n *fleetNode) halt() {
	panic("no process can be stopped on this system without ending it: run the test on Linux or macOS")
}

func (*fleetNode) goOn() {} // nothing was stopped
