package main

import (
	"bytes"
	"maps"
	"strings"
	"testing"
)

func TestReadProfile(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, text string
		want       map[string]tally
		bad        bool
	}{
		{
			name: "two binaries' counts of one block are one block",
			text: "mode: atomic\nm/a/x.go:1.1,2.2 3 0\nm/a/x.go:1.1,2.2 3 7\nm/a/y.go:1.1,2.2 1 0\nm/b/z.go:1.1,2.2 2 0\n",
			want: map[string]tally{"m/a": {4, 3}, "m/b": {2, 0}},
		},
		{
			name: "a later zero does not undo a run",
			text: "mode: set\nm/a/x.go:1.1,2.2 3 1\nmode: set\nm/a/x.go:1.1,2.2 3 0\n",
			want: map[string]tally{"m/a": {3, 3}},
		},
		{name: "empty", text: "", want: map[string]tally{}},
		{name: "short line", text: "m/a/x.go:1.1,2.2 3\n", bad: true},
		{name: "no place", text: "x 3 1\n", bad: true},
		{name: "no number", text: "m/a/x.go:1.1,2.2 three 1\n", bad: true},
		{name: "negative count", text: "m/a/x.go:1.1,2.2 3 -1\n", bad: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := readProfile(strings.NewReader(tt.text))
			if (err != nil) != tt.bad {
				t.Fatalf("error %v, want one: %v", err, tt.bad)
			}
			if !maps.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestReadThresholds(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"m/a\n", "m/a ninety\n", "m/a 101\n", "m/a 90 %\n"} {
		if got, err := readThresholds(strings.NewReader(text)); err == nil {
			t.Errorf("%q: got %v, want an error", text, got)
		}
	}
	got, err := readThresholds(strings.NewReader("# why\n\nm/a 90 # the parser\n"))
	if err != nil || len(got) != 1 || got[0] != (threshold{"m/a", 90}) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	covered := map[string]tally{"m/a": {10, 9}, "m/b": {2, 0}}
	tests := []struct {
		name string
		want []threshold
		ok   bool
		says string
	}{
		{name: "exactly reached", want: []threshold{{"m/a", 90}}, ok: true, says: "no threshold      m/b"},
		{name: "missed", want: []threshold{{"m/a", 90.1}}, says: "m/a  FAIL"},
		{name: "not in the profile", want: []threshold{{"m/c", 0}}, says: "not in the profile"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			if ok := compare(covered, tt.want, &out); ok != tt.ok {
				t.Errorf("got %v, want %v", ok, tt.ok)
			}
			if !strings.Contains(out.String(), tt.says) {
				t.Errorf("%q is missing from:\n%s", tt.says, out.String())
			}
		})
	}
}
