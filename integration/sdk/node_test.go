package sdk_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// node runs one of the scripts in the folder node: a task in its environment, the outcome on its standard output.
func node(script string) func(*testing.T, task) outcome {
	return func(t *testing.T, job task) outcome {
		t.Helper()
		dir := t.TempDir()
		folder, err := filepath.Abs("node")
		if err != nil {
			t.Fatal(err)
		}
		env := append(os.Environ(),
			"appid="+job.appID, "clientKey="+job.clientKey, "openid="+job.openID, "text="+job.text, "menu="+job.menu,
			"picture="+job.picture, "pageURL="+pageURL, "templateID="+templateID, "NODE_NO_WARNINGS=1",
		)
		if job.stable {
			env = append(env, "stable=1")
		}
		args := []string{filepath.Join(folder, script)}
		taps := filepath.Join(dir, "tap")
		if job.gateway != "" {
			env = append(env, "gateway="+job.gateway)
		} else {
			authority := filepath.Join(dir, "root.crt")
			pem, err := job.w.Gateway.CACert()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(authority, pem, 0o600); err != nil {
				t.Fatal(err)
			}
			env = append(env, "NODE_EXTRA_CA_CERTS="+authority, "hostsPort="+integration.Port(job.w.HTTPS), "tap="+taps)
			args = append([]string{"--require", filepath.Join(folder, "hosts.js")}, args...)
		}
		cmd := exec.CommandContext(t.Context(), "node", args...)
		cmd.Dir, cmd.Env = dir, env // node-easywechat keeps its tokens in files of the working directory
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v (sh scripts/install-test-needs.sh installs what it needs)\n%s%s", script, err, out, stderr.Bytes())
		}
		if seen, err := os.ReadFile(taps); err == nil {
			_, _ = job.tap.Write(seen)
		}
		var done outcome
		if err := json.Unmarshal(out, &done); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
		return done
	}
}
