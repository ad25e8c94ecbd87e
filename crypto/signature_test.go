package crypto

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestVerifySignature(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"AAAAA", "weixin"}, nil)
	const old = "e3203b6433eb554dd2fcba78fa48cb948fcb4801" // made with "weixin"
	tests := []struct {
		name, signature, timestamp, nonce string
		want                              bool
	}{
		{"newest token", "f464b24fc39322e44b38aa78f5edd27bd1441696", "1714036504", "1514711492", true},
		{"older token", old, "1414387151", "917222494", true},
		{"swapped parameters, which the protocol cannot tell", old, "917222494", "1414387151", true},
		{"empty", "", "1414387151", "917222494", false},
		{"upper case", strings.ToUpper(old), "1414387151", "917222494", false},
		{"cut short", old[:39], "1414387151", "917222494", false},
		{"longer", old + "0", "1414387151", "917222494", false},
		{"one digit off", "0" + old[1:], "1414387151", "917222494", false},
		{"other timestamp", old, "1414387152", "917222494", false},
		{"other nonce", old, "1414387151", "917222495", false},
		{"no parameters", old, "", "", false},
		{"long nonce", old, "1414387151", strings.Repeat("9", 10_000), false},
	}
	for _, test := range tests {
		if got := c.VerifySignature(test.signature, test.timestamp, test.nonce); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

// TestParseSignature: there is one spelling. A digit that was taken for another value would make a second.
func TestParseSignature(t *testing.T) {
	t.Parallel()
	const good = "0123456789abcdef0123456789abcdef01234567"
	sum, ok := parseSignature(good)
	if !ok || hex.EncodeToString(sum[:]) != good {
		t.Errorf("%x, %v", sum, ok)
	}
	for _, c := range []string{"/", ":", "@", "A", "F", "G", "`", "g", "\x00", "\xff"} {
		for _, i := range []int{0, 1, 38, 39} {
			if sum, ok := parseSignature(good[:i] + c + good[i+1:]); ok {
				t.Errorf("%q at %d is taken: %x", c, i, sum)
			}
		}
	}
}

// TestAppendSorted compares with sorting and joining, over all orders of texts that share beginnings.
func TestAppendSorted(t *testing.T) {
	t.Parallel()
	texts := []string{"", "1", "10", "9", "A", "Z", "a", "aa", "/", "+", "é"}
	for _, a := range texts {
		for _, b := range texts {
			for _, c := range texts {
				for _, d := range texts {
					all := []string{a, b, c, d}
					slices.Sort(all)
					if got, want := string(appendSorted([]byte("x"), a, b, c, []byte(d))), "x"+strings.Join(all, ""); got != want {
						t.Fatalf("%q %q %q %q: %q, want %q", a, b, c, d, got, want)
					}
				}
			}
		}
	}
}

func TestFresh(t *testing.T) {
	t.Parallel()
	now := time.Unix(1715943329, 500_000_000)
	const window = 5 * time.Minute
	tests := []struct {
		name, timestamp string
		want            bool
	}{
		{"now", "1715943329", true},
		{"oldest", "1715943030", true},
		{"stale", "1715943029", false},
		{"latest", "1715943629", true},
		{"future", "1715943630", false},
		{"empty", "", false},
		{"nine digits", "171594332", false},
		{"leading zero", "01715943329", false},
		{"milliseconds", "1715943329000", false},
		{"fraction", "1715943329.0", false},
		{"sign", "+171594332", false},
		{"negative", "-715943329", false},
		{"space", "171594332 ", false},
		{"other digits", "171594332٣", false},
		{"letters", "171594332a", false},
		{"below the digits", "171594332/", false},
		{"above the digits", "171594332:", false},
		{"far future", "9999999999", false},
		{"epoch", "0000000000", false},
	}
	for _, test := range tests {
		if got := Fresh(test.timestamp, now, window); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}
