//go:build !linux

package main

import (
	"errors"
	"time"
)

var errLinux = errors.New("the benchmark reads CPU time and memory as Linux shows them: run it there")

func allowedCPUs() ([]int, error) { return nil, errLinux }

func pinSelf([]int) error { return errLinux }

func onCPUs(_ []int, f func() error) error { return f() }

func cpuTime(int) (time.Duration, error) { return 0, errLinux }

func memory(int) (rss, peak int64, err error) { return 0, 0, errLinux }

func openFiles() (int, error) { return 0, errLinux }

func machine() string { return "not Linux" }

func load() string { return "unknown" }

func busy() (time.Duration, error) { return 0, errLinux }
