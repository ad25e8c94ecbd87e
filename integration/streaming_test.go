package integration_test

import (
	"crypto/sha256"
	"encoding/pem"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// front stands before the simulator as WeChat's load balancers do: it has its own TLS, counts connections, and keeps
// large bodies from the simulator, which would hold each in memory.
type front struct {
	*httptest.Server
	conns  atomic.Int64
	protos sync.Map // of the apps' calls

	uploads chan struct{} // one for each upload that has begun
	proceed chan struct{} // closed once their bodies may be read
}

// newFront starts a front for the simulator of w, which need not be there yet. With secure it speaks TLS, and the
// gateway is told to trust it.
func newFront(t *testing.T, w *integration.World, secure bool) *front {
	t.Helper()
	f := &front{uploads: make(chan struct{}, uploadCount), proceed: make(chan struct{})}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "token") {
			f.protos.Store(r.Proto, true)
		}
		switch r.URL.Path {
		case "/cgi-bin/media/upload":
			f.uploads <- struct{}{}
			<-f.proceed
			h := sha256.New()
			n, err := io.Copy(h, r.Body)
			_, _ = fmt.Fprintf(rw, `{"sum":"%x","read":%d,"length":%d,"broken":%t}`, h.Sum(nil), n, r.ContentLength, err != nil)
		case "/cgi-bin/media/get":
			rw.Header().Set("Content-Type", "image/jpeg")
			rw.Header().Set("Content-Length", strconv.Itoa(uploadSize))
			_, _ = io.Copy(rw, blob(0))
		default:
			w.Simulator().ServeHTTP(rw, r)
		}
	}))
	f.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			f.conns.Add(1)
		}
	}
	w.Env = append(w.Env, "WECHAT_API="+f.start(t, w, secure))
	t.Cleanup(f.Close)
	return f
}

func (f *front) start(t *testing.T, w *integration.World, secure bool) string {
	t.Helper()
	if !secure {
		f.Start()
		return f.URL
	}
	f.EnableHTTP2 = true
	f.StartTLS()
	file := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	w.Env = append(w.Env, "SSL_CERT_FILE="+file)
	return f.URL
}

// spoken are the protocols that apps' calls came by.
func (f *front) spoken() (list []string) {
	f.protos.Range(func(proto, _ any) bool { list = append(list, proto.(string)); return true })
	return list
}

// Files that go up and down.
const (
	uploadSize  = 10 << 20
	uploadCount = 64
)

// blob is the i-th file: as large as an upload, and nowhere in memory.
func blob(i int) io.Reader {
	var seed [32]byte
	seed[0], seed[1] = byte(i), 1
	return io.LimitReader(rand.NewChaCha8(seed), uploadSize)
}

// TestConnectionsAreReused: calls share connections to WeChat, over TLS one h2 connection.
func TestConnectionsAreReused(t *testing.T) {
	for _, tt := range []struct {
		secure  bool
		proto   string
		workers int
		most    int64 // connections: of the calls, and one or two of the gateway's own for tokens
	}{{false, "HTTP/1.1", 8, 2*8 + 2}, {true, "HTTP/2.0", 32, 1 + 2}} {
		t.Run(tt.proto, func(t *testing.T) {
			var f *front
			w := newWorld(t, func(w *integration.World) {
				polite(w)
				f = newFront(t, w, tt.secure)
			})
			user := w.WeChat.NewUser(integration.AccountID)
			one := func() {
				status, body := call(t, w, http.MethodGet, "/"+integration.AccountID+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), "")
				if status != 200 || !strings.Contains(body, user.OpenID) {
					t.Errorf("%d %s", status, body)
				}
			}
			one()
			var wg sync.WaitGroup
			for range tt.workers {
				wg.Go(func() {
					for range 40 {
						one()
					}
				})
			}
			wg.Wait()
			n := f.conns.Load()
			// By HTTP/1.1 net/http may dial for a call which then takes a connection that another has done with.
			t.Logf("%d calls, %d at a time: %d connections by %v", tt.workers*40+1, tt.workers, n, f.spoken())
			if got := f.spoken(); n > tt.most || len(got) != 1 || got[0] != tt.proto {
				t.Errorf("%d connections by %v, want at most %d by %s", n, got, tt.most, tt.proto)
			}
		})
	}
}

// TestBackupHost: WeChat's backup host is called while no connection to the first can be made, and for nothing else: not
// when the first is slow to say no, answers an error or hangs up.
func TestBackupHost(t *testing.T) {
	t.Parallel()
	var first, backup *front
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		first, backup = newFront(t, w, false), newFront(t, w, false)
		w.Env = append(w.Env, "WECHAT_API="+first.URL+" "+backup.URL)
	})
	user := w.WeChat.NewUser(integration.AccountID)
	const path = "/cgi-bin/message/custom/send"
	body := `{"touser":"` + user.OpenID + `","msgtype":"text","text":{"content":"x"}}`
	send := func() (int, string) {
		return call(t, w, http.MethodPost, "/"+integration.AccountID+path, bearer(w), body)
	}
	for name, c := range map[string]struct {
		fault  wxsim.Fault
		status int
	}{
		"late": {wxsim.Fault{Delay: time.Second}, 200}, "busy": {wxsim.Fault{Errcode: -1}, 200},
		"a 502": {wxsim.Fault{Status: 502, Body: "<html>"}, 502}, "a hang-up": {wxsim.Fault{Act: true, DropConnection: true}, 502},
	} {
		w.WeChat.FailNext(path, c.fault)
		if status, answer := send(); status != c.status {
			t.Errorf("%s: %d %s", name, status, answer)
		}
	}
	if n := backup.conns.Load(); n != 0 {
		t.Errorf("the backup got %d connections while the first was there", n)
	}
	first.Close()
	before := len(w.WeChat.SentTo(user.OpenID))
	sent := 20
	for i := range 20 {
		status, answer := send()
		// A kept connection to the first host may break just as the call goes out on it. Nobody sends that call again.
		if i == 0 && status == 502 {
			sent--
			continue
		}
		if status != 200 || !strings.Contains(answer, `"errcode":0`) {
			t.Errorf("with the first host gone: %d %s", status, answer)
		}
	}
	if n := len(w.WeChat.SentTo(user.OpenID)) - before; n != sent {
		t.Errorf("%d messages became %d", sent, n)
	}
	if n := backup.conns.Load(); n == 0 || n > 2 {
		t.Errorf("the backup got %d connections for calls one after another", n)
	}
	checkViolations(t, w)
}
