package integration_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// An official account of WeChat's release check.
const testedAccount = "wx9252c5e0bb1836fc"

// TestReleaseCheck: WeChat's acceptance check passes on a gateway that has only just started, whatever the simulated
// WeChat's hostility does to it, and again on a gateway that knows the test accounts from an earlier one.
func TestReleaseCheck(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) { w.Config.Seed = 7 })
	jobReleaseCheck(t, w)
	jobReleaseCheck(t, w)
	if err := w.Gateway.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	jobReleaseCheck(t, w)
	checkViolations(t, w)
}

// TestReleaseCheckWhileWeChatIsSlow: the exchange that `authorized` began takes longer than WeChat waits for an answer.
// QUERY_AUTH_CODE is answered all the same, also when it is pushed again, and one message follows.
func TestReleaseCheckWhileWeChatIsSlow(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	authorize(t, w)
	const exchange, delay = "/cgi-bin/component/api_query_auth", 6 * time.Second
	w.WeChat.FailNext(exchange, wxsim.Fault{Delay: delay})
	granted, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, testedAccount)
	if err != nil || !granted.Push.OK() {
		t.Fatalf("authorized: %s %v", granted.Push.Wrong, err)
	}
	message := wxsim.Message{
		Platform: integration.PlatformID, AppID: testedAccount, To: "gh_c0f28a78b318", Content: "QUERY_AUTH_CODE:" + granted.Code, CreateTime: time.Now(),
	}
	for range 3 {
		pushed, err := w.WeChat.PushMessage(t.Context(), message)
		if err != nil || pushed.Wrong != "" || pushed.Kind != wxsim.ReplySuccess || len(pushed.Attempts) != 1 || pushed.Last().Latency > time.Second {
			t.Errorf("answered %s %s %v after %v in %d attempts", pushed.Kind, pushed.Wrong, err, pushed.Last().Latency, len(pushed.Attempts))
		}
		message.From, message.MsgID = pushed.OpenID, pushed.MsgID
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	sent, err := w.WeChat.WaitSent(ctx, message.From, nil)
	if err != nil || sent.AppID != testedAccount || sent.Content != granted.Code+"_from_api" || sent.At.Sub(message.CreateTime) < delay/2 {
		t.Errorf("sent for %s after %v: %v", sent.AppID, sent.At.Sub(message.CreateTime), err)
	}
	if err := w.Gateway.Stop(); err != nil { // when what runs in the background has ended
		t.Fatal(err)
	}
	if n := len(w.WeChat.SentTo(message.From)); n != 1 {
		t.Errorf("%d messages sent", n)
	}
	if n := w.WeChat.Journal().Count(exchange); n != 2 { // the other one is the authorizer's
		t.Errorf("%d codes exchanged", n)
	}
	checkViolations(t, w)
}

// TestReleaseDocument: both READMEs speak of each item as the report does, and of log lines that there are.
func TestReleaseDocument(t *testing.T) {
	t.Parallel()
	var source strings.Builder
	for _, name := range []string{"release.go", "push.go"} {
		content, err := os.ReadFile("../caddymodule/" + name)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(content)
	}
	for doc, heading := range map[string]string{"README.md": "\n## The release check (全网发布接入检测)\n", "README.zh-CN.md": "\n## 全网发布接入检测\n"} {
		content, err := os.ReadFile("../" + doc)
		if err != nil {
			t.Fatal(err)
		}
		_, section, found := strings.Cut(string(content), heading)
		section, _, _ = strings.Cut(section, "\n## ")
		if !found {
			t.Errorf("%s has no section on the release check", doc)
		}
		for _, item := range consoleItems {
			if !strings.Contains(section, item) {
				t.Errorf("%s does not say what to do about %s", doc, item)
			}
		}
		for _, line := range []string{"push refused", "push not acknowledged", "release check answered", "release check: the customer-service message could not be sent"} {
			if !strings.Contains(section, "`"+line+"`") || !strings.Contains(source.String(), `"`+line) {
				t.Errorf("%s, or the gateway, does not know the log line %q", doc, line)
			}
		}
	}
}

// consoleItems is what WeChat's console lists.
var consoleItems = []string{"推送component_verify_ticket", "返回普通文本消息", "返回Api文本消息", "授权"}

// demoReleaseCheck runs what `make release-check` runs: without a demo, beside one, and with a gateway that fails.
func demoReleaseCheck(t *testing.T, demo, dir string) {
	t.Helper()
	check := func(config string) (string, error) {
		cmd := exec.CommandContext(t.Context(), demo, "-release-check", "-caddy", binary, "-config", config, "-dir", dir)
		cmd.WaitDelay = 10 * time.Second
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	passes := func(out string, err error, with string) {
		t.Helper()
		wants := append([]string{with, "\npassed\n"}, consoleItems...)
		for group := 1; group <= wxsim.ReleaseGroups; group++ {
			wants = append(wants, fmt.Sprintf("\ngroup %d\n", group))
		}
		for _, want := range wants {
			if err != nil || !strings.Contains(out, want) {
				t.Fatalf("%v, want %q in:\n%s", err, want, out)
			}
		}
		if n := strings.Count(out, "\n  ok "); n != 10*wxsim.ReleaseGroups || strings.Contains(out, "FAIL") {
			t.Errorf("%d items:\n%s", n, out)
		}
	}
	const own, beside = "started from ../Caddyfile.example", "of the running demonstration"
	out, err := check("../Caddyfile.example") // an earlier demo ran in dir
	passes(out, err, own)

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var shown bytes.Buffer
	running := exec.CommandContext(ctx, demo, "-caddy", binary, "-config", "../Caddyfile.example", "-dir", dir)
	running.Stdout, running.Stderr, running.WaitDelay = &shown, &shown, 20*time.Second
	running.Cancel = func() error { return running.Process.Signal(os.Interrupt) }
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	control := filepath.Join(dir, "control")
	eventually(t, "the demo's show", func() error {
		info, err := os.Stat(control)
		if err == nil && info.Size() == 0 {
			return errors.New("its control file is empty")
		}
		return err
	})
	if info, err := os.Stat(control); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("control file: %v %v", info.Mode(), err)
	}
	for range 2 {
		out, err = check("../Caddyfile.example")
		passes(out, err, beside)
	}
	kept, err := os.ReadFile(control)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if err := running.Wait(); !errors.Is(err, context.Canceled) && err != nil {
		t.Errorf("the demo ended with %v:\n%s", err, &shown)
	}
	if _, err := os.Stat(control); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control file is still there: %v", err)
	}
	// A demo that was killed leaves it.
	if err := os.WriteFile(control, kept, 0o600); err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(t.TempDir(), "Caddyfile")
	const key = "aes_key {env.WECHAT_PLATFORM_AES_KEY} "
	if err := os.WriteFile(broken, bytes.Replace(example, []byte(key), []byte("release_check off\n"+key), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = check(broken)
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		t.Errorf("a gateway that fails: %v", err)
	}
	for _, want := range []string{"\n  FAIL text reply", "\n  no   event reply", "\n  FAIL api text official account: message", "FAIL the backend got", "the gateway's log is in "} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if _, folder, ok := strings.Cut(out, "the gateway's log is in "); ok {
		if err := os.RemoveAll(strings.TrimSpace(folder)); err != nil {
			t.Error(err)
		}
	}
}
