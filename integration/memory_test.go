package integration_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// memory is a line of the gateway's /proc/<pid>/status, in KiB.
func memory(t *testing.T, w *integration.World, name string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.Gateway.PID()))
	if err != nil {
		t.Fatalf("this test reads memory as Linux shows it: %v", err)
	}
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == name+":" {
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in the process's status", name)
	return 0
}
