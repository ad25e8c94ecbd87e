//go:build !race

package integration_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

func blobSum(t *testing.T, i int) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, blob(i)); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// resident is how much memory the gateway process has, in bytes: now, and at most so far.
func resident(t *testing.T, w *integration.World) (now, peak int64) {
	t.Helper()
	return int64(memory(t, w, "VmRSS")) << 10, int64(memory(t, w, "VmHWM")) << 10
}

// TestUploadsInParallel sends 64 files of 10 MiB at once through a gateway process, all of them begun before WeChat reads
// the first, and fetches as many: each arrives as it was sent, with its length, and the process's memory stays far below
// what the files are. By HTTP/1.1 on both sides, and by h2. The race detector shadows each byte, so its build leaves this
// out.
func TestUploadsInParallel(t *testing.T) {
	for _, secure := range []bool{false, true} {
		t.Run(map[bool]string{false: "HTTP/1.1", true: "h2"}[secure], func(t *testing.T) {
			uploadsInParallel(t, secure)
		})
	}
}

func uploadsInParallel(t *testing.T, secure bool) {
	var f *front
	config := filepath.Join(t.TempDir(), "Caddyfile")
	example, err := os.ReadFile("../Caddyfile.example")
	if err == nil {
		err = os.WriteFile(config, append(example, wechatSite...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = config
		f = newFront(t, w, secure)
	})
	s := &sdkWorld{World: w}
	base, client := w.APIURL(""), &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: uploadCount}}
	if secure {
		base, client = "https://api.weixin.qq.com", s.led(t)
		client.Timeout = 5 * time.Minute
	}
	token := s.token(t, integration.AccountID, w.ClientKey)
	before, _ := resident(t, w)

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range uploadCount {
		wg.Go(func() {
			want := fmt.Sprintf(`{"sum":"%s","read":%d,"length":%d,"broken":false}`, blobSum(t, i), uploadSize, uploadSize)
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/cgi-bin/media/upload?type=image&access_token="+token, blob(i))
			if err != nil {
				t.Error(err)
				return
			}
			req.ContentLength = uploadSize
			req.Header.Set("Content-Type", "multipart/form-data; boundary=x")
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("upload %d: %v", i, err)
				return
			}
			defer func() { _ = resp.Body.Close() }()
			if got, _ := io.ReadAll(resp.Body); string(got) != want || (resp.ProtoMajor == 2) != secure {
				t.Errorf("upload %d: %s %d %s, want %s", i, resp.Proto, resp.StatusCode, got, want)
			}
		})
	}
	for n := range uploadCount {
		select {
		case <-f.uploads:
		case <-ctx.Done():
			t.Fatalf("only %d uploads began", n)
		}
	}
	held, _ := resident(t, w)
	close(f.proceed)
	wg.Wait()
	_, up := resident(t, w)

	want := blobSum(t, 0)
	for i := range uploadCount {
		wg.Go(func() {
			resp, err := client.Get(base + "/cgi-bin/media/get?media_id=x&access_token=" + token) //nolint:noctx // ends with the client's timeout
			if err != nil {
				t.Errorf("download %d: %v", i, err)
				return
			}
			defer func() { _ = resp.Body.Close() }()
			h := sha256.New()
			if _, err := io.Copy(h, resp.Body); err != nil || fmt.Sprintf("%x", h.Sum(nil)) != want || resp.ContentLength != uploadSize {
				t.Errorf("download %d: %v, length %d", i, err, resp.ContentLength)
			}
		})
	}
	wg.Wait()
	_, peak := resident(t, w)
	const mib = 1 << 20
	t.Logf("%d files of %d MiB up and down in %v: %d MiB resident before, %d with all uploads held, at most %d after them, %d after the downloads",
		uploadCount, uploadSize/mib, time.Since(begin).Round(time.Millisecond), before/mib, held/mib, up/mib, peak/mib)
	const limit = uploadCount * uploadSize / 4 // a quarter of what is on the way
	if grown := peak - before; grown > limit {
		t.Errorf("the gateway grew by %d MiB, more than %d", grown/mib, limit/mib)
	}
	proto := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[secure]
	if got := f.spoken(); len(got) != 1 || got[0] != proto {
		t.Errorf("WeChat was spoken to by %v, want %s", got, proto)
	}
}
