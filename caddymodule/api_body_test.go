package caddymodule

import (
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
)

func TestKeptBody(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789", 1000)
	for name, c := range map[string]struct {
		limit      int64
		repeatable bool
	}{"kept": {10_000, true}, "one too many": {9_999, false}} {
		for _, size := range []int64{int64(len(text)), -1} {
			b := newKeptBody(iotest.HalfReader(strings.NewReader(text)), size, c.limit)
			if size < 0 {
				if n := b.measure(); (n == int64(len(text))) != c.repeatable {
					t.Errorf("%s: measured %d", name, n)
				}
			}
			unread := b.open() // as for an origin that could not be reached
			unread.Close()
			first := b.open()
			got, err := io.ReadAll(first)
			if err != nil || string(got) != text {
				t.Errorf("%s, size %d: the first sending had %d bytes, %v", name, size, len(got), err)
			}
			first.Close()
			if _, err := first.Read(make([]byte, 1)); !errors.Is(err, errBodyClosed) {
				t.Errorf("%s: read after Close: %v", name, err)
			}
			if b.repeatable() != c.repeatable {
				t.Errorf("%s, size %d: repeatable is %v", name, size, b.repeatable())
			}
			got, err = io.ReadAll(b.open())
			if c.repeatable != (err == nil && string(got) == text) {
				t.Errorf("%s, size %d: the second sending had %d bytes, %v", name, size, len(got), err)
			}
		}
	}
}

// However much the first sending took, the second is whole.
func TestKeptBodyHandsOver(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789", 1000)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		b := newKeptBody(strings.NewReader(text), int64(len(text)), int64(len(text)))
		first := b.open()
		_, _ = io.CopyN(io.Discard, first, rng.Int64N(int64(len(text)+1)))
		first.Close()
		if got, err := io.ReadAll(b.open()); err != nil || string(got) != text {
			t.Fatalf("the second sending had %d bytes, %v", len(got), err)
		}
	}
	b := newKeptBody(io.MultiReader(strings.NewReader("x"), iotest.ErrReader(io.ErrUnexpectedEOF)), 2, 10)
	if _, err := io.ReadAll(b.open()); !errors.Is(err, io.ErrUnexpectedEOF) || b.repeatable() || !b.failed() {
		t.Errorf("a body that breaks off: %v, repeatable %v, failed %v", err, b.repeatable(), b.failed())
	}
}

// Over HTTP/3 the end comes with the last bytes, and nobody tells that there should have been more of them.
func TestKeptBodyOfHTTP3(t *testing.T) {
	t.Parallel()
	const text = "0123456789"
	if n := newKeptBody(iotest.DataErrReader(strings.NewReader(text)), -1, 9).measure(); n != -1 {
		t.Errorf("a body that is larger than what is kept was measured: %d", n)
	}
	b := newKeptBody(iotest.DataErrReader(strings.NewReader(text)), 11, 20)
	if _, err := io.ReadAll(b.open()); !errors.Is(err, io.ErrUnexpectedEOF) || b.repeatable() || !b.failed() {
		t.Errorf("a body that ends early: %v, repeatable %v, failed %v", err, b.repeatable(), b.failed())
	}
}
