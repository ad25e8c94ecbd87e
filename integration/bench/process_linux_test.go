package main

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What the clock of a process says is what the kernel accounts for it.
func TestCPUTime(t *testing.T) {
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		t.Fatal(err)
	}
	start, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	sum := uint64(1)
	for begun := time.Now(); time.Since(begun) < 200*time.Millisecond; {
		sum *= 3
	}
	end, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		t.Fatal(err)
	}
	accounted := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	if got := end - start; got <= 0 || got > accounted+20*time.Millisecond || got < accounted-20*time.Millisecond {
		t.Errorf("CPU time grew by %v, getrusage says %v (%d)", got, accounted, sum)
	}
}

// A process that is started on CPUs stays there, and the thread that started it goes back.
func TestOnCPUs(t *testing.T) {
	cpus, err := allowedCPUs()
	if err != nil {
		t.Fatal(err)
	}
	var inside []int
	if err := onCPUs(cpus[:1], func() (err error) {
		inside, err = allowedCPUs()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if len(inside) != 1 || inside[0] != cpus[0] {
		t.Errorf("ran on %v, want %v", inside, cpus[:1])
	}
	if after, err := allowedCPUs(); err != nil || len(after) != len(cpus) {
		t.Errorf("afterwards on %v, want %v: %v", after, cpus, err)
	}
}
