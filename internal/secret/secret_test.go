package secret_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestStringNeverPrints(t *testing.T) {
	t.Parallel()
	const clear = "open-sesame"
	s := secret.New(clear)
	nested := struct {
		S secret.String
		P *secret.String
		u secret.String
	}{s, &s, s}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+" ", s)
		fmt.Fprintf(&out, verb+" ", nested)
	}
	js, err := json.Marshal(nested)
	if err != nil {
		t.Fatal(err)
	}
	out.Write(js)
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "s", s, "n", nested)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "s", s, "n", nested)
	hexed := fmt.Sprintf("%x", clear)
	if text := out.String(); strings.Contains(text, clear) || strings.Contains(text, hexed) {
		t.Errorf("secret printed: %s", text)
	}
	if s.Reveal() != clear {
		t.Error("Reveal does not return the value")
	}
}

func TestEqual(t *testing.T) {
	t.Parallel()
	s := secret.New("abc")
	if !s.Equal("abc") || s.Equal("abd") || s.Equal("ab") || s.Equal("") {
		t.Error("Equal is wrong")
	}
	if (secret.String{}).Equal("") {
		t.Error("an absent secret equals the empty candidate")
	}
	if !(secret.String{}).IsZero() || s.IsZero() {
		t.Error("IsZero is wrong")
	}
}
