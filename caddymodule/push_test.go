package caddymodule

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// deadlines is an answer of which the request's read deadline can be set.
type deadlines struct {
	*httptest.ResponseRecorder
	set []time.Time
}

func (d *deadlines) SetReadDeadline(at time.Time) error {
	d.set = append(d.set, at)
	return nil
}

// TestPushBodyDeadline: a body that does not come at once has a deadline, which ends with it. One that does costs no timer.
func TestPushBodyDeadline(t *testing.T) {
	t.Parallel()
	const text = "<xml><Encrypt>x</Encrypt></xml>"
	for name, tt := range map[string]struct {
		body io.Reader
		want error
		set  int
	}{
		"at once":       {iotest.DataErrReader(strings.NewReader(text)), nil, 0},
		"in pieces":     {iotest.DataErrReader(iotest.OneByteReader(strings.NewReader(text))), nil, 2},
		"end by itself": {onlyReader{strings.NewReader(text)}, nil, 2},
		"all announced": {strings.NewReader(text), nil, 0},
		"stops":         {io.MultiReader(strings.NewReader(text), iotest.ErrReader(os.ErrDeadlineExceeded)), errSlowBody, 1},
		"never begins":  {iotest.ErrReader(os.ErrDeadlineExceeded), errBody, 0},
		"breaks off":    {io.MultiReader(strings.NewReader(text), iotest.ErrReader(io.ErrUnexpectedEOF)), errBody, 1},
	} {
		w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		r := httptest.NewRequest(http.MethodPost, "/", tt.body)
		p := newPush()
		before := time.Now()
		if err := p.readBody(w, r, 1<<20); !errors.Is(err, tt.want) || tt.want == nil && string(p.body) != text {
			t.Errorf("%s: %v, %q", name, err, p.body)
		}
		if len(w.set) != tt.set {
			t.Errorf("%s: deadlines %v", name, w.set)
		}
		if tt.set > 0 && (w.set[0].Before(before.Add(bodyTimeout)) || w.set[0].After(time.Now().Add(bodyTimeout))) {
			t.Errorf("%s: a deadline in %s", name, w.set[0].Sub(before))
		}
		if tt.set == 2 && !w.set[1].IsZero() {
			t.Errorf("%s: the deadline stays", name)
		}
		p.release()
	}
}
