package caddymodule

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// However the pieces of an answer come, it ends before a secret, and what only begins like one is passed on.
func TestGuardedBody(t *testing.T) {
	t.Parallel()
	const token, other = "ABAB_TOKEN", "SECRET"
	pad := strings.Repeat("AB", guardRead)
	for text, want := range map[string]string{
		"":                                   "",
		"nothing":                            "nothing",
		"ABAB_TOKE":                          "ABAB_TOKE",
		"ABABAB_TOKEN":                       "AB",
		"x ABAB_TOKEN y ABAB_TOKEN":          "x ",
		"SECRE SECRET ABAB_TOKEN":            "SECRE ",
		pad + "SECRET" + pad:                 pad,
		pad + "_TOKEN" + pad:                 pad[4:],
		pad + "_TOKE" + pad:                  pad + "_TOKE" + pad,
		"x" + pad[1:] + "ABAB_TOKEN is here": "x" + pad[1:],
	} {
		for how, reader := range map[string]func(io.Reader) io.Reader{
			"at once": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader, "by halves": iotest.HalfReader, "with its end": iotest.DataErrReader,
		} {
			for _, size := range []int{1, 3, 32 << 10} {
				found := 0
				g := &guardedBody{
					ReadCloser: io.NopCloser(reader(strings.NewReader(text))), secrets: []secret.String{secret.New(token), secret.New(other)},
					found: func() { found++ }, buf: make([]byte, guardRead+len(token)),
				}
				var got strings.Builder
				_, err := io.CopyBuffer(&got, struct{ io.Reader }{g}, make([]byte, size))
				cut := got.Len() < len(text)
				if got.String() != want || cut != errors.Is(err, errRepeatsSecret) || !cut && err != nil || (found == 1) != cut {
					t.Errorf("%.20q…, %s, by %d: got %d bytes of %d, want %d; %v, found %d times", text, how, size, got.Len(), len(text), len(want), err, found)
				}
			}
		}
	}
}

// Text that comes with 200 and repeats the token late is cut off before that; media are passed on as they are.
func TestAPITextThatRepeatsTheTokenLate(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.opaque(accountID, crmKey)
	for _, long := range []int{100, peekSize, 3 * maxErrorPage} {
		for _, hasLength := range []bool{true, false} {
			for contentType, guarded := range map[string]bool{
				"text/plain": true, "Text/Xml; charset=utf-8": true, "application/json": true, "application/xhtml+xml": true, "": true,
				"image/jpeg": false, "application/octet-stream": false,
			} {
				for _, start := range []string{"GET ", `{"a":"`} {
					before := start + strings.Repeat("R", long)
					var asked string
					wechat.answer(func(w http.ResponseWriter, r *http.Request) {
						asked = r.URL.String()
						w.Header()["Content-Type"] = []string{contentType}
						if contentType == "" {
							w.Header()["Content-Type"] = nil
						}
						if hasLength {
							w.Header().Set("Content-Length", strconv.Itoa(len(before)+len(asked)))
						}
						io.WriteString(w, before)
						_ = http.NewResponseController(w).Flush()
						io.WriteString(w, asked)
					})
					name := fmt.Sprintf("%q, %d bytes, length %v, %q", contentType, long, hasLength, start)
					req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/"+accountID+"/cgi-bin/x", nil)
					if err != nil {
						t.Fatal(err)
					}
					req.Header.Set("Authorization", "Bearer "+crmKey)
					res, err := g.Client().Transport.RoundTrip(req)
					if err != nil {
						t.Fatal(err)
					}
					body, err := io.ReadAll(res.Body)
					_ = res.Body.Close()
					switch {
					case !guarded && long < peekSize: // the start is looked at whatever it is
					case !guarded && (err != nil || string(body) != before+asked):
						t.Errorf("%s: got %d of %d bytes, %v", name, len(body), len(before)+len(asked), err)
					case guarded && strings.Contains(string(body), "REALTOKEN"):
						t.Errorf("%s: got the token", name)
					case guarded && res.StatusCode == http.StatusOK && (err == nil || !strings.HasPrefix(string(body), before)):
						t.Errorf("%s: got %d bytes, %v; want %d and a broken connection", name, len(body), err, len(before))
					}
				}
			}
		}
	}
	if n := counted(t, g.app.metrics().apiRequests, "crm", outcomeUnreachable); n == 0 {
		t.Error("none is counted as unreachable")
	}
}

// The account's secret, which goes into a login's address, is guarded as the tokens are.
func TestAPITextThatRepeatsTheSecretLate(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	before := "GET " + strings.Repeat("R", 3*maxErrorPage)
	var asked string
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		asked = r.URL.String()
		w.Header().Set("Content-Type", "text/plain")
		io.WriteString(w, before)
		_ = http.NewResponseController(w).Flush()
		io.WriteString(w, asked)
	})
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/sns/jscode2session?appid="+accountID+"&secret="+shopKey+"&js_code=c1", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := g.Client().Transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if !strings.Contains(asked, "secret=account-secret") {
		t.Fatalf("WeChat was asked %s", asked)
	}
	if strings.Contains(string(body), "account-secret") || err == nil || !strings.HasPrefix(string(body), before) {
		t.Errorf("got %d bytes, %v; want %d and a broken connection", len(body), err, len(before))
	}
}
