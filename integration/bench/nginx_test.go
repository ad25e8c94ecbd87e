//go:build nginx

package main

import (
	"bytes"
	"os/exec"
	"testing"
)

// TestNginx has nginx with Lua do what the gateway does, judged as the gateway is. It has a build tag of its own for what it needs: nginx as
// Debian's package installs it starts at once, on port 80, which is nothing to bring upon who runs tests.
func TestNginx(t *testing.T) {
	if _, err := exec.LookPath("/usr/sbin/nginx"); err != nil {
		t.Fatal("nginx is missing: install nginx-light and libnginx-mod-http-lua")
	}
	o := shortRun(t)
	o.only = "^inbound$"
	if err := o.also("nginx=nginx/run.sh"); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := o.run(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	var r report
	readJSON(t, o.json, &r)
	f := r.Figures["inbound: nginx"]
	if f == nil || len(f.Full) != o.rounds || f.Full[0].Requests != o.requests || f.Full[0].CPU <= 0 {
		t.Fatalf("figures %+v\n%s", f, &out)
	}
	t.Log(out.String())
}
