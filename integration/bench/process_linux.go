package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// allowedCPUs are the CPUs that this process may run on.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var cpus []int
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// pinSelf moves all threads of this process to the CPUs; threads and processes that they start later stay there.
func pinSelf(cpus []int) error {
	set := cpuSet(cpus)
	moved := map[int]bool{}
	for before := -1; before < len(moved); { // a thread may start another before it is moved itself
		before = len(moved)
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil || moved[tid] {
				continue
			}
			if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
			moved[tid] = true
		}
	}
	runtime.GOMAXPROCS(len(cpus))
	return nil
}

// onCPUs runs f on a thread that is on the CPUs, so that a process which f starts is there from its first instruction: Go
// counts its processors when it starts.
func onCPUs(cpus []int, f func() error) (err error) {
	if len(cpus) == 0 {
		return f()
	}
	runtime.LockOSThread()
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return err
	}
	set := cpuSet(cpus)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return err
	}
	err = f()
	if back := unix.SchedSetaffinity(0, &before); back != nil {
		return errors.Join(err, back) // the thread stays locked, and ends with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

func cpuSet(cpus []int) (set unix.CPUSet) {
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	return set
}

// cpuTime is the CPU time of all threads of a process, living and ended, user and system, to the nanosecond: the clock that
// clock_getcpuclockid(3) gives. What /proc/PID/stat has is the same in steps of 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	const schedClock = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|schedClock), &t); err != nil { //nolint:gosec // process ids have 22 bits
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// memory is what a process has of the machine's, now and at most so far, in bytes.
func memory(pid int) (rss, peak int64, err error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue
		}
		into := map[string]*int64{"VmRSS:": &rss, "VmHWM:": &peak}[fields[0]]
		if into == nil {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0, 0, err
		}
		*into = kib << 10
	}
	if rss == 0 || peak == 0 {
		return 0, 0, fmt.Errorf("/proc/%d/status has no VmRSS and VmHWM", pid)
	}
	return rss, peak, nil
}

// openFiles raises this process's limit of open files as far as it may, and returns it.
func openFiles() (int, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	if limit.Cur < limit.Max {
		limit.Cur = limit.Max
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			return 0, err
		}
	}
	return int(min(limit.Cur, 1<<30)), nil //nolint:gosec // bounded
}

// machine names the processor and the kernel.
func machine() string {
	model := "unknown processor"
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return model
	}
	return model + ", Linux " + unix.ByteSliceToString(u.Release[:])
}

// load is how many processes wanted a processor in the last minute.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(text), " ")
	return first
}

// busy is the CPU time that all processes of the machine together have had, in steps of 10 ms, and what other machines on
// the same hardware took from it.
func busy() (time.Duration, error) {
	const step = 10 * time.Millisecond // USER_HZ is 100 wherever Linux runs
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), "\n")
	var sum time.Duration
	for i, field := range strings.Fields(first) {
		if i == 0 || i == 4 || i == 5 || i > 8 { // the name, idle and iowait; guests are in user
			continue
		}
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		sum += time.Duration(n) * step
	}
	return sum, nil
}
